"""Sampling on the device means what the host's sampler means, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.models.helpers_live import LiveBytes
from tests.sampling.helpers_oracle import (
    EOS,
    FEATURES,
    MAX_LEN,
    Row,
    assert_same_logprobs,
    feature_rows,
    make_state,
    oracle,
    oracle_logprobs,
    random_logits,
)
from tests.sampling.helpers_tripwire import Tripwire, Waits

from penstock.engine.state import DeviceState
from penstock.kernels.op import forced, triton_problem
from penstock.sampling import device as module
from penstock.sampling import host
from penstock.sampling.device import (
    DeviceSampler,
    Sampled,
    prompt_logprobs,
    read_logprobs,
)
from penstock.sampling.shaping import Constraints, constrain
from penstock.types import SamplingParams, TokenLogprobs

CPU = torch.device("cpu")
Outcome = tuple[list[int], dict[int, TokenLogprobs]]


class Setup:
    """A sampler with rows in some places; the newest token is in the device's table alone."""

    def __init__(
        self, rows: list[Row], places: list[int], vocab_size: int, device: torch.device = CPU
    ) -> None:
        self.places = places
        self.state = make_state(rows, places)
        table = torch.from_numpy(self.state.token_ids.astype(np.int32))
        for place in places:  # behind its end is what another request left
            table[place, self.state.num_tokens[place] :] = vocab_size - 1
        self.table = table.to(device)
        last = self.state.num_tokens[places] - 1
        self.state.token_ids[places, last] = 0
        self.num_tokens = torch.from_numpy(self.state.num_tokens[places]).to(device)
        self.rows = torch.tensor(places, dtype=torch.int32, device=device)
        self.sampler = DeviceSampler(len(self.table), vocab_size, EOS, device)
        self.sampler.admit(places, self.state)

    def sample(self, logits: torch.Tensor) -> Sampled:
        return self.sampler.sample(
            logits, self.rows, self.num_tokens, np.array(self.places), self.state, self.table
        )


def outcome(sampled: Sampled) -> Outcome:
    told = sampled.logprobs
    if told is None:
        return sampled.token_ids.tolist(), {}
    found = read_logprobs(told.values.numpy(), told.ks)
    return sampled.token_ids.tolist(), dict(zip(told.rows, found, strict=True))


def run(
    logits: NDArray[np.float32],
    rows: list[Row],
    places: list[int] | None = None,
    mode: str = "reference",
) -> Outcome:
    places = list(range(len(rows))) if places is None else places
    with forced(mode), Tripwire():
        sampled = Setup(rows, places, logits.shape[1]).sample(torch.from_numpy(logits))
    assert sampled.token_ids.dtype == torch.int32
    return outcome(sampled)


def on_host(logits: NDArray[np.float32], rows: list[Row]) -> host.SampleResult:
    return host.sample(logits, np.arange(len(rows)), make_state(rows), EOS)


# --- the tokens ---


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("vocab_size", "scale"), [(13, 2.0), (1000, 0.5)])
def test_every_feature_equals_the_host(name: str, vocab_size: int, scale: float) -> None:
    num_rows = 24
    logits = random_logits(vocab_size, num_rows, vocab_size, scale)
    rows = feature_rows(vocab_size, [name] * num_rows)
    token_ids, logprobs = run(logits, rows)
    expected = on_host(logits, rows)
    for i, (found, wanted) in enumerate(zip(token_ids, expected.token_ids, strict=True)):
        assert found == wanted or oracle(logits[i], rows[i])[1] < 1e-5
    assert (np.array(token_ids) == expected.token_ids).sum() >= num_rows - 1
    assert logprobs.keys() == expected.logprobs.keys()
    for row, told in expected.logprobs.items():
        if token_ids[row] == told.token_id:
            assert_same_logprobs(logprobs[row], told)


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, max_size=8),
    vocab_size=st.sampled_from([12, 128, 300]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 10_000),
)
def test_mixed_batches_equal_the_oracle(
    names: list[str], vocab_size: int, scale: float, seed: int
) -> None:
    logits = random_logits(seed, len(names), vocab_size, scale)
    rows = feature_rows(seed, names)
    token_ids, _ = run(logits, rows)
    for one, row, token_id in zip(logits, rows, token_ids, strict=True):
        expected, margin = oracle(one, row)
        assert margin < 1e-5 or token_id == expected


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, max_size=6),
    seed=st.integers(0, 10_000),
    broken=st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0]), max_size=3),
)
def test_ties_and_rows_without_a_distribution_equal_the_host(
    names: list[str], seed: int, broken: list[float]
) -> None:
    """Logits with few values, so that limits fall on ties; they are the same numbers for both."""
    logits = np.round(random_logits(seed, len(names), 60, 1.0) * 2) / 2
    for place, value in enumerate(broken):
        logits[seed % len(names), (7 * seed + 5 * place) % 60] = value
    logits[(seed + 1) % len(names)] = -np.inf if seed % 5 == 0 else 1.0
    rows = feature_rows(seed, names)
    with np.errstate(invalid="ignore"):
        expected = on_host(logits, rows).token_ids.tolist()
    token_ids, _ = run(logits, rows)
    assert token_ids == expected


