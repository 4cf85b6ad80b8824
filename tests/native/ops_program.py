"""Programs of one op for tests: a step, packed weights, and numbers in and out of values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import ops_oracle as oracle
from numpy.typing import NDArray

from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Buffer, Program
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.schemes import Format
from penstock.quantization.unpack import unpack

F32 = NDArray[np.float32]
FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    Format("int8"),
    Format("int4", 32),
    Format("int4", 128),
]
MAX_TOKENS = 48


class Step(NamedTuple):
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    block_table: NDArray[np.int32]
    block_size: int


def step_of(num_tokens: int, ids: NDArray[np.int64] | None = None) -> Step:
    """One request of that many tokens."""
    return Step(
        np.zeros(num_tokens, np.int64) if ids is None else ids,
        np.arange(num_tokens),
        np.array([0, num_tokens], np.int32),
        np.array([num_tokens], np.int32),
        np.arange(num_tokens),
        np.zeros((1, 1), np.int32),
        MAX_TOKENS,
    )


def put(program: Program, value: Buffer, x: NDArray[Any]) -> None:
    """Write x [rows, width] into a value."""
    view = program.view(value)[: len(x)]
    view[:] = oracle.to_bits(x) if value.dtype == "bfloat16" else x


def get(program: Program, value: Buffer, num_rows: int) -> F32:
    view = program.view(value)[:num_rows]
    return oracle.from_bits(view) if value.dtype == "bfloat16" else view.copy()


def packed(pool: Pool, form: Format, source: F32) -> PackedWeight:
    weight = PackedWeight(pool, form, *source.shape, Arena())
    weight.pack(source.view(np.uint8).reshape(-1), "float32", len(source), Placement())
    return weight


def unpacked(form: Format, weight: PackedWeight) -> F32:
    return unpack(form, weight.data, weight.scales, weight.num_rows, weight.num_columns)
