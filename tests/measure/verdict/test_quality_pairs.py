"""Pairs of answers: which rows belong together, what an error counts, which ones flipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock.errors import ConfigError
from penstock.measure.records import Request
from penstock.measure.verdict import quality
from penstock.measure.verdict.rule import Rule

TASKS = {"sums": {"main_score": "exact_match", "scores": {"exact_match": {}}}}


def answer(number: int, score: float | None, **more: Any) -> Request:
    """A graded row; None: an error."""
    values: dict[str, Any] = {
        "task": "sums",
        "prompt_id": f"item-{number}",
        "prompt_hash": f"hash-{number}",
        "t_done_ns": 1,
        "scores": {} if score is None else {"exact_match": score},
        "error_class": "timeout" if score is None else None,
        "output": None if score is None else f"answer {number} {score:g}",
    }
    return Request(**values | more)


def rows(scores: list[float | None]) -> list[Request]:
    return [answer(number, score) for number, score in enumerate(scores)]


def test_pairs_are_made_by_item_and_repeat_whatever_the_order() -> None:
    base = [answer(n, 1.0, details={"repeat": r}) for r in (0, 1) for n in range(3)]
    variant = [answer(n, float(n != 1), details={"repeat": r}) for n in (2, 0, 1) for r in (1, 0)]
    pairs, notes = quality.pair(base, variant, TASKS)
    assert [one.key for one in pairs] == [
        ("sums", f"item-{n}", r) for r in (0, 1) for n in range(3)
    ]
    assert [one.b - one.a for one in pairs] == [0, -1, 0] * 2
    assert len({one.cluster for one in pairs}) == 3  # repeats of an item depend on one another
    assert notes == []


def test_what_was_not_asked_alike_is_no_pair() -> None:
    other = [*rows([1.0]), answer(1, 1.0, prompt_hash="another template")]
    with pytest.raises(ConfigError, match="`item-1` of `sums` was not asked alike"):
        quality.pair(rows([1.0, 1.0]), other, TASKS)


def test_an_item_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`item-0` of `sums` is there twice"):
        quality.pair(rows([1.0]), [*rows([1.0]), *rows([1.0])], TASKS)


def test_an_error_is_a_wrong_answer_and_is_shown() -> None:
    pairs, _ = quality.pair(rows([1.0, 1.0, 0.0]), rows([1.0, None, None]), TASKS)
    assert [(one.a, one.b) for one in pairs] == [(1, 1), (1, 0), (0, 0)]
    assert quality.summary(pairs, Rule(), 1, 0)["errors"] == {"a": {}, "b": {"timeout": 2}}
    (flip,) = quality.flips(pairs)
    assert (flip["prompt_id"], flip["error_b"], flip["output_b"]) == ("item-1", "timeout", None)


def test_what_was_cut_off_takes_its_pair_with_it() -> None:
    cut = [answer(0, 1.0), answer(1, None, error_class="cut", t_done_ns=None)]
    pairs, notes = quality.pair(rows([1.0, 1.0]), cut, TASKS)
    assert [one.key[1] for one in pairs] == ["item-0"]
    assert notes == ["1 items were answered by one arm only and are left out"]


def test_a_task_without_scores_of_single_answers_is_told_not_paired() -> None:
    pairs, notes = quality.pair(
        [answer(0, 1.0, task="bleu", scores={})],
        [answer(0, 1.0, task="bleu", scores={})],
        {"bleu": {"main_score": "bleu", "scores": {"bleu": {"how": "corpus"}}}},
    )
    assert pairs == []
    assert "bleu" in notes[0]


def test_flips_are_exactly_the_pairs_that_differ_losses_first() -> None:
    base, variant = [1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]
    pairs, _ = quality.pair(rows(base), rows(variant), TASKS)
    found = quality.flips(pairs)
    assert [(one["prompt_id"], one["a"], one["b"]) for one in found] == [
        ("item-0", 1.0, 0.0),
        ("item-4", 1.0, 0.0),
        ("item-3", 0.0, 1.0),
    ]
    assert found[0]["output_a"] == "answer 0 1"
    assert found[0]["output_b"] == "answer 0 0"


def test_right_and_wrong_answers_are_tested_by_mcnemar() -> None:
    base = [1.0] * 20 + [0.0] * 10
    variant = [0.0] * 9 + [1.0] * 11 + [1.0] * 2 + [0.0] * 8
    pairs, _ = quality.pair(rows(base), rows(variant), TASKS)
    tested = quality.test(pairs, Rule(), 1)
    assert (tested.num_lost, tested.num_won, tested.is_table) == (9, 2, True)
    assert tested.p == pytest.approx(0.06543, abs=5e-6)


def test_items_of_one_cluster_do_not_count_as_many() -> None:
    """Three lost clusters of twenty items: sixty lost pairs that look certain, and are not."""
    base = [answer(n, 1.0, details={"group": f"g{n // 20}"}) for n in range(400)]
    lost = [answer(n, float(n >= 60), details={"group": f"g{n // 20}"}) for n in range(400)]
    pairs, _ = quality.pair(base, lost, TASKS)
    tested = quality.test(pairs, Rule(), 1)
    assert not tested.is_table
    assert tested.interval.num_units == 20
    assert tested.p > 0.05
    assert quality.summary(pairs, Rule(), 1, 0)["mcnemar_p"] < 1e-10


def test_no_flip_is_not_certainty() -> None:
    """100 equal answers exclude a loss of 3 points, and not of 1 (Hanley's rule of three)."""
    pairs, _ = quality.pair(rows([1.0] * 100), rows([1.0] * 100), TASKS)
    assert quality.axis(pairs, [], Rule(max_drop=1.0), 1).verdict == "cannot tell"
    axis = quality.axis(pairs, [], Rule(max_drop=3.0), 1)
    assert axis.verdict == "not worse"
    assert axis.bound is not None
    assert -3.0 < axis.bound < -2.0


def test_scores_between_right_and_wrong_are_compared_by_their_means() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200)
    pairs, _ = quality.pair(rows(base.tolist()), rows((base - 0.1).clip(0).tolist()), TASKS)
    axis = quality.axis(pairs, [], Rule(), 1)
    assert axis.verdict == "worse"
    assert axis.estimate == pytest.approx(100 * float(((base - 0.1).clip(0) - base).mean()))
    assert "clustered" in axis.method


