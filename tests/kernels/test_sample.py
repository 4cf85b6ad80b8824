"""Tokens of the sampling kernels are those of the definition, worked out in float64.

Sums are rounded in other orders than those of the host's sampler, so that a draw within a rounding
error of an edge may fall beside it: tokens are judged by how far the draw is from their share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.sampling.helpers_oracle import Row, oracle_uniform, random_logits

from penstock.kernels import sample as module
from penstock.kernels.op import forced, triton_problem
from penstock.kernels.sample import sample
from penstock.types import SamplingParams

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason="none")
MODES = [
    pytest.param("triton", marks=needs_triton),
    "reference",
]
ROUNDING = 2e-6  # of a share of the mass
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_p": 0.5},
    {"temperature": 1.0},
    {"temperature": 0.3, "min_p": 0.3, "top_k": 400},
    {"top_k": 1},
    {"temperature": 1.7, "top_k": 40},
    {"top_p": 0.3},
    {"temperature": 1.5, "top_p": 0.97},
    {"min_p": 0.2},
    {"min_p": 0.1, "top_p": 0.6},
    {"min_p": 0.01, "top_k": 30, "top_p": 0.9},
    {"min_p": 0.5, "top_k": 30, "top_p": 0.7},
    {"top_k": 10**6, "top_p": 1e-9},
    {"top_k": 200, "top_p": 0.999},
    {"min_p": 1.0},
]


def choose(
    logits: torch.Tensor | NDArray[np.float32],
    rows: list[Row],
    mode: str,
    device: torch.device,
    num_searches: int | None = 2,
) -> list[int]:
    """The op's tokens for `rows`, whose settings lie in the opposite order."""
    x = torch.as_tensor(logits).to(device)
    params = [row.params for row in reversed(rows)]
    settings = [
        torch.tensor([getattr(one, name) for one in params], dtype=dtype, device=device)
        for name, dtype in (
            ("temperature", torch.float32),
            ("top_k", torch.int32),
            ("top_p", torch.float32),
            ("min_p", torch.float32),
        )
    ]
    seeds = torch.tensor([row.seed for row in reversed(rows)], device=device)
    places = torch.arange(len(rows) - 1, -1, -1, dtype=torch.int32, device=device)
    positions = torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32)
    out = torch.full((len(rows),), -1, dtype=torch.int32, device=device)
    with forced(mode):
        positions = positions.to(device)
        sample(x, places, positions, *settings, seeds, out, num_searches=num_searches)
    found: list[int] = out.tolist()
    return found


def distance(logits: NDArray[np.float32], row: Row, token_id: int) -> float:
    """How far the row's draw is from the token's share of the mass, in float64; ties stay in."""
    params = row.params
    if params.greedy or not np.isfinite(logits.max()):
        return float(token_id != logits.argmax())
    w = np.exp((logits.astype(np.float64) - logits.max()) / np.float32(params.temperature))
    return min(_distance(w, row, token_id, slack) for slack in (0.0, -1e-6, 1e-6))


def _distance(w: NDArray[np.float64], row: Row, token_id: int, slack: float) -> float:
    """With every limit moved by a share of itself, because it is rounded as well."""
    params = row.params
    ordered = np.sort(w)[::-1]
    limit = float(np.float32(params.min_p)) * (1 + slack)
    if 0 < params.top_k < len(w):
        limit = max(limit, ordered[params.top_k - 1] * (1 - 1e-7))
    if params.top_p < 1:
        mass = np.cumsum(ordered * (ordered >= limit))
        place = np.searchsorted(mass, mass[-1] * np.float32(params.top_p) * (1 + slack))
        limit = max(limit, ordered[min(place, len(w) - 1)] * (1 - 1e-7))
    kept = w * (w >= limit)
    if not kept[token_id] > 0:
        return 1.0
    ends = np.cumsum(kept) / kept.sum()
    draw = oracle_uniform(row.seed, len(row.token_ids))
    start = ends[token_id - 1] if token_id else 0.0
    return max(start - draw, draw - ends[token_id], 0.0)


def rows_of(seed: int, num_rows: int, settings: list[dict[str, Any]] = SETTINGS) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        Row(
            SamplingParams(**settings[i % len(settings)]),
            token_ids=(0,) * int(rng.integers(1, 50)),
            seed=int(rng.integers(-(2**63), 2**63 - 1)),
        )
        for i in range(num_rows)
    ]


