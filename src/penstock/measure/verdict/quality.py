"""Paired quality: the same items answered by both arms, and which of them flipped.

Pairs are made on (task, prompt_id, repeat) and must have been asked the same thing, which their
prompt_hash says. An error is a wrong answer; what the end of the run cut off is no answer and
takes its pair with it. Pure functions of rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from penstock.errors import ConfigError
from penstock.measure.records import Request
from penstock.measure.verdict import power, statistics
from penstock.measure.verdict.bootstrap import bca_of_mean
from penstock.measure.verdict.rule import VERDICTS, Axis, Rule, judge
from penstock.measure.verdict.statistics import Interval

Key = tuple[str, str, int]
NON_EMPTY = "non_empty"  # the score of prompts that have no reference
UNGRADED = "only whether there is an answer, not whether it is right"
MOST_FLIPS = 500  # that are listed with their texts


class Pair(NamedTuple):
    """An item and both answers; `a` and `b` are main scores, more is better."""

    key: Key
    cluster: tuple[str, str]
    a: float
    b: float
    rows: tuple[Request, Request]


def key_of(row: Request) -> Key:
    """What makes two rows answers to the same item."""
    return row.task, row.prompt_id, int(row.details.get("repeat", 0))


def pair(
    base: Iterable[Request], variant: Iterable[Request], tasks: Mapping[str, Any]
) -> tuple[list[Pair], list[str]]:
    """Pairs in the order of the base's rows, and what was left out.

    Args:
        tasks: by name, the facts of `settings["tasks"]`: `main_score` and `scores`.

    Raises:
        ConfigError: two rows of a pair were asked different things, or an item is there twice.
    """
    first, second = _by_key(base), _by_key(variant)
    pairs, notes = [], []
    for key in first.keys() & second.keys():
        if first[key].prompt_hash != second[key].prompt_hash:
            raise ConfigError(
                f"Item `{key[1]}` of `{key[0]}` was not asked alike: its prompt_hash is "
                f"`{first[key].prompt_hash[:12]}` and `{second[key].prompt_hash[:12]}`.",
                hint="compare runs of the same tasks, shots and sampling parameters",
            )
    num_alone = len(first.keys() ^ second.keys())
    if num_alone:
        notes.append(f"{num_alone} items were answered by one arm only and are left out")
    graded = {name for name, facts in tasks.items() if _is_graded(name, facts, first, second)}
    left_out = sorted({key[0] for key in first.keys() & second.keys()} - graded)
    if left_out:
        notes.append(
            f"not paired: {', '.join(left_out)} (no score of single answers where more is better)"
        )
    for key, row in first.items():
        other = second.get(key)
        if other is None or key[0] not in graded:
            continue
        score = str(tasks[key[0]]["main_score"])
        cluster = (key[0], str(row.details.get("group") or key[1]))
        values = [float(one.scores.get(score, 0.0)) if one.ok else 0.0 for one in (row, other)]
        pairs.append(Pair(key, cluster, values[0], values[1], (row, other)))
    return pairs, notes


def _by_key(rows: Iterable[Request]) -> dict[Key, Request]:
    found: dict[Key, Request] = {}
    for row in rows:
        if row.error_class == "cut" or not row.task:
            continue
        if key_of(row) in found:
            raise ConfigError(
                f"Item `{row.prompt_id}` of `{row.task}` is there twice.",
                hint="pair one run with one run",
            )
        found[key_of(row)] = row
    return found


def _is_graded(name: str, facts: Mapping[str, Any], *arms: Mapping[Key, Request]) -> bool:
    """Whether single answers have the main score, and more of it is better."""
    score = str(facts.get("main_score", ""))
    if not facts.get("scores", {}).get(score, {}).get("higher_is_better", True):
        return False
    rows = [row for arm in arms for key, row in arm.items() if key[0] == name]
    answered = [row for row in rows if row.ok]
    return bool(rows) and all(score in row.scores for row in answered)


class Test(NamedTuple):
    """What the pairs say of the difference; scores, not points."""

    interval: Interval
    bound: float  # one-sided lower
    p: float
    num_lost: int
    num_won: int
    is_table: bool  # right or wrong, each pair alone: McNemar and Tango


def test(pairs: Sequence[Pair], rule: Rule, num_axes: int) -> Test:
    """The difference of the variant from the base, tested as the pairs allow.

    Right and wrong answers that do not depend on one another: exact McNemar, Tango's interval.
    Otherwise Student's interval with standard errors by cluster, and of few clusters that differ
    also the exact test by flipping signs; where all differences are 0 there is no spread to see,
    and clusters count as the pairs of a table.
    """
    level = 1 - rule.split(num_axes)
    differences = [one.b - one.a for one in pairs]
    clusters = [one.cluster for one in pairs]
    lost = sum(difference < 0 for difference in differences)
    won = sum(difference > 0 for difference in differences)
    num_clusters = len(set(clusters))
    is_binary = all(value in (0.0, 1.0) for one in pairs for value in (one.a, one.b))
    is_table = is_binary and num_clusters == len(pairs)
    if is_table or not (lost or won) or num_clusters < 2:
        interval = statistics.tango(lost, won, num_clusters, level)
        low, _ = statistics.tango_bounds(lost, won, num_clusters, 1 - 2 * rule.alpha_not_worse)
        return Test(interval, float(low), float(statistics.mcnemar(lost, won)), lost, won, is_table)
    interval = statistics.clustered_interval(differences, clusters, level)
    error, _ = statistics.clustered_error(differences, clusters)
    p = float(statistics.t_p_value(interval.estimate / error, num_clusters - 1)) if error else 0.0
    p = max(p, statistics.sign_flip_p(differences, clusters))
    bound = statistics.clustered_bound(differences, clusters, 1 - rule.alpha_not_worse)
    return Test(interval, bound, p, lost, won, is_table)


def axis(
    pairs: Sequence[Pair],
    repeats: Sequence[Pair],
    rule: Rule,
    num_axes: int,
    scores: Sequence[str] = (),
) -> Axis:
    """The verdict on quality.

    Args:
        pairs: at least one.
        repeats: the base against itself.
        scores: names of the main scores.
    """
    tested = test(pairs, rule, num_axes)
    floor = abs(_mean([one.b - one.a for one in repeats])) if repeats else 0.0
    estimate, margin = tested.interval.estimate, rule.max_drop / 100
    significant = tested.p <= rule.split(num_axes)
    verdict = VERDICTS[int(judge(estimate, significant, tested.bound, margin, floor))]
    return Axis(
        name="quality",
        verdict=verdict,
        metric="share of right answers, or mean main score, over all items"
        + (f" ({', '.join(scores)})" if scores else ""),
        kind="difference",
        estimate=100 * estimate,
        low=100 * tested.interval.low,
        high=100 * tested.interval.high,
        confidence=tested.interval.confidence,
        bound=100 * tested.bound,
        bound_confidence=1 - rule.alpha_not_worse,
        margin=rule.max_drop,
        p=tested.p,
        floor=100 * floor if repeats else None,
        method=("exact McNemar, " if tested.is_table else "") + tested.interval.method,
        num_more=_num_more(pairs, repeats, tested, rule, num_axes)
        if verdict == "cannot tell"
        else None,
        unit="items",
        note=UNGRADED if set(scores) == {NON_EMPTY} else "",
    )


def _num_more(
    pairs: Sequence[Pair], repeats: Sequence[Pair], tested: Test, rule: Rule, num_axes: int
) -> int | None:
    """Items that are missing for either claim, at the difference and spread seen so far."""
    num_pairs = len(pairs)
    differences = [one.b - one.a for one in pairs]
    mean, margin = _mean(differences), rule.max_drop / 100
    # Where nothing flipped yet, as if one pair had: no spread seen is not no spread.
    spread = max(math.fsum(value**2 for value in differences), 1.0) / num_pairs
    if not tested.is_table:  # items of a cluster tell less than single ones
        error, _ = statistics.clustered_error(differences, [one.cluster for one in pairs])
        spread = max(spread, error**2 * num_pairs) if math.isfinite(error) else spread
    wanted = [
        (power.items_needed(spread, abs(mean), rule.split(num_axes) / 2), abs(mean)),
        (power.items_needed(spread, mean + margin, rule.alpha_not_worse), margin),
    ]
    plans = [(num, _under_floor(repeats, limit)) for num, limit in wanted]
    there = [max(one, two) for one, two in plans if one is not None and two is not None]
    return max(1, min(there) - num_pairs) if there else None


def _under_floor(repeats: Sequence[Pair], limit: float) -> int | None:
    """Items from which on the base's difference from itself is below `limit`.

    It falls with their root if its flips go both ways; None if they do not, or nothing would help.
    """
    floor = abs(_mean([one.b - one.a for one in repeats]))
    if floor < limit:
        return 0
    flips = [sum(one.b < one.a for one in repeats), sum(one.b > one.a for one in repeats)]
    if limit <= 0 or float(statistics.mcnemar(*flips)) < 0.05:
        return None
    return math.ceil(len(repeats) * (floor / limit) ** 2) + 1


def by_task(pairs: Sequence[Pair], rule: Rule) -> list[dict[str, Any]]:
    """Each task alone: scores, difference with its 95 % interval, p, and p adjusted (Holm)."""
    alone = Rule(max_drop=rule.max_drop)
    rows = []
    for name in dict.fromkeys(one.key[0] for one in pairs):
        mine = [one for one in pairs if one.key[0] == name]
        tested = test(mine, alone, 1)
        rows.append(
            {
                "task": name,
                "n": len(mine),
                "a": _mean([one.a for one in mine]),
                "b": _mean([one.b for one in mine]),
                **_told(tested),
            }
        )
    for row, adjusted in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def summary(pairs: Sequence[Pair], rule: Rule, num_axes: int, seed: int) -> dict[str, Any]:
    """All tasks pooled, over items."""
    tested = test(pairs, rule, num_axes)
    differences = [one.b - one.a for one in pairs]
    made: dict[str, Any] = {
        "n": len(pairs),
        "num_clusters": len({one.cluster for one in pairs}),
        "a": _mean([one.a for one in pairs]),
        "b": _mean([one.b for one in pairs]),
        **_told(tested),
        "mcnemar_p": float(statistics.mcnemar(tested.num_lost, tested.num_won)),
        "errors": {
            arm: dict(Counter(row.error_class for row in rows if row.error_class))
            for arm, rows in zip("ab", zip(*(one.rows for one in pairs), strict=True), strict=True)
        },
        "intervals": [],
    }
    if all(value in (0.0, 1.0) for one in pairs for value in (one.a, one.b)):
        made["wilson"] = [statistics.wilson(sum(values), len(pairs)) for values in _columns(pairs)]
        made["intervals"].append(statistics.tango(tested.num_lost, tested.num_won, len(pairs)))
    clusters = [one.cluster for one in pairs]
    if len(set(clusters)) > 1:
        made["intervals"].append(statistics.clustered_interval(differences, clusters))
    if 1 < len(set(clusters)) <= 5_000 and any(differences):
        codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
        made["intervals"].append(
            bca_of_mean(
                differences,
                clusters=[codes[cluster] for cluster in clusters],
                seed=seed,
                num_resamples=2_000,
            )
        )
    return made


def flips(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs whose scores differ, losses first: what a reader looks at."""
    questions = {  # the first row of an item has it
        one.key[:2]: row.details["question"]
        for one in pairs
        for row in one.rows
        if "question" in row.details
    }
    changed = [one for one in pairs if one.a != one.b]
    changed.sort(key=lambda one: (one.b - one.a, one.key))
    return [
        {
            "task": one.key[0],
            "prompt_id": one.key[1],
            "repeat": one.key[2],
            "question": questions.get(one.key[:2]),
            "a": one.a,
            "b": one.b,
            "output_a": one.rows[0].output,
            "output_b": one.rows[1].output,
            "error_a": one.rows[0].error_class,
            "error_b": one.rows[1].error_class,
        }
        for one in changed[:MOST_FLIPS]
    ]


def nondeterminism(repeats: Sequence[Pair]) -> dict[str, Any]:
    """The base against itself at temperature 0: what differs is no property of the variant."""
    lost = sum(one.b < one.a for one in repeats)
    won = sum(one.b > one.a for one in repeats)
    texts = sum(one.rows[0].output_hash != one.rows[1].output_hash for one in repeats)
    made: dict[str, Any] = {
        "n": len(repeats),
        "num_flips": lost + won,
        "difference": _mean([one.b - one.a for one in repeats]),
        "num_other_texts": texts,
    }
    if lost + won == 0 and repeats:
        made["share_of_flips_at_most"] = statistics.bound_of_none(len(repeats))
    return made


def _told(tested: Test) -> dict[str, Any]:
    return {
        "difference": tested.interval.estimate,
        "low": tested.interval.low,
        "high": tested.interval.high,
        "confidence": tested.interval.confidence,
        "method": tested.interval.method,
        "bound": tested.bound,
        "p": tested.p,
        "num_lost": tested.num_lost,
        "num_won": tested.num_won,
    }


def _columns(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    return [one.a for one in pairs], [one.b for one in pairs]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
