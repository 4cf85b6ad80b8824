"""The attention op through ctypes against numpy, of every kind and on every instruction set.

Rows that decode and rows with a chunk, over blocks in a scattered order. The kernels' own tests
(csrc/tests/test_attention*.cpp) go further; here it counts that structs, strides and the memory
of keys and values are what the op reads. The oracle itself is held against torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import ops_oracle as oracle
import pytest
from numpy.typing import NDArray

from penstock.errors import EngineError
from penstock.native.kv_memory import KVMemory
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Part, Program
from penstock.native.structs import AttentionArgs, Isa, OpKind

F64 = NDArray[np.float64]
MAX_TOKENS = 48
LENGTH = 40  # of each of two requests
SCALE = 0.3
DTYPES = [  # of the numbers, of the store, and how far the result may be off
    ("float32", "float32", 1e-5),
    ("bfloat16", "bfloat16", 0.03),
    ("bfloat16", "int8", 0.06),
    ("float32", "int8", 0.06),
    ("float32", "bfloat16", 0.03),
    ("bfloat16", "float32", 0.03),
]


class Kind(NamedTuple):
    heads: int = 4
    kv_heads: int = 2
    size: int = 24
    value_size: int = 24
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    is_causal: bool = True
    is_latent: bool = False

    @property
    def num_vectors(self) -> int:
        """Of a token in the store."""
        return 1 if self.is_latent else 2 * self.kv_heads

    @property
    def sinks(self) -> NDArray[np.float32]:
        return np.linspace(-1, 6, self.heads, dtype=np.float32)

    def expected(self, vectors: F64, first: int) -> F64:
        """Results of the tokens from `first` of a request [n, heads + num_vectors, size]."""
        keys = vectors[:, self.heads : self.heads + (1 if self.is_latent else self.kv_heads)]
        values = keys[..., : self.value_size] if self.is_latent else vectors[:, -self.kv_heads :]
        return oracle.attention(
            vectors[first:, : self.heads],
            keys,
            values,
            SCALE,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks.astype(np.float64) if self.has_sinks else None,
            is_causal=self.is_causal,
        )


KINDS = {
    "plain": Kind(),
    "window": Kind(window=7),
    "softcap": Kind(softcap=2.0),
    "sinks": Kind(has_sinks=True),
    "all": Kind(window=33, softcap=4.0, has_sinks=True),
    "latent": Kind(kv_heads=1, value_size=16, is_latent=True),
    "latent-all": Kind(
        kv_heads=1, value_size=10, window=9, softcap=5.0, has_sinks=True, is_latent=True
    ),
    "latent-32-heads": Kind(heads=32, kv_heads=1, value_size=20, is_latent=True),
}
ENCODERS = {
    "plain": Kind(is_causal=False),
    "softcap-sinks": Kind(softcap=3.0, has_sinks=True, is_causal=False),
    "latent": Kind(kv_heads=1, value_size=16, is_causal=False, is_latent=True),
}


class Step(NamedTuple):
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    block_table: NDArray[np.int32]
    block_size: int


class Recorded:
    """A program of one attention op, with two requests' tokens and their blocks."""

    def __init__(self, pool: Pool, kind: Kind, dtype: str, kv_dtype: str, block_size: int) -> None:
        self.kind, self.block_size = kind, block_size
        num_blocks = 2 * (-(-LENGTH // block_size) + 3)
        rng = np.random.default_rng(11)
        self.table = rng.permutation(num_blocks).astype(np.int32).reshape(2, -1)
        self.vectors = rng.standard_normal((2, LENGTH, kind.heads + kind.num_vectors, kind.size))
        self.kv = KVMemory(1, num_blocks * block_size, kind.num_vectors, kind.size, kv_dtype)
        self.sinks = kind.sinks
        self.program = Program(pool, MAX_TOKENS, 1)
        num_columns = kind.heads + (0 if kind.is_latent else kind.num_vectors)
        self.qkv = self.program.value(num_columns * kind.size, dtype)
        self.latent = self.program.value(kind.size, dtype)
        self.out = self.program.value(kind.heads * kind.value_size, dtype)
        self.part = self._record()

    def _record(self) -> Part:
        kind, kv = self.kind, self.kv
        args = AttentionArgs(
            qkv_stride=self.qkv.width,
            latent_stride=self.latent.width,
            out_stride=self.out.width,
            kv=kv.layer(0),
            kv_scales=kv.layer_scales(0),
            sinks=self.sinks.ctypes.data if kind.has_sinks else None,
            num_slots=kv.num_slots,
            window=kind.window,
            dtype=self.qkv.dtype_id,
            kv_dtype=kv.dtype_id,
            num_heads=kind.heads,
            num_kv_heads=kind.kv_heads,
            head_dim=kind.size,
            value_dim=kind.value_size,
            scale=SCALE,
            softcap=kind.softcap,
            is_causal=kind.is_causal,
        )
        latent = {"latent": self.latent} if kind.is_latent else {}
        self.program.append(OpKind.ATTENTION, args, qkv=self.qkv, out=self.out, **latent)
        part = self.program.end_part()
        self.program.finish()
        return part

    def run(self, spans: list[tuple[int, int, int]]) -> list[NDArray[np.float32]]:
        """Compute tokens [first, last) of some requests; the results of each span."""
        kind, size = self.kind, self.block_size
        fresh = np.concatenate([self.vectors[row, first:last] for row, first, last in spans])
        self._put(self.qkv, fresh.reshape(len(fresh), -1)[:, : self.qkv.width])
        if kind.is_latent:
            self._put(self.latent, fresh[:, kind.heads])
        positions = np.concatenate([np.arange(first, last) for _, first, last in spans])
        rows = np.repeat([row for row, _, _ in spans], [last - first for _, first, last in spans])
        slots = self.table[rows, positions // size].astype(np.int64) * size + positions % size
        starts = np.cumsum([0, *(last - first for _, first, last in spans)]).astype(np.int32)
        step = Step(
            np.zeros(len(fresh), np.int64),
            positions,
            starts,
            np.array([last for _, _, last in spans], np.int32),
            slots,
            self.table[[row for row, _, _ in spans]],
            size,
        )
        self.program.set_step(step)
        self.program.run(self.part)
        bits = self.program.view(self.out)[: len(fresh)]
        found = oracle.from_bits(bits) if self.out.dtype == "bfloat16" else bits.copy()
        found = found.reshape(len(fresh), kind.heads, kind.value_size)
        return [found[a:b] for a, b in pairwise(starts.tolist())]

    def _put(self, value: Buffer, x: Any) -> None:
        view = self.program.view(value)[: len(x)]
        view[:] = oracle.to_bits(x) if value.dtype == "bfloat16" else x


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("dtype", "kv_dtype", "atol"), DTYPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_causal(
    pool: Pool, isa: Isa, kind: Kind, dtype: str, kv_dtype: str, atol: float, block_size: int
) -> None:
    recorded = Recorded(pool, kind, dtype, kv_dtype, block_size)
    cuts = [(0, 0), (7, 1), (8, 20), (9, 30), (37, 31), (38, 40), (40, 40)]
    for (a, b), (next_a, next_b) in pairwise(cuts):
        spans = [(row, *span) for row, span in enumerate([(a, next_a), (b, next_b)])]
        spans = [span for span in spans if span[1] < span[2]]
        for (row, first, last), found in zip(spans, recorded.run(spans), strict=True):
            expected = kind.expected(recorded.vectors[row, :last], first)
            np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize(("dtype", "kv_dtype", "atol"), DTYPES)
@pytest.mark.parametrize("kind", ENCODERS.values(), ids=ENCODERS)
def test_encoders(pool: Pool, isa: Isa, kind: Kind, dtype: str, kv_dtype: str, atol: float) -> None:
    """Every token sees those after it as well."""
    recorded = Recorded(pool, kind, dtype, kv_dtype, 16)
    spans = [(0, 0, 29), (1, 0, 17)]
    for (row, first, last), found in zip(spans, recorded.run(spans), strict=True):
        expected = kind.expected(recorded.vectors[row, :last], first)
        np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind(value_size=16), "value_dim must be head_dim"),
        (Kind(value_size=16, is_latent=True), "one key-value head"),
        (Kind(window=5, is_causal=False), "window needs is_causal"),
        (Kind(size=642, value_size=642), "at most 640"),
    ],
)
def test_what_it_cannot_do_is_told(pool: Pool, kind: Kind, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        Recorded(pool, kind, "float32", "float32", 16)


@pytest.mark.parametrize("kind", [*KINDS.values(), *ENCODERS.values()])
def test_the_oracle_is_what_torch_says(kind: Kind) -> None:
    """Masks by comparison of positions; a sink is one more column, which has no value."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((LENGTH, kind.heads + kind.num_vectors, kind.size))
    x = torch.from_numpy(vectors).transpose(0, 1)
    keys = x[kind.heads : kind.heads + (1 if kind.is_latent else kind.kv_heads)]
    values = keys[..., : kind.value_size] if kind.is_latent else x[-kind.kv_heads :]
    keys, values = (y.repeat_interleave(kind.heads // len(y), dim=0) for y in (keys, values))
    scores = x[: kind.heads] @ keys.mT * SCALE
    if kind.softcap:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if kind.is_causal:
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        seen = seen.triu(1 - kind.window) if kind.window else seen
        scores = scores.masked_fill(~seen, float("-inf"))
    if kind.has_sinks:
        column = torch.from_numpy(kind.sinks).double()[:, None, None].expand(-1, LENGTH, 1)
        scores = torch.cat([scores, column], dim=2)
    weights = torch.softmax(scores, dim=2)[..., :LENGTH]
    expected = (weights @ values).transpose(0, 1).numpy()
    np.testing.assert_allclose(kind.expected(vectors, 0), expected, atol=1e-12)