def assert_drawn(logits: NDArray[np.float32], rows: list[Row], token_ids: list[int]) -> None:
    for one, row, token_id in zip(logits, rows, token_ids, strict=True):
        assert 0 <= token_id < len(one)
        assert distance(one, row, token_id) < ROUNDING, row.params


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("vocab_size", "scale"), [(700, 0.3), (650, 4.0)])
def test_every_setting_is_drawn_by_the_definition(
    mode: str, vocab_size: int, scale: float, device: torch.device
) -> None:
    logits = random_logits(vocab_size, len(SETTINGS), vocab_size, scale)
    rows = rows_of(1, len(SETTINGS))
    assert_drawn(logits, rows, choose(logits, rows, mode, device))


@settings(max_examples=150)
@given(
    vocab_size=st.sampled_from([1, 2, 33, 128, 1000]),
    scale=st.sampled_from([0.01, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 10_000),
    excluded=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_the_reference_is_drawn_by_the_definition(
    vocab_size: int, scale: float, seed: int, excluded: float
) -> None:
    logits = torch.from_numpy(random_logits(seed, 12, vocab_size, scale)).bfloat16()  # ties
    generator = torch.Generator().manual_seed(seed)
    logits[torch.rand(logits.shape, generator=generator) < excluded] = -torch.inf
    rows = rows_of(seed, 12)
    found = choose(logits, rows, "reference", torch.device("cpu"))
    assert_drawn(logits.float().numpy(), rows, found)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("triton", {}, marks=needs_triton),  # nothing to search: in few programs
        ("reference", {"top_p": 0.9}),
    ],
)
def test_a_large_flat_vocabulary_in_bfloat16_with_a_row_stride(
    mode: str, options: dict[str, Any], device: torch.device
) -> None:
    vocab_size = 152_064
    logits = torch.randn(2, vocab_size + 64, generator=torch.Generator().manual_seed(0))
    logits = logits.mul_(0.01).bfloat16()[1:, :vocab_size]
    rows = rows_of(2, 1, [options])
    found = choose(logits, rows, mode, device, num_searches=len(options))
    assert_drawn(logits.float().numpy(), rows, found)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_is_the_same_alone_and_among_others(mode: str, device: torch.device) -> None:
    logits = torch.from_numpy(random_logits(3, 3, 4500, 0.1)).half()
    rows = rows_of(4, 3, [{"top_k": 900, "top_p": 0.9}, {}, {"top_p": 0.5}])
    together = choose(logits, rows, mode, device)
    assert_drawn(logits.float().numpy(), rows, together)
    for i, num_searches in enumerate((2, 0, 1)):
        assert choose(logits[i : i + 1], rows[i : i + 1], mode, device, num_searches) == [
            together[i]
        ]


@pytest.mark.parametrize("mode", MODES)
def test_the_random_number_is_the_hosts(mode: str, device: torch.device) -> None:
    """Of equal logits, the token is the number's first bits."""
    rows = rows_of(5, 8, [{}])
    rows += [Row(SamplingParams(), (), seed=seed) for seed in (0, -1, 2**63 - 1, -(2**63))]
    found = choose(torch.zeros(len(rows), 4096), rows, mode, device, num_searches=0)
    assert found == [int(4096 * oracle_uniform(row.seed, len(row.token_ids))) for row in rows]


def seed_of(draw: float) -> int:
    """The seed whose number at position 0 is `draw`: SplitMix64 can be turned back."""
    mask = 2**64 - 1

    def unmixed(x: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            bits = x
            for _ in range(64 // shift):
                bits = x ^ (bits >> shift)
            x = bits * pow(factor, -1, 2**64) & mask
        return x

    bits = int(draw * 2**52) << 12
    seed = unmixed((unmixed(bits) - 0x9E3779B97F4A7C15) & mask)
    assert oracle_uniform(seed, 0) == draw
    return seed - 2**64 if seed >= 2**63 else seed


def rows_at(draws: list[float], options: dict[str, Any]) -> list[Row]:
    params = SamplingParams(**options)
    return [Row(params, (), seed=seed_of(draw)) for draw in draws]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 17}, {"min_p": 0.05}])
def test_draws_at_the_edges_give_the_first_and_the_last_token_that_stays(
    mode: str, options: dict[str, Any], device: torch.device
) -> None:
    """So nothing of weight 0 is drawn."""
    logits = random_logits(6, 1, 40, 1.0)
    logits[:, [0, 1, 38, 39]] = -np.inf
    weights = np.exp(logits[0] - logits[0].max(), dtype=np.float64)
    rows = rows_at([0.0, 1 - 2.0**-52], options)
    kept = [i for i in range(40) if _distance(weights, rows[0], i, 0.0) < 1]
    assert 4 < len(kept) < 40
    found = choose(logits.repeat(2, axis=0), rows, mode, device, num_searches=1)
    assert found == [kept[0], kept[-1]]


