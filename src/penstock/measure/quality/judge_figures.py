"""What a judge's rows say, and whether the judge may rank: figures of rows alone.

Only pairs that were judged the same way in both orders count. Flips, abstentions and what could
not be read are published beside. `refusals` are the reasons why there is no ranking, win rate or
rating.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from penstock.measure.quality.bradley_terry import bootstrap, fit, table
from penstock.measure.records import Request

NUM_DRAWS = 1000
SEED = 0
_TURNED = {"first": "second", "second": "first"}


class Pair(NamedTuple):
    """Both orders of one comparison. `outcome` is the first arm's: 1, 0.5, 0; None: no verdict."""

    item: str
    group: str
    arms: tuple[str, str]
    outcome: float | None
    flipped: bool
    log2_length_ratio: float
    human: str | None


def judge_figures(settings: Mapping[str, Any], rows: Sequence[Request]) -> dict[str, Any]:
    """Figures of a judge; `settings` are those of the header, `rows` those of the task `judge`."""
    rows = sorted(rows, key=lambda row: row.index)  # as asked: answers come in any order
    compared = [row for row in rows if row.details["kind"] != "rubric"]
    pairs = pairs_of([row for row in rows if row.details["kind"] == "pair"])
    votes = pairs_of([row for row in rows if row.details["kind"] == "vote"])
    made: dict[str, Any] = {
        "conduct": conduct(rows, [*pairs, *votes], compared),
        "cost": cost(rows),
    }
    if votes:
        made["calibration"] = calibration(votes)
    made["refusals"] = refusals(settings, made)
    if pairs:
        made["pairs"] = win_rates(pairs)
        made["length"] = length_slope(pairs)
    if made["refusals"]:
        for pair in made.get("pairs", []):
            pair["win_rate"] = {"value": None, "why": "the judge may not rank"}
        return made
    if rated := [row for row in rows if row.details["kind"] == "rubric"]:
        made["ratings"] = ratings(rated)
    arms = list(dict.fromkeys(arm for pair in pairs for arm in pair.arms))
    if len(arms) > 2:
        decided = [pair for pair in pairs if pair.outcome is not None]
        if are_connected(arms, [pair.arms for pair in decided]):
            made["ranking"] = ranking(arms, decided)
        else:
            made["no_ranking"] = "no consistent verdict links some arms with the others"
    return made


def pairs_of(rows: Sequence[Request]) -> list[Pair]:
    """The two orders of each comparison brought together."""
    both: dict[tuple[str, str, frozenset[str]], dict[str, Request]] = {}
    for row in rows:
        told = row.details
        key = (told["of_task"], told["item"], frozenset((told["first"], told["second"])))
        both.setdefault(key, {})[told["first"]] = row
    return [_pair(orders) for orders in both.values()]


def _pair(orders: Mapping[str, Request]) -> Pair:
    row = next(iter(orders.values()))
    told = row.details
    one, other = told["first"], told["second"]
    there = orders.get(one), orders.get(other)
    verdicts = [_verdict(found) for found in there]
    turned = _TURNED.get(verdicts[1], verdicts[1])
    decided = all(verdict in ("first", "second", "tie") for verdict in verdicts)
    outcome = {"first": 1.0, "tie": 0.5, "second": 0.0}.get(verdicts[0])
    lengths = told["num_characters"]
    return Pair(
        item=f"{told['of_task']}/{told['item']}",
        group=str(told.get("group") or told["item"]),
        arms=(one, other),
        outcome=outcome if decided and verdicts[0] == turned else None,
        flipped=decided and verdicts[0] != turned,
        log2_length_ratio=math.log2((lengths[0] + 1) / (lengths[1] + 1)),
        human=told.get("human"),
    )


def _verdict(row: Request | None) -> str:
    """What a row says; a request that failed is neither readable nor unreadable."""
    return "failed" if row is None or row.error_class else str(row.details.get("verdict"))


