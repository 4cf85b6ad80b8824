"""From rows to verdicts, on comparisons whose truth is known: how often it errs, what it finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.measure.verdict import helpers_simulated as simulate
from tests.measure.verdict.helpers_simulated import Truth

from penstock.measure.records import Request, Sample
from penstock.measure.verdict import power, speed
from penstock.measure.verdict.figures import Comparison, sentence
from penstock.measure.verdict.power import Blocks
from penstock.measure.verdict.rule import Axis, Rule, Verdict, judge, overall, words

NUM = 200
NUM_AXES = 4  # quality, speed, energy, cost
DEGRADED = Truth(
    num_items=400, share_lost=0.035, share_won=0.005, slower=math.log(1.05), leg_sd=0.035
)


def test_the_same_arm_twice_is_seldom_told_apart() -> None:
    """At most 5 % of comparisons of an arm with itself claim any difference, on any axis."""
    num_false = 0
    for seed in range(NUM):
        verdict, axes = simulate.judged(Truth(leg_sd=0.03, num_items=240), seed)
        claims = [axis for axis in axes.values() if axis.verdict in ("better", "worse")]
        num_false += bool(claims)
        assert verdict not in ("better", "worse") or claims
        assert len(axes) == NUM_AXES + 1
    assert num_false <= 0.05 * NUM


def test_a_degraded_arm_is_found_as_often_as_predicted() -> None:
    """3 % of the items lost on balance and 5 % slower, with the tool's own powers."""
    found = {"quality": 0, "speed": 0}
    for seed in range(NUM):
        verdict, axes = simulate.judged(DEGRADED, 10_000 + seed)
        for name in found:
            assert axes[name].verdict != "better"
            found[name] += axes[name].verdict == "worse"
        worse = {axes[name].verdict for name in found} & {"worse"}
        assert (verdict == "worse") == bool(worse)
    rule = Rule()
    predicted = {
        "quality": power.quality_power(400, 0.035, 0.005, rule, NUM_AXES)["worse"],
        "speed": power.speed_power(
            -DEGRADED.slower, spread_of_blocks(DEGRADED), Blocks(6, 4), rule, NUM_AXES
        )["worse"],
    }
    for name, share in predicted.items():
        assert 0.4 < share < 0.99  # else a comparison of powers would show nothing
        error = math.sqrt(share * (1 - share) / NUM)
        assert abs(found[name] / NUM - share) < 3 * error, (name, found[name], share)


def spread_of_blocks(truth: Truth) -> float:
    """What the base against itself shows, as a long run of noise blocks would."""
    long = replace(truth, num_items=20, noise_blocks=400, blocks=2)
    header, records = simulate.simulated(long, 77)
    made = Comparison(header, records)
    return float(
        speed.effects(speed.pairs_of(made.noise, made.metric), more_is_better=True).std(ddof=1)
    )


def test_a_faster_arm_is_better_and_a_smaller_one_is_seen() -> None:
    truth = Truth(num_items=2_000, slower=math.log(1 / 1.5), memory_ratio=0.6)
    verdict, axes = simulate.judged(truth, 4)
    assert verdict == "better"
    assert axes["speed"].verdict == "better"
    assert axes["speed"].low is not None
    assert axes["speed"].low < 1.5 < (axes["speed"].high or 0)
    assert axes["memory"].verdict == "better"
    assert axes["memory"].estimate == pytest.approx(0.6)
    assert axes["cost"].estimate == pytest.approx(1 / 1.5, rel=0.05)


def test_an_arm_that_grows_with_what_it_is_asked_is_not_beaten_by_itself() -> None:
    """The base is asked again and runs against itself: brook once was 14 % less than brook."""
    header, records = simulate.simulated(Truth(num_items=60), 4)
    size = {simulate.BASE: 1e9, simulate.VARIANT: 1e9}
    for one in records:
        if isinstance(one, Request):
            size[one.arm] *= 1.0015
        elif isinstance(one, Sample):
            one.values["rss_bytes"] = size[one.arm]
    made = Comparison(header, records)
    whole = [peak.total_bytes or 0.0 for peak in made.peaks]
    assert whole[1] < 0.88 * whole[0]
    assert made.axes()["memory"].verdict == "cannot tell"
    assert made.axes()["memory"].estimate == pytest.approx(1.0, abs=0.01)


def test_min_speedup_is_needed_at_the_lower_end() -> None:
    truth = Truth(num_items=2_000, slower=math.log(1 / 1.5))
    assert simulate.judged(truth, 4, Rule(min_speedup=1.2))[0] == "better"
    assert simulate.judged(truth, 4, Rule(min_speedup=1.6))[0] == "not worse"


def test_speed_is_guarded_only_if_it_is_asked_for() -> None:
    truth = Truth(num_items=3_000, slower=math.log(1.2))
    assert simulate.judged(truth, 1)[0] == "worse"
    assert simulate.judged(truth, 1, Rule(guard=("quality",)))[0] == "not worse"


def test_nothing_below_the_noise_floor_is_believed() -> None:
    # The base is 10 % off against itself; 5 % is then no difference, however narrow its interval.
    assert judge(-0.05, True, -0.06, 0.02, floor=0.10) == 0
    assert judge(-0.05, True, -0.06, 0.02, floor=0.01) == 1
    # A loss within the margin cannot be shown either where the floor is above it.
    assert judge(0.0, False, -0.01, 0.02, floor=0.03) == 0
    assert judge(0.0, False, -0.01, 0.02, floor=0.0) == 2


def test_a_certain_loss_within_the_margin_is_not_worse() -> None:
    assert judge(-0.005, True, -0.008, 0.01) == 2
    assert judge(-0.02, True, -0.03, 0.01) == 1