def test_holm_over_tasks() -> None:
    tasks = dict.fromkeys(("one", "two"), TASKS["sums"])
    base, variant = [], []
    for name, lost in (("one", 6), ("two", 0)):
        base += [answer(n, 1.0, task=name) for n in range(30)]
        variant += [answer(n, float(n >= lost), task=name) for n in range(30)]
    pairs, _ = quality.pair(base, variant, tasks)
    first, second = quality.by_task(pairs, Rule())
    assert first["p"] == pytest.approx(2 * 0.5**6)
    assert first["p_holm"] == pytest.approx(4 * 0.5**6)
    assert second["p_holm"] == 1.0


def test_what_the_base_does_to_itself_is_no_loss() -> None:
    base = rows([1.0] * 200)
    variant = rows([0.0] * 12 + [1.0] * 188)
    pairs, _ = quality.pair(base, variant, TASKS)
    assert quality.axis(pairs, [], Rule(), 1).verdict == "worse"
    repeats, _ = quality.pair(base, rows([0.0] * 12 + [1.0] * 188), TASKS)
    assert quality.axis(pairs, repeats, Rule(), 1).verdict == "cannot tell"
    assert quality.nondeterminism(repeats)["num_flips"] == 12


def test_what_is_missing_knows_the_noise_floor() -> None:
    """More items do not help against a base that always loses to itself; else they do."""
    base, variant = rows([1.0] * 200), rows([0.0] * 12 + [1.0] * 188)
    pairs, _ = quality.pair(base, variant, TASKS)
    biased, _ = quality.pair(base, rows([0.0] * 12 + [1.0] * 188), TASKS)
    assert quality.axis(pairs, biased, Rule(), 1).num_more is None
    random = [*[0.0] * 20, *[1.0] * 180], [*[1.0] * 20, *[0.0] * 32, *[1.0] * 148]
    noisy, _ = quality.pair(rows(random[0]), rows(random[1]), TASKS)
    found = quality.axis(pairs, noisy, Rule(), 1)
    assert (found.verdict, found.floor) == ("cannot tell", pytest.approx(6.0))
    assert found.num_more == 1  # a floor of 6 points, and a difference of 6
    pairs, _ = quality.pair(base, rows([0.0] * 6 + [1.0] * 194), TASKS)
    assert 500 < (quality.axis(pairs, noisy, Rule(), 1).num_more or 0) < 700  # (6 / 3)^2 x 200


def test_few_clusters_that_all_lost_are_no_certainty() -> None:
    """Three conversations of four turns: no spread at all, and p is 2 of 8 ways to sign them."""
    base = [answer(n, 1.0, details={"group": f"g{n // 4}"}) for n in range(12)]
    lost = [answer(n, 0.0, details={"group": f"g{n // 4}"}) for n in range(12)]
    pairs, _ = quality.pair(base, lost, TASKS)
    found = quality.axis(pairs, [], Rule(), 1)
    assert found.p == 0.25
    assert found.verdict == "cannot tell"


def test_prompts_without_references_are_not_called_right() -> None:
    pairs, _ = quality.pair(rows([1.0] * 400), rows([1.0] * 400), TASKS)
    assert "not whether it is right" in quality.axis(pairs, [], Rule(), 1, ["non_empty"]).note
    assert quality.axis(pairs, [], Rule(), 1, ["exact_match"]).note == ""
