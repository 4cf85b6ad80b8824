"""Figures of rows: intervals with known values, failures that count, nothing dropped."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.measure.kinds import compute
from penstock.measure.quality.figures import mean_figure, task_figures, units_of
from penstock.measure.quality.tasks import ScoreFacts, TaskFacts
from penstock.measure.records import Mark, Request
from penstock.measure.run import new_header

sys.path.insert(0, str(Path(__file__).parent))

from quality_fakes import Fake

FACTS = TaskFacts(
    name="t", main_score="s", scores={"s": ScoreFacts()}, random_baseline=0.5, data_hash="x"
)


def row(item: Any, score: float | None, **more: Any) -> Request:
    """An answered row, or one that failed."""
    scores = {} if score is None else {"s": score}
    more.setdefault("error_class", "http_500" if score is None else None)
    details = more.pop("details", {})
    return Request(
        arm="fake",
        task="t",
        prompt_id=str(item),
        scores=scores,
        output="x",
        details=details,
        **more,
    )


def figure(rows: list[Request], **facts: Any) -> dict[str, Any]:
    return mean_figure("s", ScoreFacts(**facts), units_of(rows))


def test_a_share_has_the_interval_of_wilson() -> None:
    """99 of 100 is 94.5 to 99.8 %, and 8 of 10 is 49.0 to 94.3 %."""
    most = figure([row(n, float(n > 0)) for n in range(100)])
    assert (most["value"], most["method"]) == (0.99, "Wilson")
    assert (most["low"], most["high"]) == pytest.approx((0.9455, 0.9982), abs=5e-5)
    few = figure([row(n, float(n > 1)) for n in range(10)])
    assert (few["low"], few["high"]) == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_all_or_none_right_has_the_rule_of_three() -> None:
    none = figure([row(n, 0.0) for n in range(300)])
    assert (none["value"], none["low"], none["method"]) == (0, 0, "rule of three")
    assert none["high"] == pytest.approx(3 / 300, rel=0.01)
    every = figure([row(n, 1.0) for n in range(300)])
    assert (every["low"], every["high"]) == (pytest.approx(1 - none["high"]), 1)


def test_a_mean_has_students_interval() -> None:
    """1, 2, 3, 4: mean 2.5, SD 1.29099, t(3) = 3.18245: 2.5 ± 2.0543."""
    got = figure([row(n, n + 1.0) for n in range(4)])
    assert got["method"] == "mean ± t·SE"
    assert (got["low"], got["high"]) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)


def test_errors_are_clustered_by_group() -> None:
    """Four groups of four equal items know as much as four items."""
    one = [row(n, float(n)) for n in range(4)]
    many = [
        row(f"{n}/{k}", float(n), details={"group": f"g{n}"}) for n in range(4) for k in range(4)
    ]
    single, clustered = figure(one), figure(many)
    assert clustered["standard_error"] == pytest.approx(single["standard_error"])
    assert (clustered["low"], clustered["high"]) == pytest.approx((single["low"], single["high"]))
    assert (clustered["num_items"], clustered["num_groups"]) == (16, 4)
    shares = [
        row(f"{n}/{k}", float(n > 4), details={"group": f"g{n}"})
        for n in range(20)
        for k in range(5)
    ]
    wide, narrow = figure(shares), figure([row(n, float(n > 24)) for n in range(100)])
    assert wide["value"] == narrow["value"] == 0.75
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_few_groups_have_students_quantile() -> None:
    """What holds for 5 groups of 20 dependent items: at least 92 % of the intervals."""
    rng = random.Random(0)
    held = 0
    for _ in range(300):
        shares = [rng.betavariate(1.2, 1.2) for _ in range(5)]
        rows = [
            row(f"{g}/{n}", float(rng.random() < p), details={"group": str(g)})
            for g, p in enumerate(shares)
            for n in range(20)
        ]
        got = figure(rows)
        held += got["low"] <= 0.5 <= got["high"]
    assert held >= 0.92 * 300


def test_shares_of_parts_and_of_repeats_keep_an_interval_near_all_right() -> None:
    every = figure([row(n, 1.0, details={"w": 2}) for n in range(20)], weight="w")
    assert (every["method"], every["high"]) == ("rule of three", 1)
    assert every["low"] < 0.87
    parts = [row(n, 0.5 if n == 0 else 1.0, details={"w": 2}) for n in range(20)]
    repeats = [
        row(n, float((n, k) != (0, 0)), details={"repeat": k}) for n in range(20) for k in range(2)
    ]
    for got in (figure(parts, weight="w"), figure(repeats)):
        assert got["value"] == pytest.approx(39 / 40)
        assert got["method"].startswith("Wilson")
        assert 0.83 < got["low"] < 0.90
        assert got["high"] < 1


def test_repeats_are_of_one_item() -> None:
    rows = [
        row(item, float(item > repeat), details={"repeat": repeat})
        for item in range(4)
        for repeat in range(2)
    ]
    got = figure(rows)
    assert (got["num_items"], got["value"]) == (4, pytest.approx(5 / 8))


def test_weights_make_a_share_of_parts() -> None:
    """One of one and one of four instructions: 2 of 5."""
    rows = [row(1, 1.0, details={"w": 1}), row(2, 0.25, details={"w": 4})]
    assert figure(rows, weight="w")["value"] == pytest.approx(0.4)


def test_a_failure_counts_as_wrong_and_is_told() -> None:
    rows = [*(row(n, 1.0) for n in range(6)), *(row(n, None) for n in range(6, 8))]
    rows += [row(8, None, error_class="cut"), row(9, 0.0, finish_reason="length")]
    rows[0].output, rows[1].output = " ", None  # nothing written; a scored continuation
    got = task_figures(FACTS, rows)
    assert got["scores"]["s"]["value"] == pytest.approx(6 / 9)
    assert got["scores"]["s"]["num_failed"] == 2
    assert got["of_answered"] == pytest.approx(6 / 7)
    assert (got["errors"], got["num_cut"]) == ({"http_500": 2}, 1)
    assert (got["num_empty"], got["num_truncated"]) == (1, 1)
    failed = task_figures(FACTS, [row(n, None) for n in range(5)])
    assert failed["scores"]["s"]["value"] == 0


def test_chance_is_beaten_only_by_the_whole_interval() -> None:
    def above(share: float) -> Any:
        rows = [row(n, float(n < 100 * share)) for n in range(100)]
        return task_figures(FACTS, rows)["above_chance"]

    assert (above(0.65), above(0.55), above(0.3)) == (True, False, False)


def test_a_run_that_ended_early_or_failed_is_not_valid() -> None:
    arm = Fake(lambda ask: "").arm
    facts = {
        "name": "t", "main_score": "s", "scores": {"s": {}}, "data_hash": "x", "num_items": 4,
    }  # fmt: skip
    header = new_header("eval", settings={"tasks": {"t": facts}, "repeats": {"t": 2}}, arms=[arm])
    whole = [row(n, 1.0) for n in range(4) for _ in range(2)]
    assert compute(header, whole)[1] == []
    assert "1 of 8 answers are missing" in compute(header, whole[:-1])[1][0]
    failed = [*whole[:-1], row(3, None)]
    assert "1 of 8 requests failed" in compute(header, failed)[1][0]
    judge = {"judge": {"min_kappa": 0.4, "max_flips": 1, "max_unreadable": 1}}
    judging = Mark(t_ns=0, name="judging", facts={"num_requests": 4})
    told = {"kind": "rubric", "of": "fake", "of_task": "t", "item": "1", "num_characters": [1]}
    verdict = Request(arm="j", task="judge", prompt_id="1", details=told | {"verdict": "abstain"})
    lost = Request(arm="j", task="judge", prompt_id="2", details=told, error_class="timeout")
    judged = new_header("eval", settings=judge, arms=[])
    found = compute(judged, [judging, verdict, verdict, lost])[1]
    assert "1 of 4 verdicts are missing" in found[0]
    assert "1 of 3 requests failed" in found[1]
    mark = Mark(t_ns=0, name="problem", facts={"message": "Prompts were cut."})
    assert compute(header, [*whole, mark])[1] == ["Prompts were cut."]


def test_categories_and_corpus_scores_come_of_the_rows() -> None:
    facts = TaskFacts(
        name="t",
        main_score="s",
        scores={"s": ScoreFacts(), "c": ScoreFacts(how="corpus", metric={"name": "chrf"})},
        data_hash="x",
    )
    rows = [
        row(n, float(n % 2), details={"category": "ab"[n % 2], "references": ["x"]})
        for n in range(4)
    ]
    got = task_figures(facts, rows)
    assert {name: one["value"] for name, one in got["categories"].items()} == {"a": 0, "b": 1}
    assert got["scores"]["c"]["value"] == 1
    assert "nrefs:1" in got["scores"]["c"]["signature"]
    rows[0].output = None
    assert task_figures(facts, rows)["scores"]["c"]["value"] < 1


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 5)), min_size=2, max_size=30
    ),
    st.randoms(use_true_random=False),
)
def test_figures_do_not_depend_on_order_and_hold_their_mean(
    told: list[tuple[float, int]], rng: random.Random
) -> None:
    rows = [row(n, score, details={"group": f"g{g}"}) for n, (score, g) in enumerate(told)]
    got = figure(rows)
    rng.shuffle(rows)
    again = figure(rows)
    assert got["value"] == pytest.approx(again["value"])
    if got["low"] is not None:
        assert 0 <= got["low"] <= got["value"] + 1e-9
        assert got["value"] - 1e-9 <= got["high"] <= 1
        assert again["low"] == pytest.approx(got["low"])
