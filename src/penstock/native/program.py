"""A model as a list of operations, recorded once and replayed for every step.

Owns the ops with their arguments, the values that flow between them, and the one piece of memory
in which all values lie. Knows neither layers nor models.
Invariant: two values that are needed at the same time never share a byte, and no address changes
after `finish`.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.native.memory import ALIGNMENT, allocate
from penstock.native.pool import Pool
from penstock.native.structs import DTYPES, Op, OpKind, Rows, Step

# bfloat16 as raw bits
_NUMPY: dict[str, np.dtype[Any]] = {"float32": np.dtype("f4"), "bfloat16": np.dtype("u2")}


class StepArrays(Protocol):
    """What a step reads; `penstock.models.batch.ForwardBatch` says what it means."""

    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def positions(self) -> NDArray[np.int64]: ...
    @property
    def query_start(self) -> NDArray[np.int32]: ...
    @property
    def context_len(self) -> NDArray[np.int32]: ...
    @property
    def slot_mapping(self) -> NDArray[np.int64]: ...
    @property
    def block_table(self) -> NDArray[np.int32]: ...
    @property
    def block_size(self) -> int: ...


class Buffer:
    """A value between ops: `width` numbers for each row. It can be handed on, nothing else."""

    __slots__ = ("dtype", "first_op", "last_op", "offset", "rows", "width")

    def __init__(self, width: int, dtype: str, rows: Rows) -> None:
        self.width = width
        self.dtype = dtype  # float32 or bfloat16
        self.rows = rows
        self.first_op, self.last_op = -1, -1  # between them it is needed
        self.offset = -1  # of the program's memory

    @property
    def dtype_id(self) -> int:
        """As the library has it."""
        return DTYPES[self.dtype]

    def columns(self, first: int) -> Columns:
        """What lies from number `first` of each row on, for an op that knows the row's width."""
        assert 0 <= first < self.width, first
        return Columns(self, first)


class Columns(NamedTuple):
    """The end of each row of a value."""

    value: Buffer
    first: int


class Part(NamedTuple):
    """Some ops in sequence, which can be replayed alone."""

    first: int
    num_ops: int


class _Recorded(NamedTuple):
    kind: OpKind
    args: ctypes.Structure
    values: dict[str, Columns]  # by field of `args`: pointers to fill in


