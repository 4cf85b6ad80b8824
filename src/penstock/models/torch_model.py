"""The torch backend: a decoder of torch leaves with its KV store and its attention.

Owns the way from the numpy arrays of a step to tensors and back. The only file of `models` that
imports torch. Invariant: nothing is copied on the way on a CPU: tensors and arrays share memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from penstock.models.checkpoint import precision
from penstock.models.compose import compose
from penstock.models.files import read_config
from penstock.models.load import timed
from penstock.models.loader import LoadFormat, load_weights
from penstock.models.spec import ModelSpec

if TYPE_CHECKING:
    from penstock.models.foreign import ForeignModel

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
        on_torch = on_tensors(batch, self.kv, self._attention)
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

    def hidden(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The last hidden states, [N, hidden], of the tokens `rows` [N] of the last batch."""
        hidden: NDArray[np.float32] = self._hidden[torch.from_numpy(rows)].float().numpy()
        return hidden

    def classify(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores of labels, [N, labels], of pooled hidden states [N, hidden]."""
        assert self.decoder.classifier is not None
        return self.decoder.classifier(pooled)


def on_tensors(batch: ForwardBatch, kv: KVStore, attention: AttentionBackend) -> TorchBatch:
    """The same step for torch: tensors that share the memory of the arrays."""
    tensor = torch.from_numpy
    return TorchBatch(
        input_ids=tensor(batch.input_ids),
        positions=tensor(batch.positions),
        query_start=tensor(batch.query_start),
        context_len=tensor(batch.context_len),
        slot_mapping=tensor(batch.slot_mapping),
        block_table=tensor(batch.block_table),
        block_size=batch.block_size,
        kv=kv,
        attention=attention,
        lengths=batch.lengths,
        context_lens=batch.context_lens,
    )


def load(
    path: Path,
    *,
    dtype: str,
    num_slots: int,
    num_threads: int | None,
    load_format: LoadFormat,
    seed: int,
    phases: dict[str, float],
) -> TorchModel | ForeignModel:
    """See `penstock.models.load.load_model`. `num_threads` holds for the whole process."""
    attention = ReferenceAttention()
    config = read_config(path)
    spec = ModelSpec.from_hf(config)
    if spec.is_foreign:
        with timed(phases, "load"):
            from penstock.models import foreign  # which imports transformers

            return foreign.load(
                path,
                spec,
                dtype=dtype,
                num_slots=num_slots,
                num_threads=num_threads,
                load_format=load_format,
                seed=seed,
            )
    with timed(phases, "load"):
        kind: torch.dtype = getattr(torch, dtype)
        if reasons := attention.unsupported(spec, kind):
            raise UnsupportedModel(f"No attention can serve this model: {'; '.join(reasons)}.")
        with torch.inference_mode():
            decoder = compose(spec, TorchToolkit(Materials(kind)))
            stored = precision(path, config) if load_format == "dummy" else None
            form = None if stored is None else stored.form
            load_weights(decoder.layers(), path, load_format, seed, spec.names, form)
        if num_threads := num_threads or int(spec.num_parameters < ONE_THREAD_PARAMETERS):
            torch.set_num_threads(num_threads)
    with timed(phases, "kv"):
        kv = KVStore(spec.num_layers, num_slots, *spec.cached, kind)
    return TorchModel(decoder, kv, attention)
