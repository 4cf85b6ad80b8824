"""DeviceState follows plans; build_batch gathers exactly what the plan says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention
from penstock.engine.batch import build_batch
from penstock.engine.plan import Admission, Slice, StepPlan
from penstock.engine.state import DeviceState, is_special
from penstock.types import SamplingParams

NUM_ROWS, MAX_LEN = 4, 24


def admission(row: int, token_ids: list[int], **params: Any) -> Admission:
    return Admission(row, token_ids, len(token_ids), SamplingParams(**params), seed=7)


def test_a_row_is_taken_grown_written_and_given_up() -> None:
    state = DeviceState(NUM_ROWS, MAX_LEN, block_size=3)
    first = admission(2, [5, 6, 7, 8], temperature=0.5, top_k=3, prompt_logprobs=0)
    state.apply(StepPlan([], [first], [], [(2, [9, 4])]))
    state.append(np.array([2]), np.array([11]))
    state.append(np.array([2]), np.array([12]))
    state.apply(StepPlan([], [], [], [(2, [1])]))
    assert state.token_ids[2, :6].tolist() == [5, 6, 7, 8, 11, 12]
    assert (state.num_tokens[2], state.num_prompt[2], state.num_blocks[2]) == (6, 4, 3)
    assert state.block_table[2, :3].tolist() == [9, 4, 1]
    assert (state.temperature[2], state.top_k[2], state.seed[2]) == (0.5, 3, 7)
    assert state.wants_prompt_logprobs[2]
    assert state.num_tokens[[0, 1, 3]].tolist() == [0, 0, 0], "other rows are untouched"

    # Released and taken again within one plan, as after a preemption.
    second = admission(2, [1, 2])
    state.apply(StepPlan([], [second], [2], [(2, [0])]))
    assert (state.num_tokens[2], state.num_blocks[2], state.block_table[2, 0]) == (2, 1, 0)
    assert state.params[2] == second.params
    assert state.temperature[2] == 1.0
    assert not state.wants_prompt_logprobs[2]


def test_a_taken_row_cannot_be_taken_again() -> None:
    state = DeviceState(NUM_ROWS, MAX_LEN, block_size=1)
    state.apply(StepPlan([], [admission(0, [1])], [], []))
    with pytest.raises(AssertionError, match="row 0"):
        state.apply(StepPlan([], [admission(0, [1])], [], []))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_seed_has_its_own_bits(seed: int) -> None:
    state = DeviceState(1, 4, 1)
    state.apply(StepPlan([], [Admission(0, [1], 1, SamplingParams(), seed)], [], []))
    assert int(state.seed[0]) == seed % 2**64


# A row that sets only these is sampled without a look at its parameters.
PLAIN: dict[str, Any] = {
    "max_tokens": 3,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "stop_token_ids": (3,),
    "ignore_eos": True,
    "seed": 4,
    "prompt_logprobs": 2,
    "n": 2,
    "stop": ("x",),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}
SPECIAL: dict[str, Any] = {
    "min_tokens": 1,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {3: 1.0},
    "allowed_token_ids": (1, 2),
    "banned_token_ids": (4,),
    "logprobs": 0,
}


def test_special_is_known_for_every_parameter() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == set(PLAIN) | set(SPECIAL), "a new parameter must be put into one of the two"
    assert not is_special(SamplingParams(**PLAIN))
    for name, value in SPECIAL.items():
        assert is_special(SamplingParams(**{name: value})), name


def test_memory_is_as_announced() -> None:
    state = DeviceState(8, 1000, 16)
    assert state.num_bytes == pytest.approx(DeviceState.bytes_for(8, 1000, 16), rel=0.01)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[int], int, int, list[int]]]]:
    """A block size, and for some rows: (row, tokens, start, length, blocks)."""
    block_size = draw(st.sampled_from([1, 3, 16]))
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, unique=True))
    pool = draw(st.permutations(range(NUM_ROWS * MAX_LEN)))
    described = []
    for row in rows:
        token_ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=MAX_LEN))
        start = draw(st.integers(0, len(token_ids) - 1))
        length = draw(st.integers(1, len(token_ids) - start))
        num_blocks = -(-(start + length) // block_size)
        described.append((row, token_ids, start, length, [pool.pop() for _ in range(num_blocks)]))
    return block_size, described


@given(ragged())
def test_the_batch_is_what_a_loop_would_write(
    drawn: tuple[int, list[tuple[int, list[int], int, int, list[int]]]],
) -> None:
    block_size, described = drawn
    state = DeviceState(NUM_ROWS, MAX_LEN, block_size)
    state.apply(
        StepPlan(
            [],
            [admission(row, token_ids) for row, token_ids, *_ in described],
            [],
            [(row, blocks) for row, *_, blocks in described],
        )
    )
    kv = KVStore(1, NUM_ROWS * MAX_LEN * block_size, 1, 4, torch.float32)
    slices = [Slice(row, start, length) for row, _, start, length, _ in described]
    batch = build_batch(slices, state, kv, ReferenceAttention())

    input_ids, positions, slots, query_start, logit_rows, sampled = [], [], [], [0], [], []
    for row, token_ids, start, length, blocks in described:
        for position in range(start, start + length):
            input_ids.append(token_ids[position])
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
        query_start.append(len(input_ids))
        if start + length == len(token_ids):
            logit_rows.append(len(input_ids) - 1)
            sampled.append(row)
    forward = batch.forward
    for tensor, wanted, dtype in [
        (forward.input_ids, input_ids, torch.int64),
        (forward.positions, positions, torch.int64),
        (forward.slot_mapping, slots, torch.int64),
        (forward.query_start, query_start, torch.int32),
        (forward.context_len, [start + length for _, _, start, length, _ in described], None),
        (forward.logit_rows, logit_rows, torch.int64),
    ]:
        assert tensor.tolist() == wanted
        assert tensor.dtype == (dtype or torch.int32)
    assert batch.rows.tolist() == [row for row, *_ in described]
    assert batch.sampled_rows.tolist() == sampled
    assert forward.lengths == [length for *_, length, _ in described]
    assert forward.context_lens == forward.context_len.tolist()
    for index, (*_, blocks) in enumerate(described):
        assert forward.block_table[index, : len(blocks)].tolist() == blocks