@pytest.mark.parametrize("mode", MODES)
def test_a_share_holds_its_start_and_not_its_end(mode: str, device: torch.device) -> None:
    """Four equals, two of them in the second chunk, and draws that meet where they meet."""
    logits = torch.full((5, 6000), -torch.inf)
    logits[:, [3, 9, 4500, 5999]] = 1.0
    rows = rows_at([0.0, 0.25, 0.5, 0.5 - 2.0**-52, 0.75], {})
    found = choose(logits, rows, mode, device, num_searches=0)
    assert found == [3, 9, 4500, 9, 5999]


@pytest.mark.parametrize("mode", MODES)
def test_what_reaches_top_p_exactly_is_enough(mode: str, device: torch.device) -> None:
    """Weights 1, 1/2, 1/2: the first is half of them."""
    logits = torch.tensor([[-0.6931472, 0.0, -0.6931472]])
    rows = rows_at([1 - 2.0**-52], {"top_p": 0.5})
    assert choose(logits, rows, mode, device, num_searches=1) == [1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"min_p": 0.05}, {"top_k": 2}])
def test_top_p_is_a_share_of_what_the_others_leave(
    mode: str, options: dict[str, Any], device: torch.device
) -> None:
    """Two likely tokens above a flat tail, which has more than half of the mass."""
    logits = torch.tensor([[1.0, 0.9, *[0.02] * 100]]).log()
    rows = rows_at([1 - 2.0**-52], {"top_p": 0.5, **options})
    assert choose(logits, rows, mode, device) == [0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}])
def test_rows_without_a_distribution_give_the_largest(
    mode: str, options: dict[str, Any], device: torch.device
) -> None:
    logits = random_logits(7, 6, 50, 1.0)
    logits[0, [9, 7]] = np.inf, np.nan
    logits[1] = -np.inf
    logits[2, [12, 30]] = np.inf
    logits[3, [4, 8]] = np.nan
    logits[4] = -np.inf
    logits[4, 5] = -1e30
    rows = rows_of(8, 6, [options])
    found = choose(logits, rows, mode, device)
    assert found[:5] == [7, 0, 12, 4, 5]
    assert found[5:] == choose(logits[5:], rows[5:], mode, device)


@pytest.mark.parametrize("num_searches", [0, None])
@pytest.mark.parametrize("mode", MODES)
def test_greedy_gives_the_lowest_of_equals(
    mode: str, num_searches: int | None, device: torch.device
) -> None:
    logits = torch.full((3, 9000), -2.0)
    logits[0, [8999, 4500, 4096]] = -1.0
    logits[1] = torch.tensor([-1.0, -0.0, 0.0]).repeat(3000)
    rows = rows_of(9, 3, [{"temperature": 0.0}])
    assert choose(logits, rows, mode, device, num_searches) == [4096, 1, 0]


@needs_triton
def test_greedy_rows_take_two_launches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    class Kernel:
        """In place of a kernel: notes its launch."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launched.append(self.name)

    for name in ("_best_kernel", "measure_kernel", "_mass_kernel", "_draw_kernel"):
        monkeypatch.setattr(module, name, Kernel(name))
    choose(torch.zeros(1, 50), rows_of(9, 1, [{"temperature": 0.0}]), "triton", device, None)
    assert launched == ["_best_kernel", "_draw_kernel"]


@pytest.mark.parametrize(
    ("mode", "num_draws", "options"),
    [
        pytest.param("triton", 150, {}, marks=needs_triton),
        ("reference", 20_000, {"temperature": 1.3}),
        ("reference", 20_000, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}),
    ],
)
def test_the_frequencies_are_those_of_the_distribution(
    mode: str, num_draws: int, options: dict[str, Any], device: torch.device
) -> None:
    """Chi-squared, with seeds side by side, as servers count them."""
    params = SamplingParams(**options)
    logits = random_logits(10, 1, 7 if num_draws < 1000 else 40, 0.7)
    rows = [Row(params, seed=seed) for seed in range(num_draws)]
    tiled = torch.from_numpy(logits).expand(num_draws, -1)
    counts = np.bincount(choose(tiled, rows, mode, device, 2 if options else 0))
    counts = np.pad(counts, (0, logits.shape[1] - len(counts)))
    p = np.exp(logits[0].astype(np.float64) / np.float32(params.temperature))
    p[[_distance(p / p.max(), rows[0], i, 0.0) == 1 for i in range(len(p))]] = 0
    expected = num_draws * p / p.sum()
    assert not counts[p == 0].any()
    left = p > 0
    chi2 = ((counts - expected)[left] ** 2 / expected[left]).sum()
    degrees = left.sum() - 1
    assert degrees > 4
    assert chi2 < degrees + 4.5 * np.sqrt(2 * degrees)