@pytest.mark.skipif(triton_problem() is not None, reason=f"{triton_problem()}")
def test_the_kernel_gives_the_same_as_its_reference() -> None:
    rows = feature_rows(11, ["greedy", "top_p_small", "truncations", "everything", "allowed"])
    both = SamplingParams(temperature=2.0, top_k=200, top_p=0.1)
    rows += [Row(both, seed=seed) for seed in range(2)]
    logits = random_logits(11, len(rows), 300, 2.0)
    assert run(logits, rows, mode="triton") == run(logits, rows)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), names=st.lists(st.sampled_from(sorted(FEATURES)), min_size=1))
def test_constrained_logits_are_the_hosts_to_the_last_bit(seed: int, names: list[str]) -> None:
    rows = [
        replace(row, params=replace(row.params, repetition_penalty=1.3)) if seed % 2 else row
        for row in feature_rows(seed, names)
    ]
    logits = random_logits(seed, len(rows), 70, 3.0)
    state = make_state(rows)
    shaped = torch.from_numpy(logits.copy())
    table = torch.from_numpy(state.token_ids.astype(np.int32))
    with Tripwire():
        constraints = Constraints.of(np.arange(len(rows)), state, EOS, 70, CPU)
        constrain(shaped, constraints, table, torch.from_numpy(state.num_tokens))
    for row, one in enumerate(logits):
        host._constrain(one, row, state, EOS)
    assert np.array_equal(shaped.numpy(), logits)


