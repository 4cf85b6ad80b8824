"""The torch backend: a decoder of torch leaves with its KV store and its attention.

Owns the way from the numpy arrays of a step to tensors and back. The only file of `models` that
imports torch. Invariant: nothing is copied on the way on a CPU: tensors and arrays share memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.attention.base import AttentionBackend, TorchBatch
from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention
from penstock.errors import UnsupportedModel
from penstock.layers.materials import Materials
from penstock.layers.torch_toolkit import TorchToolkit
from penstock.models.batch import ForwardBatch
from penstock.models.blocks import Decoder
from penstock.models.files import read_config
from penstock.models.load import timed
from penstock.models.loader import LoadFormat, load_weights
from penstock.models.registry import builder
from penstock.models.spec import ModelSpec

# Smaller models run on one thread: waiting for others costs more than they give, and on a busy
# machine up to 100 times more (docs/LOG.md).
ONE_THREAD_PARAMETERS = 16_000_000


class TorchModel:
    """Implements `Model`. The decoder's leaves are those of a `TorchToolkit`."""

    def __init__(self, decoder: Decoder, kv: KVStore, attention: AttentionBackend) -> None:
        self.spec = decoder.spec
        self.decoder = decoder
        self.kv = kv
        self._attention = attention
        self._hidden = torch.empty(0)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> None:
        """Compute all tokens of the batch and write their keys and values."""
        tensor = torch.from_numpy
        on_torch = TorchBatch(
            input_ids=tensor(batch.input_ids),
            positions=tensor(batch.positions),
            query_start=tensor(batch.query_start),
            context_len=tensor(batch.context_len),
            slot_mapping=tensor(batch.slot_mapping),
            block_table=tensor(batch.block_table),
            block_size=batch.block_size,
            kv=self.kv,
            attention=self._attention,
            lengths=batch.lengths,
            context_lens=batch.context_lens,
        )
        on_torch.meta = self._attention.plan(on_torch)
        self._hidden = self.decoder.forward(on_torch)

    @property
    def description(self) -> str:
        """The backend and its threads."""
        return f"torch, {torch.get_num_threads()} threads"

    @property
    def choose(self) -> None:
        """The sampler's own way will do."""

    @torch.inference_mode()
    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of the next token, [L, V], after the tokens `rows` [L] of the last batch."""
        hidden = self._hidden
        if len(rows) < len(hidden):  # else it is all of them, in order
            hidden = hidden[torch.from_numpy(rows)]
        logits: NDArray[np.float32] = self.decoder.logits(hidden).numpy()
        return logits


def load(
    path: Path,
    *,
    dtype: str,
    num_slots: int,
    num_threads: int | None,
    load_format: LoadFormat,
    seed: int,
    phases: dict[str, float],
) -> TorchModel:
    """See `penstock.models.load.load_model`. `num_threads` holds for the whole process."""
    attention = ReferenceAttention()
    with timed(phases, "load"):
        spec = ModelSpec.from_hf(read_config(path))
        kind: torch.dtype = getattr(torch, dtype)
        if reasons := attention.unsupported(spec, kind):
            raise UnsupportedModel(f"No attention can serve this model: {'; '.join(reasons)}.")
        with torch.inference_mode():
            decoder = builder(spec.architecture)(spec, TorchToolkit(Materials(kind)))
            load_weights(decoder.layers(), path, load_format, seed)
        if num_threads := num_threads or int(spec.num_parameters < ONE_THREAD_PARAMETERS):
            torch.set_num_threads(num_threads)
    with timed(phases, "kv"):
        kv = KVStore(spec.num_layers, num_slots, spec.num_kv_heads, spec.head_dim, kind)
    return TorchModel(decoder, kv, attention)
