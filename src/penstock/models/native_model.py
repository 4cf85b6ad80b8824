"""The native backend: a decoder recorded as a program, with its weights and its KV memory.

Owns the making of these and the replay of a step. Imports no torch.
Invariant: a step allocates nothing; what `logits` returns lies in the program's memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnsupportedModel
from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.layers.specs import AttentionSpec, ExpertsSpec
from penstock.models.batch import ForwardBatch
from penstock.models.blocks import Decoder
from penstock.models.checkpoint import FilePrecision, precision, weight_files
from penstock.models.compose import compose
from penstock.models.files import read_config
from penstock.models.load import timed
from penstock.models.loader import LoadFormat, load_weights
from penstock.models.spec import LayerSpec, ModelSpec
from penstock.models.weight_cache import FileState, Identity, WeightCache, directory_of
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Part, Program
from penstock.native.sampling import Sampler
from penstock.native.structs import ABI_VERSION
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import NONE, scheme

if TYPE_CHECKING:
    from penstock.quantization.stored import StoredPrecision

MAX_HEAD_DIM = 640
MAX_EXPERTS, MAX_EXPERTS_TAKEN = 1024, 64
# Another number for another way to quantize, or to place numbers in the arena: then nobody takes
# what an older version has kept. `tests/models/test_weight_cache.py` knows when it is due.
LAYOUT_VERSION = 2


class NativeModel:
    """Implements `Model`. The decoder is called once, to be recorded."""

    def __init__(self, decoder: Decoder, materials: NativeMaterials) -> None:
        """Record a decoder whose leaves are those of a `NativeToolkit` of these materials."""
        self.spec = decoder.spec
        self.program = program = materials.program
        self._materials = materials  # the memory that the program points into
        self._decoder = decoder
        hidden = decoder.forward(None)
        self._tokens = program.end_part()
        logits, self._head = None, self._tokens
        self._whole = self._tokens
        if decoder.head is not None:
            logits = decoder.logits(hidden)
            self._head = program.end_part()
            self._whole = Part(0, self._tokens.num_ops + self._head.num_ops)
        self._batch: ForwardBatch | None = None  # that the program is set to
        self._computed: object = None  # the rows whose logits are there
        program.finish()
        self._hidden = hidden
        self._logits: NDArray[np.float32] | None = None if logits is None else program.view(logits)
        self.choose = Sampler(program.pool)

    @property
    def description(self) -> str:
        """The backend, its instruction set and its threads."""
        pool = self.program.pool
        return f"native, {library.isa_name(pool.library.isa)}, {pool.num_threads} threads"

    def forward(self, batch: ForwardBatch) -> None:
        """Compute all tokens of the batch and write their keys and values.

        And the logits that the batch asks for, in one go: after each replay the caches hold nothing
        of Python's, and to come back costs up to a tenth of a millisecond.
        """
        rows = batch.logit_rows
        if batch is not self._batch or rows is not self._computed:
            self._batch = None
            self.program.set_step(batch)
            if len(rows):
                self.program.set_logit_rows(rows)
            self._batch, self._computed = batch, rows
        self.program.run(self._whole if len(rows) else self._tokens)

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of the next token, [L, V], after the tokens `rows` [L] of the last batch."""
        assert self._logits is not None, "a model without a head has no scores of tokens"
        if rows is not self._computed:
            self.program.set_logit_rows(rows)
            self.program.run(self._head)
            self._computed = rows
        return self._logits[: len(rows)]

    def hidden(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The last hidden states, [N, hidden], of the tokens `rows` [N] of the last batch."""
        hidden = self.program.view(self._hidden)[rows]
        if hidden.dtype == np.uint16:  # bfloat16
            hidden = (hidden.astype(np.uint32) << 16).view(np.float32)
        return hidden

    def classify(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores of labels, [N, labels], of pooled hidden states [N, hidden]."""
        assert self._decoder.classifier is not None
        return self._decoder.classifier(pooled)


def unsupported(spec: ModelSpec) -> str | None:
    """Why the native backend cannot compute such a model on this machine; None if it can."""
    for layer in spec.layers:
        if reason := _unsupported(layer):
            return reason
    return library.unavailable_reason()


def _unsupported(layer: LayerSpec) -> str | None:
    attention, mlp = layer.attention, layer.mlp
    _, size = attention.cached
    if size > MAX_HEAD_DIM or size % 2:
        return f"vectors of `{size}` numbers for a head are wider than `{MAX_HEAD_DIM}`, or odd"
    if isinstance(attention, AttentionSpec) and attention.window and not attention.is_causal:
        return f"a window of `{attention.window}` tokens in an encoder is not implemented"
    if isinstance(mlp, ExpertsSpec):
        if mlp.num_experts > MAX_EXPERTS:
            return f"`{mlp.num_experts}` experts are more than `{MAX_EXPERTS}`"
        if mlp.top_k > MAX_EXPERTS_TAKEN:
            return f"`{mlp.top_k}` experts for a token are more than `{MAX_EXPERTS_TAKEN}`"
    return None


def load(
    path: Path,
    *,
    dtype: str,
    quantization: str,
    kv_dtype: str,
    num_slots: int,
    max_tokens: int,
    max_logit_rows: int,
    num_threads: int | None,
    load_format: LoadFormat,
    seed: int,
    weight_cache: str | None,
    phases: dict[str, float],
) -> NativeModel:
    """See `penstock.models.load.load_model`."""
    config = read_config(path)
    spec = ModelSpec.from_hf(config)
    if reason := unsupported(spec):
        raise UnsupportedModel(f"The native backend cannot serve this model: {reason}.")
    with timed(phases, "kv"):
        kv = KVMemory(spec.num_layers, num_slots, *spec.cached, kv_dtype)
    with timed(phases, "load"):
        materials = NativeMaterials(
            program=Program(Pool(library.load(), num_threads), max_tokens, max_logit_rows),
            arena=Arena(),
            dtype=dtype,
            # Of what is quantized already, and is to be in another way, the numbers are taken.
            formats=Formats(
                scheme(quantization, dtype),
                _stored(path, config, spec, load_format) if quantization == NONE else None,
            ),
            kv=kv,
        )
        decoder = compose(spec, NativeToolkit(materials))
        layers, memory = list(decoder.layers()), materials.arena.memory
        kept = _kept(path, spec, materials, weight_cache) if load_format == "auto" else None
        if kept is None:
            stored = materials.formats.stored
            form = None if stored is None else stored.form
            load_weights(layers, path, load_format, seed, spec.names, form)
        elif not kept.cache.read(kept.identity, memory):
            load_weights(layers, path, "auto", seed, spec.names)
            kept.cache.write_behind(kept.identity, memory)
        return NativeModel(decoder, materials)


def _stored(
    path: Path, config: Mapping[str, Any], spec: ModelSpec, load_format: LoadFormat
) -> StoredPrecision | None:
    """The formats of a quantized checkpoint: those of its files or, unread, of its config."""
    told = precision(path, config)
    is_read = told is not None and load_format == "auto"
    return FilePrecision(told, path, spec.names) if told and is_read else told


class _Kept(NamedTuple):
    """Where the weights are for the next start, or will be."""

    cache: WeightCache
    identity: Identity


def _kept(
    path: Path, spec: ModelSpec, materials: NativeMaterials, setting: str | None
) -> _Kept | None:
    """What the weight cache has to do with this model; None: nothing."""
    linear, table, _ = materials.formats.scheme
    directory = directory_of(setting)
    if directory is None or linear.dtype not in {"int8", "int4"} or spec.classifier is not None:
        # What is not quantized is packed as fast as it is read; a classifier is not in the arena.
        return None
    places = [LAYOUT_VERSION, ABI_VERSION, repr(spec), *materials.arena.reserved]
    layout = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    form = "-".join(f"{form.dtype}g{form.group_size}" for form in (linear, table))
    try:
        files = tuple(FileState.of(file) for file in weight_files(path))
    except OSError:  # the loader will say it better
        return None
    return _Kept(WeightCache(directory), Identity(form, layout, files))