def test_what_is_missing_is_about_enough() -> None:
    """Where it cannot tell, the same truth with so many more blocks can, mostly."""
    truth = Truth(num_items=20, leg_sd=0.04, noise_blocks=8, slower=0.03)
    wanted = []
    for seed in range(30):
        axis = simulate.judged(truth, seed)[1]["speed"]
        if axis.verdict == "cannot tell":
            assert axis.num_more is not None
            assert axis.unit == "blocks"
            wanted.append(truth.blocks + axis.num_more)
    assert len(wanted) > 10
    enough = replace(truth, blocks=int(np.median(wanted)), noise_blocks=int(np.median(wanted)))
    told = [simulate.judged(enough, 100 + seed)[1]["speed"].verdict for seed in range(20)]
    assert sum(verdict != "cannot tell" for verdict in told) >= 10


def test_a_biased_machine_says_that_more_would_not_help() -> None:
    header, records = simulate.simulated(Truth(leg_sd=0.002), 3)
    made = Comparison(header, records)
    rows = [row for row in made.rows if row.stage == "noise" and row.details["role"] == 1]
    for row in rows:  # the second half of every pair of the base takes 20 % longer
        for name in ("t_first_ns", "t_last_ns", "t_done_ns"):
            setattr(row, name, row.t_sent_ns + int(1.2 * (getattr(row, name) - row.t_sent_ns)))
    biased = Comparison(header, records)
    axis = biased.axes()["speed"]
    assert axis.verdict == "cannot tell"
    assert axis.num_more is None
    assert any("differs from itself" in problem for problem in biased.problems())


def axis(name: str, verdict: Verdict) -> Axis:
    return Axis(name=name, verdict=verdict, metric="", kind="ratio")


@pytest.mark.parametrize(
    ("quality", "fast", "memory", "expected"),
    [
        ("worse", "better", "better", "worse"),
        ("cannot tell", "worse", "better", "worse"),
        ("cannot tell", "better", "better", "cannot tell"),
        ("not worse", "not worse", "better", "better"),
        ("not worse", "not worse", "worse", "not worse"),
        ("better", "not worse", "not worse", "better"),
        ("not worse", "better", "worse", "not worse"),  # a trade is no gain
    ],
)
def test_overall(quality: Verdict, fast: Verdict, memory: Verdict, expected: Verdict) -> None:
    axes = {"quality": quality, "speed": fast, "memory": memory}
    made = {name: axis(name, verdict) for name, verdict in axes.items()}
    assert overall(made, Rule())[0] == expected


def test_what_is_worse_unguarded_is_in_the_first_words() -> None:
    axes = {
        "quality": axis("quality", "not worse"),
        "speed": axis("speed", "better"),
        "cost": axis("cost", "worse"),
    }
    verdict, because = overall(axes, Rule())
    told = sentence(verdict, because, axes, ("a", "b"))
    assert told.startswith("`b` is not worse than `a` (quality and speed), but worse in cost:")


@pytest.mark.parametrize("name", ["quality", "energy", "cost", "memory"])
def test_a_guard_that_was_asked_for_and_not_measured_cannot_be_told(name: str) -> None:
    """A pipeline that guards what nobody could measure must not pass."""
    rule = Rule(guard=(name,), max_drop=10.0)
    header, records = simulate.simulated(Truth(num_items=60), 1, rule)
    header.settings["machine_price"], header.settings["power"] = {}, {}
    header.settings["tasks"]["sums"]["main_score"] = "corpus_bleu"  # none of single answers
    made = Comparison(header, [one for one in records if not isinstance(one, Sample)])
    axes = made.axes()
    assert overall(axes, rule) == ("cannot tell", [name])
    assert axes[name].note
    assert made.num_axes == 1  # speed is still tested, at the level of one axis


def test_answers_of_other_lengths_under_load_are_not_valid() -> None:
    header, records = simulate.simulated(Truth(num_items=20), 1)
    assert Comparison(header, records).problems() == []
    for row in records:
        if isinstance(row, Request) and row.stage == "speed" and row.arm == simulate.VARIANT:
            row.n_out = 24
    assert "not of one length" in "".join(Comparison(header, records).problems())
    for row in records:
        if isinstance(row, Request) and row.stage == "speed" and row.arm == simulate.VARIANT:
            row.n_out, row.count_source = 32, "chunks"
    (problem,) = Comparison(header, records).problems()
    assert "`usage` in `base`, `chunks` in `variant`" in problem


def test_an_axis_that_was_not_measured_is_no_guard() -> None:
    made = {"quality": axis("quality", "not worse")}
    assert overall(made, Rule()) == ("not worse", ["quality"])
    assert overall({}, Rule())[0] == "cannot tell"


def test_the_rule_is_told_with_its_numbers() -> None:
    told = " ".join(words(Rule(max_drop=2, num_looks=3), ["quality", "speed", "memory"], 2))
    assert "99.17 %" in told  # 1 - 0.05 / 2 axes / 3 looks
    assert "2 points" in told
    assert "3 planned looks" in told


def test_in_an_open_loop_speed_is_the_waiting_time_of_the_base_over_that_of_the_variant() -> None:
    header, records = simulate.simulated(Truth(slower=math.log(1.5)), 5)
    header.settings["load"]["request_rate"] = 2.0
    found = Comparison(header, records).axes()["speed"]
    assert found.verdict == "worse"
    assert found.estimate is not None
    assert found.low is not None
    assert found.low < 1 / 1.5 < (found.high or 0)
    assert found.estimate == pytest.approx(1 / 1.5, rel=0.05)
