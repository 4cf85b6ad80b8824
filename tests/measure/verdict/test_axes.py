"""Single axes of known numbers: which side a loss is on, what counts, what is divided by what."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from scipy import stats
from tests.measure.verdict import helpers_simulated as simulate
from tests.measure.verdict.helpers_simulated import Truth

from penstock.measure.records import Request
from penstock.measure.verdict import power, resources, speed
from penstock.measure.verdict.figures import Comparison
from penstock.measure.verdict.power import Blocks
from penstock.measure.verdict.resources import Unit
from penstock.measure.verdict.rule import Axis, Rule, overall

# Of six blocks, the variant's value over the base's: 1.03 on average, 1 % apart.
PAIRS = [(2.0, 2.0 * ratio) for ratio in (1.02, 1.03, 1.04, 1.02, 1.03, 1.04)]


def row(begin_s: float, end_s: float, n_out: int, **more: Any) -> Request:
    return Request(
        stage="speed", t_sent_ns=int(begin_s * 1e9), t_done_ns=int(end_s * 1e9), n_out=n_out, **more
    )


def test_looks_are_paid_for_by_either_claim() -> None:
    rule = Rule(num_looks=4)
    assert rule.alpha_not_worse == pytest.approx(0.05 / 4)
    assert rule.split(3) == pytest.approx(0.05 / 12)


def test_min_speedup_is_not_reached_by_an_estimate() -> None:
    axes = {
        "speed": Axis(
            name="speed", verdict="better", metric="", kind="ratio", estimate=1.5, low=1.1
        )
    }
    assert overall(axes, Rule(min_speedup=1.2))[0] == "not worse"
    assert overall(axes, Rule(min_speedup=1.1))[0] == "better"


def test_noise_floor_is_half_the_interval_that_the_noise_gives() -> None:
    t = stats.t.ppf(0.975, 3)
    assert power.noise_floor(0.001, 0.03, Blocks(9, 4)) == pytest.approx(t * 0.03 / 3)
    assert power.noise_floor(-0.2, 0.03, Blocks(9, 4)) == pytest.approx(0.2)
    assert power.noise_floor(0.001, 0.03, Blocks(9, 0)) == 0


@pytest.mark.parametrize("more_is_better", [True, False])
def test_interval_and_bound_are_on_the_scale_that_is_shown(more_is_better: bool) -> None:
    axis = speed.ratio_axis("x", "", PAIRS, [], Rule(), 1, more_is_better=more_is_better)
    assert axis.verdict == ("better" if more_is_better else "worse")
    logs = [math.log(b / a) for a, b in PAIRS]
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (axis.low, axis.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    side: Literal["greater", "less"] = "greater" if more_is_better else "less"
    one_sided = stats.ttest_1samp(logs, 0, alternative=side).confidence_interval(0.95)
    end = one_sided.low if more_is_better else one_sided.high
    assert axis.bound == pytest.approx(math.exp(end))


def test_throughput_counts_whole_answers_and_the_time_of_all() -> None:
    slots = {
        0: [row(0, 2, 10), row(1, 4, 6, error_class="timeout")],
        3: [row(10, 11, 10)],
    }
    assert speed.output_tokens_per_s(slots) == pytest.approx(20 / 5)


def test_energy_is_per_token_that_was_answered() -> None:
    legs: Any = {
        0: {
            role: {slot: [row(slot, slot + 1, 10), row(slot, slot + 1, 5, error_class="eof")]}
            for role, slot in ((0, 0), (1, 1))
        }
    }

    def energy_of(arm: str, span: Any) -> Any:
        return SimpleNamespace(joules_gross=30.0 if arm == "a" else 40.0)

    pairs, table = resources.joules_per_token(legs, ("a", "b"), energy_of)  # type: ignore[arg-type]
    assert pairs == [(3.0, 4.0)]
    assert table == [{"block": 0, "a": 3.0, "b": 4.0}]


def test_what_failed_is_paid_for_and_is_no_success() -> None:
    header, _ = simulate.simulated(Truth(num_items=8), 0)
    common: dict[str, Any] = {"phase": "steady", "task": "sums", "usd": 0.5}
    rows = [
        row(0, 1, 5, details={"role": 0}, scores={"exact_match": 1.0}, **common),
        row(1, 2, 5, details={"role": 0}, scores={"exact_match": 0.0}, **common),
        row(2, 3, 5, details={"role": 0}, error_class="timeout", **common),
        row(3, 4, 5, details={"role": 1}, scores={"exact_match": 1.0}, **common),
        row(4, 4, 5, details={"role": 1}, error_class="cut", **common),
    ]
    nothing: Any = lambda arm, span: SimpleNamespace(joules_gross=None)  # noqa: E731
    ((base, variant),) = resources.units(rows, ("base", "variant"), header, Rule(), nothing)
    assert (base.usd, base.num_success, base.num_asked) == (1.5, 1, 3)
    assert (variant.usd, variant.num_success, variant.num_asked) == (0.5, 1, 1)


def units(noise: float, ratio: float) -> list[tuple[Unit, Unit]]:
    wobble = (1 + noise, 1 - noise) * 4
    return [(Unit(1.0, None, 10, 12, 100), Unit(ratio * one, None, 10, 12, 100)) for one in wobble]


def test_a_dearer_answer_is_a_loss() -> None:
    """1 % dearer, give or take 1.1 %: 2 % is not excluded; with a tenth of the noise it is."""
    unsure = resources.cost_axis(units(0.03, 1.01), 0.0, Rule(), 1)
    assert unsure is not None
    assert unsure.verdict == "cannot tell"
    assert unsure.bound is not None
    assert unsure.bound > (unsure.estimate or 0) > 1
    sure = resources.cost_axis(units(0.003, 1.01), 0.0, Rule(), 1)
    assert sure is not None
    assert sure.verdict == "not worse"
    for ratio, verdict in ((1.2, "worse"), (0.8, "better")):
        axis = resources.cost_axis(units(0.003, ratio), 0.0, Rule(), 1)
        assert axis is not None
        assert axis.verdict == verdict


def test_nothing_right_has_no_cost_and_a_guard_says_so() -> None:
    header, records = simulate.simulated(
        Truth(num_items=40, share_right=1e-9, share_lost=0, share_won=0), 1, Rule(guard=("cost",))
    )
    found = Comparison(header, records).figures()
    assert found["overall"]["verdict"] == "cannot tell"
    assert "cost: cannot tell (guarded, and not known" in found["overall"]["sentence"]
    assert found["cost"]["arms"][0]["usd_per_success"] is None