def conduct(
    rows: Sequence[Request], pairs: Sequence[Pair], compared: Sequence[Request]
) -> dict[str, Any]:
    """How the judge behaved: readable, decided, the same in both orders, fair to the second."""
    counts = Counter(_verdict(row) for row in rows)
    num_cut = sum(row.error_class == "cut" for row in rows)
    answered = len(rows) - counts["failed"]
    decided = sum(pair.flipped or pair.outcome is not None for pair in pairs)
    sides = Counter(_verdict(row) for row in compared)
    won = sides["first"] + sides["second"]
    evidence = [row.details["evidence_found"] for row in rows if "evidence_found" in row.details]
    return {
        "num_asked": len(rows),
        "num_failed": counts["failed"] - num_cut,
        "num_cut": num_cut,
        "unreadable_rate": counts["unreadable"] / answered if answered else None,
        "abstain_rate": counts["abstain"] / answered if answered else None,
        "num_decided_pairs": decided,
        "flip_rate": sum(pair.flipped for pair in pairs) / decided if decided else None,
        "first_place_rate": sides["first"] / won if won else None,
        "evidence_found_rate": sum(evidence) / len(evidence) if evidence else None,
    }


def cost(rows: Sequence[Request]) -> dict[str, Any]:
    """What judging took."""
    usd = [row.usd for row in rows if row.usd is not None]
    return {
        "num_requests": len(rows),
        "input_tokens": sum(row.n_in or 0 for row in rows),
        "output_tokens": sum(row.n_out or 0 for row in rows),
        "usd": math.fsum(usd) if len(usd) == len(rows) else None,
    }


def calibration(votes: Sequence[Pair]) -> dict[str, Any]:
    """Agreement with people: over all votes (no consistent verdict disagrees with every vote),
    Cohen's kappa of the same with a bootstrap interval over groups of votes, and the agreement
    where there was a verdict."""
    pairs = [(_human(vote), _label(vote)) for vote in votes]
    groups: dict[str, list[int]] = {}
    for index, vote in enumerate(votes):
        groups.setdefault(vote.group, []).append(index)
    units = list(groups.values())
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(NUM_DRAWS):
        picks = rng.integers(0, len(units), len(units))
        draws.append(kappa([pairs[index] for pick in picks for index in units[pick]]))
    low, high = np.quantile(draws, (0.025, 0.975))
    consistent = [pair for pair in pairs if pair[1] != "none"]
    agreed = sum(a == b for a, b in pairs)
    return {
        "num_votes": len(votes),
        "num_groups": len(units),
        "agreement": agreed / len(pairs),
        "agreement_of_consistent": agreed / len(consistent) if consistent else None,
        "kappa": kappa(pairs),
        "kappa_low": float(low),
        "kappa_high": float(high),
    }


def _human(vote: Pair) -> str:
    return str(vote.human)


def _label(vote: Pair) -> str:
    """The judge's verdict as a vote."""
    if vote.outcome is None:
        return "none"
    return {1.0: vote.arms[0], 0.5: "tie", 0.0: vote.arms[1]}[vote.outcome]


def kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa (1960): agreement beyond what the two's habits would give by chance."""
    num = len(pairs)
    observed = sum(a == b for a, b in pairs) / num
    ours, theirs = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(ours[label] * theirs[label] for label in ours) / num**2
    return (observed - expected) / (1 - expected) if expected < 1 else 0.0