class Program:
    """The ops of one model. Recorded, then finished, then run; called from one thread."""

    def __init__(self, pool: Pool, max_tokens: int, max_logit_rows: int) -> None:
        """An empty program for steps of up to that many tokens and rows of logits."""
        self.pool = pool
        self.num_bytes = 0  # of its values and of the ops' own memory; known when it is finished
        self._max_rows = {Rows.TOKENS: max_tokens, Rows.LOGITS: max_logit_rows}
        self._recorded: list[_Recorded] = []
        self._parts: list[Part] = []
        self._values: list[Buffer] = []
        self._memory = allocate(0)
        self._ops: Any = None
        self._pointers: dict[int, Any] = {}  # to the ops with which parts begin
        self._step = Step()
        self._step_pointer = ctypes.byref(self._step)
        self._run = pool.library.function("penstock_run")
        self._held: object = None  # what the pointers of the step point into

    def value(self, width: int, dtype: str, rows: Rows = Rows.TOKENS) -> Buffer:
        """A new value for ops to write and read."""
        self._values.append(Buffer(width, dtype, rows))
        return self._values[-1]

    def append(self, kind: OpKind, args: ctypes.Structure, **values: Buffer | Columns) -> None:
        """Record an op. `values` are those of its arguments that point to values, by field."""
        index = len(self._recorded)
        columns = {
            field: value.columns(0) if isinstance(value, Buffer) else value
            for field, value in values.items()
        }
        for value, _ in columns.values():
            value.first_op = index if value.first_op < 0 else value.first_op
            value.last_op = index
        self._recorded.append(_Recorded(kind, args, columns))

    def end_part(self) -> Part:
        """Make the ops since the last part one that is replayed alone.

        Parts after the first may be replayed any number of times for one step: what they read and
        write stays.
        """
        first = sum(part.num_ops for part in self._parts)
        self._parts.append(Part(first, len(self._recorded) - first))
        return self._parts[-1]

    def finish(self) -> None:
        """Give every value its place and have the library check the ops and make its scratch.

        Raises:
            EngineError: the library cannot run an op; the message says which and why.
        """
        for value in self._values:
            if value.last_op >= self._parts[0].num_ops:
                value.last_op = len(self._recorded)
        size = place(self._values, [self._num_bytes(value) for value in self._values])
        self._memory = allocate(size)
        self._ops = (Op * len(self._recorded))()
        start = self._memory.ctypes.data
        for op, recorded in zip(self._ops, self._recorded, strict=True):
            for field, (value, first) in recorded.values.items():
                address = start + value.offset + first * _NUMPY[value.dtype].itemsize
                setattr(recorded.args, field, address)
            op.kind, op.args = recorded.kind, ctypes.addressof(recorded.args)
        for part in self._parts:
            self._pointers[part.first] = ctypes.byref(self._ops[part.first])
        rows = self._max_rows[Rows.TOKENS], self._max_rows[Rows.LOGITS]
        pool = self.pool
        self.num_bytes = size + pool.library.call(
            "penstock_reserve", pool.handle, self._ops, len(self._ops), *rows
        )

    def view(self, value: Buffer) -> NDArray[Any]:
        """A value, [rows of the largest step, width]; bfloat16 as raw bits."""
        shape = self._max_rows[value.rows], value.width
        return np.ndarray(shape, _NUMPY[value.dtype], self._memory, value.offset)

    def set_step(self, arrays: StepArrays) -> None:
        """What the next replays compute. The arrays are read in place, and not copied."""
        step = self._step
        num_tokens = len(arrays.input_ids)
        assert num_tokens <= self._max_rows[Rows.TOKENS], num_tokens
        table = arrays.block_table
        assert table.dtype == np.int32
        assert table.strides[1] == 4
        step.num_tokens = num_tokens
        step.num_requests = len(table)
        step.num_logit_rows = 0
        step.block_size = arrays.block_size
        step.block_table_stride = table.strides[0] // 4
        step.input_ids = _address(arrays.input_ids, np.int64)
        step.positions = _address(arrays.positions, np.int64)
        step.slot_mapping = _address(arrays.slot_mapping, np.int64)
        step.query_start = _address(arrays.query_start, np.int32)
        step.context_len = _address(arrays.context_len, np.int32)
        step.block_table = table.ctypes.data
        self._held = arrays

    def set_logit_rows(self, rows: NDArray[np.int64]) -> None:
        """Which tokens of the step the ops over `Rows.LOGITS` compute; at least one."""
        assert 0 < len(rows) <= self._max_rows[Rows.LOGITS], len(rows)
        self._step.num_logit_rows = len(rows)
        self._step.logit_rows = _address(rows, np.int64)

    def run(self, part: Part) -> None:
        """Replay the ops of a part for the step that was set.

        Raises:
            EngineError: the library refused.
        """
        pointer = self._pointers[part.first]
        if self._run(self.pool.handle, pointer, part.num_ops, self._step_pointer):
            raise self.pool.library.error("penstock_run")

    def _num_bytes(self, value: Buffer) -> int:
        num_bytes = self._max_rows[value.rows] * value.width * _NUMPY[value.dtype].itemsize
        return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def place(values: list[Buffer], sizes: list[int]) -> int:
    """Give every value an offset such that values needed at the same time do not overlap.

    The largest first, each at the lowest place that is free for as long as it is needed: "greedy
    by size", Pisarchyk and Lee 2020.

    Returns:
        The bytes that all of them take together.
    """
    placed: list[tuple[Buffer, int]] = []  # with their sizes, by offset
    total = 0
    for value, size in sorted(zip(values, sizes, strict=True), key=lambda pair: -pair[1]):
        offset = 0
        for other, other_size in placed:
            apart = other.last_op < value.first_op or value.last_op < other.first_op
            if not apart:
                if offset + size <= other.offset:
                    break
                offset = max(offset, other.offset + other_size)
        value.offset = offset
        total = max(total, offset + size)
        placed.append((value, size))
        placed.sort(key=lambda pair: pair[0].offset)
    return total


def _address(array: Any, dtype: type) -> int:
    """Where the numbers of a contiguous array lie (three times as fast as `array.ctypes`)."""
    assert array.dtype == dtype, array.dtype
    return ctypes.addressof(ctypes.c_char.from_buffer(array))
