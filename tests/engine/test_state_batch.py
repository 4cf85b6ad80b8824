"""DeviceState follows plans; build_batch gathers exactly what the plan says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.batch import StepBatch, build_batch, next_batch
from penstock.engine.plan import Admission, Slice, StepPlan
from penstock.engine.state import DeviceState
from penstock.sampling.host import sample
from penstock.sampling.rows import is_constrained
from penstock.types import MAX_INT, SamplingParams

NUM_ROWS, MAX_LEN = 4, 24


def admission(row: int, token_ids: list[int], **params: Any) -> Admission:
    return Admission(row, token_ids, len(token_ids), SamplingParams(**params), seed=7)


def test_a_row_is_taken_grown_written_and_given_up() -> None:
    state = DeviceState(NUM_ROWS, MAX_LEN, block_size=3)
    first = admission(2, [5, 6, 7, 8], temperature=0.5, top_k=3, prompt_logprobs=0)
    state.apply(StepPlan([], [first], [], [(2, [9, 4])]))
    state.append({2: 11})
    state.append({2: 12})
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


# A row that sets only these has its logits drawn from as they are.
PLAIN: dict[str, Any] = {
    "max_tokens": 3,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "stop_token_ids": (3,),
    "ignore_eos": True,
    "seed": 4,
    "prompt_logprobs": 2,
    "logprobs": 0,
    "min_p": 0.1,
    "typical_p": 0.9,
    "n": 2,
    "stop": ("x",),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}
CONSTRAINED: dict[str, Any] = {
    "min_tokens": 1,
    "repetition_penalty": 1.2,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {3: 1.0},
    "allowed_token_ids": (1, 2),
    "banned_token_ids": (4,),
}


def test_constrained_is_known_for_every_parameter() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == set(PLAIN) | set(CONSTRAINED), "a new parameter must be put into one of them"
    assert not is_constrained(SamplingParams(**PLAIN))
    for name, value in CONSTRAINED.items():
        assert is_constrained(SamplingParams(**{name: value})), name


# What `SamplingParams` takes and arrays of 32 bits might not.
EXTREMES: dict[str, list[Any]] = {
    "max_tokens": [1, MAX_INT],
    "min_tokens": [0, MAX_INT],
    "temperature": [0, 5e-324, 1e-5, 100],
    "top_k": [0, MAX_INT],
    "top_p": [5e-324, 1],
    "min_p": [5e-324, 1],
    "typical_p": [5e-324, 1],
    "repetition_penalty": [5e-324, 1e-50, 1e-45, 1e-39, 1e-30, 10],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [{}, {0: 100, 6: -100}],
    "allowed_token_ids": [(2, 6), (2, 2, 6)],
    "banned_token_ids": [(), (0, 1, 3, 4, 5), (5,) * 1000],
    "stop_token_ids": [(), (0, 1, 3, 4, 5), (5,) * 1000],
    "seed": [-(2**63), 2**63 - 1],
    "logprobs": [0, 7],
}


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0, 100.0])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in EXTREMES for value in EXTREMES[name]]
)
def test_extreme_parameters_are_sampled_with(name: str, value: Any, temperature: float) -> None:
    """A token that may be sampled comes out, and NumPy does not warn."""
    common = {"temperature": temperature, "max_tokens": None, "banned_token_ids": (5,)}
    params = SamplingParams(**common | {name: value})
    state = DeviceState(1, MAX_LEN, 4)
    state.apply(StepPlan([], [Admission(0, [1, 2, 5, 5, 6], 3, params, seed=1)], [], []))
    logits = np.linspace(-30, 60, 7, dtype=np.float32)[None]
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        token_id = int(sample(logits, np.array([0]), state, (6,)).token_ids[0])
    assert token_id not in params.banned_token_ids
    assert params.allowed_token_ids is None or token_id in params.allowed_token_ids
    assert token_id != 6 or not params.min_tokens


def test_a_penalty_of_nearly_nothing_excludes_nothing() -> None:
    """What may not be sampled stays so, however small a penalty makes it."""
    params = SamplingParams(
        temperature=0, repetition_penalty=1e-50, allowed_token_ids=(2, 3), banned_token_ids=(3,)
    )
    state = DeviceState(1, MAX_LEN, 4)
    state.apply(StepPlan([], [Admission(0, [0, 1, 3], 3, params, seed=1)], [], []))
    for logits in (
        np.linspace(-1, 1, 5, dtype=np.float32),
        -np.linspace(1, 2, 5, dtype=np.float32),
    ):
        assert sample(logits[None], np.array([0]), state, ()).token_ids.tolist() == [2]


def test_token_ids_become_arrays_when_the_row_is_taken() -> None:
    """A step that made them again would take a second for a million."""
    params = SamplingParams(
        min_tokens=4,
        temperature=0,
        logit_bias={3: 1.0},
        allowed_token_ids=(2, 3, 4),
        banned_token_ids=(3,),
        stop_token_ids=(4,),
    )
    state = DeviceState(1, MAX_LEN, 4)
    state.apply(StepPlan([], [Admission(0, [1], 1, params, seed=1)], [], []))
    for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        object.__setattr__(params, name, (0, 1))  # nobody looks at these again
    for _ in range(3):
        sampled = sample(np.zeros((1, 6), np.float32), np.array([0]), state, (0,))
        assert sampled.token_ids.tolist() == [2]
        state.append({0: int(sampled.token_ids[0])})
    state.apply(StepPlan([], [], [0], []))
    assert state.token_rules[0].allowed is None, "a free row holds no arrays"
    state.apply(StepPlan([], [admission(0, [1], banned_token_ids=(5,))], [], []))
    rules = state.token_rules[0]
    assert rules.allowed is None, "nothing of the request before"
    assert [array.tolist() for array in rules[1:]] == [[5], [], [], []]


def test_memory_is_as_announced() -> None:
    arrays = vars(DeviceState(8, 1000, 16)).values()
    num_bytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    assert num_bytes == pytest.approx(DeviceState.bytes_for(8, 1000, 16), rel=0.01)


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
    slices = [Slice(row, start, length) for row, _, start, length, _ in described]
    batch = build_batch(slices, state)

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
    for array, wanted, dtype in [
        (forward.input_ids, input_ids, np.int64),
        (forward.positions, positions, np.int64),
        (forward.slot_mapping, slots, np.int64),
        (forward.query_start, query_start, np.int32),
        (forward.context_len, [start + length for _, _, start, length, _ in described], None),
        (forward.logit_rows, logit_rows, np.int64),
    ]:
        assert array.tolist() == wanted
        assert array.dtype == (dtype or np.int32)
    assert batch.rows.tolist() == [row for row, *_ in described]
    assert batch.sampled_rows.tolist() == sampled
    assert forward.lengths == [length for *_, length, _ in described]
    assert forward.context_lens == forward.context_len.tolist()
    for index, (*_, blocks) in enumerate(described):
        assert forward.block_table[index, : len(blocks)].tolist() == blocks


def same(ours: StepBatch, wanted: StepBatch) -> None:
    """Equal in all that is read; a block table may be wider, behind the contexts."""
    for batch, other in ((ours.forward, wanted.forward), (ours, wanted)):
        for field in dataclasses.fields(batch):
            if field.name in {"forward", "block_table", "num_ahead"}:
                continue
            left, right = getattr(batch, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert getattr(left, "dtype", None) == getattr(right, "dtype", None), field.name
    for index, end in enumerate(wanted.forward.context_lens):
        num_blocks = -(-end // wanted.forward.block_size)
        left, right = (batch.forward.block_table[index, :num_blocks] for batch in (ours, wanted))
        np.testing.assert_array_equal(left, right)


@given(st.data())
def test_a_batch_that_moved_on_equals_one_built_anew(data: st.DataObject) -> None:
    """Whatever happens between two steps; and it moves on whenever the same rows decode on."""
    block_size = data.draw(st.sampled_from([1, 3, 16]))
    state = DeviceState(NUM_ROWS, MAX_LEN, block_size)
    pool = iter(range(10_000))
    computed: dict[int, int] = {}  # by row in use
    last: StepBatch | None = None
    decoded: list[int] = []  # the rows of `last`, if each was sampled after its one token
    num_ahead = 0
    for _ in range(data.draw(st.integers(1, 12))):
        change = data.draw(st.sampled_from(["none"] * 4 + ["admit", "release", "swap", "fewer"]))
        released = [row for row in computed if change in {"release", "swap"}][:1]
        full = [row for row in computed if state.num_tokens[row] >= MAX_LEN - 1]
        released += [row for row in full if row not in released]
        for row in released:
            del computed[row]
        free = [row for row in range(NUM_ROWS) if row not in computed]
        admitted = []
        for row in free if change in {"admit", "swap"} or not computed else []:
            token_ids = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=9))
            admitted.append(admission(row, token_ids, temperature=data.draw(st.integers(0, 1))))
            computed[row] = 0
        lengths = {a.row: len(a.token_ids) for a in admitted}
        slices, new_blocks = [], []
        for row in list(computed)[change == "fewer" and len(computed) > 1 :]:
            start, end = computed[row], lengths.get(row, int(state.num_tokens[row]))
            length = data.draw(st.integers(1, end - start)) if end - start > 1 else 1
            slices.append(Slice(row, start, length))
            num_held = 0 if row in lengths else int(state.num_blocks[row])
            num_missing = -(-(start + length) // block_size) - num_held
            num_missing += data.draw(st.integers(0, 1)) * (num_held + num_missing < MAX_LEN // 16)
            if num_missing > 0:
                new_blocks.append((row, [next(pool) for _ in range(num_missing)]))
        plan = StepPlan(slices, admitted, released, new_blocks)
        state.apply(plan)
        batch = next_batch(last, plan, state)
        same(batch, build_batch(slices, state))
        rows = [row for row, *_ in slices]
        stays = not admitted and not released and rows == decoded and num_ahead > 0
        assert (batch is last) == stays
        for row, start, length in slices:
            computed[row] = start + length
        state.append({row: data.draw(st.integers(0, 99)) for row in batch.sampled_rows.tolist()})
        num_single = sum(length == 1 for _, _, length in slices)
        decoded = rows if len(batch.sampled_rows) == num_single == len(rows) else []
        last, num_ahead = batch, batch.num_ahead
        if change == "none" and data.draw(st.integers(0, 9)) == 9:
            last, decoded = None, []  # a step that came to no end


def test_a_batch_moves_on_until_its_block_table_is_full() -> None:
    """Then it is built anew, with columns for the next tokens."""
    max_len = 700
    state = DeviceState(1, max_len, 4)
    blocks = list(range(max_len // 4))[::-1]
    state.apply(StepPlan([], [admission(0, [1, 2, 3])], [], [(0, blocks[:1])]))
    last: StepBatch | None = None
    state.apply(StepPlan([], [], [], [(0, blocks[1:])]))
    num_kept = 0
    for position in range(2, max_len - 1):
        plan = StepPlan([Slice(0, position, 1)], [], [], [])
        batch = next_batch(last, plan, state)
        same(batch, build_batch(plan.slices, state))
        num_kept += batch is last
        last = batch
        state.append({0: position % 7})
    assert max_len - 10 < num_kept < max_len - 4