def refusals(settings: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Why this judge may not rank; empty: it may."""
    told = made["conduct"]
    found = []
    if told["num_asked"] and told["num_failed"] == told["num_asked"]:
        found.append("No request to the judge was answered.")
    limits = (
        ("unreadable_rate", "max_unreadable", "verdicts cannot be read"),
        ("flip_rate", "max_flips", "verdicts change when the answers change places"),
    )
    for rate, limit, what in limits:
        if told[rate] is not None and told[rate] > settings[limit]:
            found.append(f"{told[rate]:.0%} of its {what} (allowed: {settings[limit]:.0%}).")
    calibrated = made.get("calibration")
    if calibrated and calibrated["kappa"] < settings["min_kappa"]:
        found.append(
            f"Its agreement with people is kappa {calibrated['kappa']:.2f} (needed: "
            f"{settings['min_kappa']:.2f})."
        )
    elif calibrated and calibrated["kappa_low"] <= 0:
        found.append(
            "Its agreement with people cannot be told from chance: kappa is "
            f"{calibrated['kappa_low']:.2f} to {calibrated['kappa_high']:.2f}."
        )
    return found


def are_connected(arms: Sequence[str], games: Sequence[tuple[str, str]]) -> bool:
    """Whether games link every two arms, by way of others or not: else strengths say nothing."""
    linked = {arms[0]}
    for _ in arms:
        linked |= {arm for game in games if linked & set(game) for arm in game}
    return linked == set(arms)


def win_rates(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """For each two arms: wins, ties, losses and inconsistent, and the win rate, ties as halves."""
    by_arms: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        by_arms.setdefault(pair.arms, []).append(pair)
    return [
        {
            "first": arms[0],
            "second": arms[1],
            "num_pairs": len(mine),
            "wins": sum(pair.outcome == 1 for pair in mine),
            "ties": sum(pair.outcome == 0.5 for pair in mine),
            "losses": sum(pair.outcome == 0 for pair in mine),
            "inconsistent": sum(pair.flipped for pair in mine),
            "win_rate": _mean_interval([p.outcome for p in mine if p.outcome is not None]),
        }
        for arms, mine in by_arms.items()
    ]


def _mean_interval(values: Sequence[float]) -> dict[str, Any]:
    from penstock.measure.verdict.statistics import mean_interval, wilson

    if not values:
        return {"value": None, "why": "no consistent verdict"}
    if set(values) <= {0.0, 1.0} or len(set(values)) == 1:
        made = wilson(math.fsum(values), len(values))
    else:
        made = mean_interval(values)
    low, high = max(made.low, 0.0), min(made.high, 1.0)
    return {"value": made.estimate, "low": low, "high": high, "num": len(values)}


def length_slope(pairs: Sequence[Pair]) -> dict[str, Any]:
    """By how much the win rate rises where an answer is twice as long as the other: the slope of
    an ordinary least squares line of outcomes over log2 of the ratio of lengths."""
    from penstock.measure.verdict.statistics import t_quantile

    points = [(p.log2_length_ratio, p.outcome) for p in pairs if p.outcome is not None]
    x = np.array([point[0] for point in points])
    y = np.array([point[1] for point in points])
    if len(points) < 3 or float(np.ptp(x)) == 0:
        return {"value": None, "why": "fewer than three consistent verdicts, or equal lengths"}
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    df = len(points) - 2
    error = math.sqrt(float(residuals @ residuals) / df / float(centred @ centred))
    half = float(t_quantile(0.975, df)) * error
    return {"value": slope, "low": slope - half, "high": slope + half, "num": len(points)}


def ratings(rows: Sequence[Request]) -> dict[str, Any]:
    """Mean rating of each arm by task."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if "rating" in row.details:
            mine = values.setdefault(row.details["of"], {})
            mine.setdefault(row.details["of_task"], []).append(float(row.details["rating"]))
    return {
        arm: {task: _mean_interval_of_ratings(given) for task, given in mine.items()}
        for arm, mine in values.items()
    }


def _mean_interval_of_ratings(values: Sequence[float]) -> dict[str, Any]:
    from penstock.measure.verdict.statistics import mean_interval

    if len(values) < 2:
        return {"value": values[0], "low": None, "high": None, "num": len(values)}
    made = mean_interval(values)
    return {"value": made.estimate, "low": made.low, "high": made.high, "num": len(values)}


def ranking(arms: Sequence[str], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Bradley-Terry strengths with bootstrap intervals over items, strongest first.

    Who won (or lost) every game has no interval: resamples do not differ, and the finite strength
    is that of the prior.
    """
    numbers = {arm: number for number, arm in enumerate(arms)}
    units: dict[str, list[tuple[int, int, float]]] = {}
    for pair in pairs:
        if pair.outcome is not None:
            game = (numbers[pair.arms[0]], numbers[pair.arms[1]], pair.outcome)
            units.setdefault(pair.item, []).append(game)
    games = list(units.values())
    wins = table(len(arms), [game for unit in games for game in unit])
    mixed = (wins.sum(0) > 0) & (wins.sum(1) > 0)
    strengths = fit(wins)
    draws = bootstrap(len(arms), games, num_draws=NUM_DRAWS, seed=SEED)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    made = [
        {
            "arm": arm,
            "strength": float(strengths[n]),
            "low": float(low[n]) if mixed[n] else None,
            "high": float(high[n]) if mixed[n] else None,
        }
        for arm, n in numbers.items()
    ]
    return sorted(made, key=lambda entry: -float(str(entry["strength"])))