def test_a_row_is_the_same_alone_and_among_33_others(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(FEATURES)
    for vocab_size, scale in ((50, 3.0), (2048, 0.1)):
        logits = random_logits(1, 33, vocab_size, scale)
        logits = logits.astype(np.float16).astype(np.float32)  # many ties
        rows = feature_rows(2, [names[i % len(names)] for i in range(33)])
        rows = [replace(row, params=replace(row.params, logprobs=4)) for row in rows]
        together = run(logits, rows)
        for i, row in enumerate(rows):
            token_ids, logprobs = run(logits[i : i + 1], [row])
            assert token_ids == together[0][i : i + 1]
            assert logprobs[0] == together[1][i]
        shuffled = np.random.default_rng(0).permutation(33)
        monkeypatch.setattr(module, "PIECE", 3 * vocab_size)
        again = run(logits[shuffled], [rows[i] for i in shuffled], shuffled.tolist())
        monkeypatch.undo()
        assert again[0] == [together[0][i] for i in shuffled]
        assert again[1] == together[1]


def test_logits_of_the_models_type_are_not_changed() -> None:
    rows = feature_rows(3, ["plain", "everything", "top_p_large"])
    logits = torch.from_numpy(random_logits(3, 3, 96, 2.0)).bfloat16()
    before = logits.clone()
    with forced("reference"):
        found = outcome(Setup(rows, [4, 0, 2], 90).sample(logits[:, :90]))
    assert torch.equal(logits, before)
    assert found == run(logits[:, :90].float().numpy(), rows, [4, 0, 2])


# --- from step to step ---


def test_rows_follow_their_requests() -> None:
    """The settings of a step are kept for the next; not beyond what they hold for."""
    token = 5
    forced_rows = [
        Row(SamplingParams(allowed_token_ids=(token,))),
        Row(SamplingParams(banned_token_ids=tuple(i for i in range(20) if i != token))),
        Row(SamplingParams(logit_bias={token: 100.0}, temperature=0.0)),
    ]
    logits = torch.zeros(3, 20)
    with forced("reference"):
        setup = Setup(forced_rows, [0, 1, 2], 20)
        for _ in range(2):
            assert setup.sample(logits).token_ids.tolist() == [token] * 3
        setup.state.release(1)
        setup.state.admit(1, [3], 1, SamplingParams(allowed_token_ids=(7,), logprobs=0), 0)
        setup.sampler.admit([1], setup.state)
        assert outcome(setup.sample(logits))[0] == [token, 7, token]
        setup.places = [2, 1, 0]
        setup.rows = setup.rows.flip(0)
        found = setup.sample(logits)
        assert found.token_ids.tolist() == [token, 7, token]
        assert found.logprobs is not None
        assert found.logprobs.rows == [1]


def test_the_length_is_read_in_every_step() -> None:
    """The end is excluded before `min_tokens`, and a token counts as soon as it is in the table."""
    params = SamplingParams(
        temperature=0.0, min_tokens=3, frequency_penalty=2.0, stop_token_ids=(4,)
    )
    logits = torch.zeros(1, 10)
    logits[0, :5] = torch.tensor([3.0, 9.0, 2.5, 0.0, 8.0])  # 1 ends an answer
    with forced("reference"):
        setup = Setup([Row(params, (6, 6), num_prompt=2)], [0], 10)
        setup.table[0, :2] = 6
        found = []
        for _ in range(5):
            token_id = setup.sample(logits).token_ids
            setup.table[0, setup.num_tokens[0]] = token_id
            setup.num_tokens += 1
            setup.state.num_tokens[0] += 1
            found.append(int(token_id))
    assert found == [0, 2, 0, 1, 4]


def test_admission_waits_for_nothing_and_copies_only_its_rows() -> None:
    rows = feature_rows(6, ["hot", "greedy", "truncations"])
    with Tripwire():
        setup = Setup(rows, [1, 3, 4], 30)
        setup.sampler.admit([], setup.state)
    sampler = setup.sampler
    assert sampler._temperature.tolist() == pytest.approx([0, 1.7, 0, 0, 1])
    assert sampler._top_k.tolist() == [0, 0, 0, 0, 30]
    assert sampler._top_p.tolist() == pytest.approx([0, 1, 0, 1, 0.9])
    assert sampler._min_p.tolist() == pytest.approx([0, 0, 0, 0, 0.01])
    assert sampler._seeds[[1, 3, 4]].tolist() == [row.seed for row in rows]


@pytest.mark.parametrize("stride", [50, 64], ids=["alone", "shared by ranks, and so padded"])
def test_a_warm_sampler_has_launched_all_that_rows_may_ask_for(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[torch.dtype, int]] = []

    def record(logits: torch.Tensor, *args: Any, num_searches: int | None) -> None:
        launched.append((logits.dtype, logits.stride(0)))
        searched.append(num_searches)

    searched: list[int | None] = []
    monkeypatch.setattr(module, "sample", record)
    logits = torch.zeros(len(FEATURES), stride, dtype=torch.float16)[:, :50]
    setup = Setup(feature_rows(7, list(FEATURES)), list(range(len(FEATURES))), 50)
    setup.sampler.warm_up(logits)
    warm = set(launched)
    assert searched == [2] * len(launched), "with every kernel that there is"
    launched.clear()
    with forced("reference"):
        setup.sample(logits)
        setup.sample(logits.clone(memory_format=torch.contiguous_format))  # of a graph
    assert len(set(launched)) == 2 + (stride != 50)
    assert set(launched) == warm


def test_no_kernel_searches_where_all_rows_are_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the host alone sees that they are: a temperature that is rounded up."""
    searched: list[int | None] = []
    monkeypatch.setattr(module, "sample", lambda *args, num_searches: searched.append(num_searches))
    almost = np.nextafter(1e-5, 0)
    rows = [Row(SamplingParams(temperature=t, top_k=3)) for t in (0.0, almost, 1e-5)]
    for places in ([0, 1], [0, 1, 2]):
        setup = Setup([rows[i] for i in places], places, 20)
        setup.sample(torch.zeros(len(places), 20))
    assert searched == [None, 1]
    assert setup.sampler._temperature[:3].tolist() == [0, 0, np.float32(1e-5)]


def test_the_masks_of_a_step_are_gone_before_the_next_are_made() -> None:
    rows = [Row(SamplingParams(banned_token_ids=(i,))) for i in range(4)]
    setup, vocab_size = Setup(rows, [0, 1, 2, 3], 10_000), 10_000
    with LiveBytes() as live:
        for places in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3]):
            setup.sampler._step(np.array(places), setup.state)
            assert live.live >= len(places) * 2 * vocab_size, "two masks a row"
    assert live.peak < 1.1 * 4 * 2 * vocab_size


# --- log-probabilities ---


@pytest.mark.parametrize("vocab_size", [7, 128, 3000])
def test_logprobs_are_of_the_raw_logits(vocab_size: int) -> None:
    logits = random_logits(8, 6, vocab_size, 2.0).astype(np.float16).astype(np.float32)
    logits[3] = -1 - np.abs(logits[3])
    logits[3, [1, 3, 4, 6]] = -0.0, 0.0, -0.0, 0.0
    asked = [None, 0, 3, 5, min(1000, vocab_size), 2]
    rows = [
        Row(SamplingParams(temperature=0.5, banned_token_ids=(2,), logprobs=k), seed=i)
        for i, k in enumerate(asked)
    ]
    places = [4, 0, 2, 5, 1, 9]
    token_ids, logprobs = run(logits, rows, places)
    assert sorted(logprobs) == [0, 1, 2, 5, 9]
    for i, (place, k) in enumerate(zip(places, asked, strict=True)):
        if k is not None:
            assert_same_logprobs(logprobs[place], oracle_logprobs(logits[i], token_ids[i], k))


@pytest.mark.parametrize("k", [0, 3])
def test_prompt_logprobs(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 3500)
    logits = random_logits(9, 20, 500, 2.0)
    targets = np.arange(20) * 7
    with Tripwire():
        values = prompt_logprobs(torch.from_numpy(logits), torch.from_numpy(targets), k)
    for found, expected in zip(
        read_logprobs(values.numpy(), [k] * 20),
        host.prompt_logprobs(logits, targets, k),
        strict=True,
    ):
        assert_same_logprobs(found, expected)


def test_a_row_without_a_distribution_has_no_logprob() -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[0, 3] = np.nan
    _, logprobs = run(logits, [Row(SamplingParams(logprobs=1))] * 2)
    assert np.isnan(logprobs[0].logprob)
    assert logprobs[1].logprob == pytest.approx(-np.log(5))


# --- nothing waits ---


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x[0]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.__setitem__(x > 0, x[:3]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_tripwire_trips(wait: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(Waits), Tripwire():
        wait(torch.ones(3))


def test_no_value_is_needed_on_the_host() -> None:
    """On the device `meta` tensors have shapes and no numbers: whoever reads one fails."""
    names = sorted(FEATURES)
    rows = feature_rows(4, names)
    meta = torch.device("meta")
    with forced("reference"), Tripwire():
        setup = Setup(rows, list(range(len(rows))), 200, meta)
        for _ in range(2):
            sampled = setup.sample(torch.zeros(len(rows), 200, device=meta))
    assert sampled.token_ids.shape == (len(rows),)
    assert sampled.logprobs is not None
    assert sampled.logprobs.values.shape == (1, 9)


def test_the_state_is_only_read() -> None:
    rows = feature_rows(5, sorted(FEATURES))
    setup = Setup(rows, list(range(len(rows))), 40)
    before = {
        name: value.copy()
        for name, value in vars(setup.state).items()
        if isinstance(value, np.ndarray)
    }
    with forced("reference"):
        setup.sample(torch.zeros(len(rows), 40))
    assert isinstance(setup.state, DeviceState)
    assert setup.state.max_model_len == MAX_LEN
    for name, value in before.items():
        assert np.array_equal(getattr(setup.state, name), value)
