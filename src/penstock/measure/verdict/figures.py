"""Everything a comparison says, computed of its header and its raw records alone.

Knows no target and no file. Arms are `a`, the base, and `b`, the variant. An axis is there if its
data is; what is missing is said, never guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.measure.environment import busy_note
from penstock.measure.records import Header, Mark, Record, Request
from penstock.measure.verdict import divergence, power, quality, resources, rule, speed
from penstock.measure.verdict import plan as plans
from penstock.measure.verdict.plan import QUALITY, REPEAT
from penstock.measure.verdict.power import Blocks
from penstock.measure.verdict.rule import Axis, Rule
from penstock.measure.verdict.statistics import FEWEST_BLOCKS
from penstock.measure.verdict.words import sentence

MOST_ERRORS = 0.01  # share of requests under load that may fail in a valid run
LATE_S = 0.010  # median wait in the client that still counts as none


def figures(header: Header, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """The figures of a comparison, and why it is not valid."""
    made = Comparison(header, records)
    return made.figures(), made.problems()


class Comparison:
    """A comparison while it is computed."""

    def __init__(self, header: Header, records: Sequence[Record]) -> None:
        self.header, self.records = header, records
        settings = header.settings
        self.rule = msgspec.convert(settings["rule"], Rule)
        self.seed = int(settings.get("seed", 0))
        self.arms = (header.arms[0].name, header.arms[1].name)
        self.is_open_loop = settings.get("load", {}).get("request_rate") is not None
        self.rows = [record for record in records if isinstance(record, Request)]
        by_stage = {
            stage: [row for row in self.rows if row.stage == stage and row.phase == "steady"]
            for stage in (QUALITY, REPEAT, speed.SPEED, speed.NOISE)
        }
        tasks = settings.get("tasks", {})
        base, variant = (
            [row for row in by_stage[QUALITY] if row.details["role"] == role] for role in (0, 1)
        )
        self.pairs, self.notes = quality.pair(base, variant, tasks)
        self.repeats, _ = quality.pair(base, by_stage[REPEAT], tasks)
        self.plan = plans.of_header(settings)
        self.missing = plans.missing(self.plan, records, self.arms) if self.plan else {}
        requests = self.plan.requests if self.plan else 1
        self.legs = speed.legs_of(self.rows, speed.SPEED, requests)
        self.noise = speed.legs_of(self.rows, speed.NOISE, requests)
        self.energy_of = resources.EnergyOf(header, records)
        self.units = resources.units(
            by_stage[QUALITY] or by_stage[speed.SPEED],
            self.arms,
            header,
            self.rule,
            self.energy_of,
        )
        self.metric = speed.primary(self.is_open_loop)
        self.joules, self.joules_table = resources.joules_per_token(
            self.legs, self.arms, self.energy_of
        )
        self.noise_joules, _ = resources.joules_per_token(
            self.noise, (self.arms[0], self.arms[0]), self.energy_of
        )
        self.has_cost = resources.success_ratio(self.units, lambda unit: unit.usd) is not None
        # Memory has no test.
        self.num_axes = sum(map(bool, (self.pairs, self.legs, self.joules, self.has_cost)))
        self.peaks = self._peaks(None)
        alone = [
            row.t_sent_ns
            for row in self.rows
            if row.stage in (REPEAT, speed.NOISE) and row.t_sent_ns is not None
        ]
        self.alike = self._peaks(min(alone)) if alone else None

    def _peaks(self, end_ns: int | None) -> tuple[resources.Peak, resources.Peak]:
        base, variant = (resources.peak_memory(self.records, arm, end_ns) for arm in self.arms)
        return base, variant

    def axes(self) -> dict[str, Axis]:
        """The axes that there is data for, judged."""
        num_axes = self.num_axes
        made: list[Axis | None] = []
        if self.pairs:
            tasks = self.header.settings["tasks"]
            scores = sorted({tasks[one.key[0]]["main_score"] for one in self.pairs})
            made.append(quality.axis(self.pairs, self.repeats, self.rule, num_axes, scores))
        if self.legs:
            made.append(self.speed_axis(num_axes))
        if {QUALITY, speed.SPEED} & self.missing.keys():  # who was asked less needs less
            made.append(rule.untold("memory", "not both were asked all"))
        else:
            made.append(resources.memory_axis(*self.peaks, self.alike, self.rule))
        if self.joules:
            made.append(
                speed.ratio_axis(
                    "energy",
                    "joules per output token",
                    self.joules,
                    self.noise_joules,
                    self.rule,
                    num_axes,
                    more_is_better=False,
                )
            )
        if self.has_cost:
            made.append(resources.cost_axis(self.units, self.floor(), self.rule, num_axes))
        found = {axis.name: axis for axis in made if axis is not None}
        for name in self.rule.guard:
            if name not in found and self.is_asked_for(name):
                why = "; ".join(self.notes) if name == "quality" else ""
                found[name] = rule.untold(name, why or "guarded, and not known of both arms")
        return {name: found[name] for name in rule.AXES if name in found}

    def is_asked_for(self, name: str) -> bool:
        """Whether a guarded axis should be there: quality and speed are guarded unasked."""
        settings = self.header.settings
        if name == "quality":
            return bool(settings.get("tasks"))
        if name == "speed":
            return bool(settings.get("load", {}).get("blocks"))
        return True

    def speed_axis(self, num_axes: int) -> Axis:
        """The verdict on the speed-up by the primary metric: a ratio above 1 is faster."""
        both = [speed.pairs_of(legs, self.metric) for legs in (self.legs, self.noise)]
        told = self.metric
        if self.is_open_loop:  # a time: the base's over the variant's
            both = [[(variant, base) for base, variant in pairs] for pairs in both]
            told += " of the base / of the variant"
        return speed.ratio_axis(
            "speed", told, both[0], both[1], self.rule, num_axes, more_is_better=True
        )

    def floor(self) -> float:
        """Noise floor of what is paid for by time; 0 where tokens have a price."""
        noise = speed.pairs_of(self.noise, self.metric)
        if len(noise) < FEWEST_BLOCKS or any(row.usd is not None for row in self.rows):
            return 0.0
        logs = speed.effects(noise, more_is_better=True)
        blocks = Blocks(max(len(self.legs), 1), len(noise))
        return float(power.noise_floor(logs.mean(), logs.std(ddof=1), blocks))

    def figures(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        axes = self.axes()
        verdict, because = rule.overall(axes, self.rule)
        num_axes = self.num_axes
        return {
            "arms": [{"name": arm.name, "target": arm.target} for arm in self.header.arms],
            "overall": {
                "verdict": verdict,
                "because": because,
                "sentence": sentence(verdict, because, axes, self.arms),
            },
            "rule": rule.words(self.rule, list(axes), num_axes),
            "num_axes": num_axes,
            "axes": axes,
            "quality": self.quality_figures(num_axes),
            "speed": self.speed_figures(num_axes),
            "memory": self.memory_figures(),
            "energy": self.energy_figures(),
            "cost": self.cost_figures(),
            "divergence": divergence.figures(self.records),
            "notes": self.remarks(),
            "failures": self.failures(),
        }

    def quality_figures(self, num_axes: int) -> dict[str, Any] | None:
        """Pooled, by task, flips, and the base against itself."""
        if not self.pairs:
            return None
        pooled = quality.summary(self.pairs, self.rule, num_axes, self.seed)
        num = len(self.pairs)
        shares = (pooled["num_lost"] / num, pooled["num_won"] / num)
        return {
            "pooled": pooled,
            "tasks": quality.by_task(self.pairs, self.rule),
            "flips": quality.flips(self.pairs),
            "repeat": quality.nondeterminism(self.repeats) if self.repeats else None,
            "notes": self.notes,
            "verdicts_if_equal": _verdicts_if_equal(num, shares, self.rule, num_axes),
        }

    def speed_figures(self, num_axes: int) -> dict[str, Any] | None:
        """Metrics, quantiles, blocks, and the noise floor."""
        if not self.legs:
            return None
        noise = speed.pairs_of(self.noise, self.metric)
        made: dict[str, Any] = {
            "primary": self.metric,
            "is_open_loop": self.is_open_loop,
            "metrics": speed.compared(self.legs, self.is_open_loop, self.seed),
            "quantiles": speed.quantiles(self.legs, self.is_open_loop, self.seed),
            "blocks": speed.block_table(self.legs, self.is_open_loop),
            "noise": {"blocks": speed.block_table(self.noise, self.is_open_loop)},
        }
        if len(noise) >= FEWEST_BLOCKS:
            logs = speed.effects(noise, more_is_better=True)
            spread = float(logs.std(ddof=1))
            blocks = Blocks(len(self.legs), len(noise))
            made["noise"] |= {
                "bias": 100 * math.expm1(float(logs.mean())),
                "spread": 100 * spread,
                "p": speed.p_of(float(logs.mean()), spread, len(noise)),
                "floor": 100 * math.expm1(float(power.noise_floor(logs.mean(), spread, blocks))),
                "power_5_percent_slower": power.speed_power(
                    math.log(0.95), spread, blocks, self.rule, num_axes, seed=self.seed
                )["worse"]
                if spread > 0 and len(self.legs) >= FEWEST_BLOCKS
                else None,
            }
        return made

    def memory_figures(self) -> list[dict[str, Any]]:
        """Peaks of both arms."""
        return [peak._asdict() | {"total_bytes": peak.total_bytes} for peak in self.peaks]

    def energy_figures(self) -> dict[str, Any]:
        """Per token by block, per success, and where the figures come from."""
        example = self.energy_of.example
        ratio = resources.success_ratio(self.units, lambda unit: unit.joules)
        return {
            "label": example.label if example else None,
            "source": example.source if example else None,
            "explanation": example.explanation if example else "nothing was measured",
            "blocks": self.joules_table,
            "per_success_ratio": ratio.map(_exp) if ratio else None,
        }

    def cost_figures(self) -> dict[str, Any]:
        """US dollars per successful answer of both arms, and by what price."""
        ratio = resources.success_ratio(self.units, lambda unit: unit.usd)
        sources = Counter(row.usd_source for row in self.rows if row.usd_source)
        return {
            "success": f"a score of at least {self.rule.success_at:g}"
            if self.pairs
            else "a whole answer",
            "arms": [resources.arm_sums(self.units, role) for role in (0, 1)] if self.units else [],
            "per_success_ratio": ratio.map(_exp) if ratio else None,
            "sources": sorted(sources),
            "machine_price": self.header.settings.get("machine_price"),
        }

    def failures(self) -> list[dict[str, Any]]:
        """Of each arm, requests and errors by stage."""
        made = []
        for arm in self.arms:
            for stage in (speed.NOISE, speed.SPEED, QUALITY, REPEAT):
                rows = [row for row in self.rows if row.arm == arm and row.stage == stage]
                if rows:
                    errors = Counter(row.error_class for row in rows if row.error_class)
                    made.append(
                        {"arm": arm, "stage": stage, "n": len(rows), "errors": dict(errors)}
                    )
        return made

    def remarks(self) -> list[str]:
        """What a reader should know, and does not make the run invalid."""
        told = busy_note(self.header.environment) if self.plan is not None else None
        return [told] if told else []

    def problems(self) -> list[str]:
        """Why the comparison is not valid; empty: it is."""
        found = [
            str(record.facts.get("message", ""))
            for record in self.records
            if isinstance(record, Mark) and record.name == "problem"
        ]
        found += self.missing.values()
        found += speed.unlike(self.legs, self.arms)
        for one in self.failures():
            errors = sum(num for name, num in one["errors"].items() if name != "cut")
            under_load = one["stage"] in (speed.SPEED, speed.NOISE)
            if under_load and errors > MOST_ERRORS * one["n"]:
                found.append(
                    f"{errors} of {one['n']} requests of `{one['arm']}` failed in the part "
                    f"`{one['stage']}`: its speed is that of what was left"
                )
            elif not under_load and one["errors"].get("connect", 0) > MOST_ERRORS * one["n"]:
                found.append(
                    f"`{one['arm']}` could not be reached for {one['errors']['connect']} of "
                    f"{one['n']} answers in the part `{one['stage']}`: that says nothing of quality"
                )
        waits = sorted(
            (row.t_sent_ns - row.t_due_ns) * 1e-9
            for row in self.rows
            if row.stage == speed.SPEED and row.t_sent_ns is not None and row.t_due_ns is not None
        )
        if waits and waits[len(waits) // 2] > LATE_S:
            found.append(
                f"the client was late: half of the requests waited {waits[len(waits) // 2]:.3g} s "
                "in it before they were sent"
            )
        noise = speed.pairs_of(self.noise, self.metric)
        if len(noise) >= 2:
            logs = speed.effects(noise, more_is_better=True)
            if speed.p_of(float(logs.mean()), float(logs.std(ddof=1)), len(noise)) < 0.01:
                found.append(
                    f"the base differs from itself by {100 * math.expm1(float(logs.mean())):+.2f} "
                    "% (p < 0.01): something else than the arms changes with them"
                )
        return found


def _verdicts_if_equal(
    num: int, shares: tuple[float, float], rule_: Rule, num_axes: int
) -> dict[rule.Verdict, float] | None:
    """Probability of each verdict on right and wrong answers, were the variant as good as the base
    with as many flips as were seen."""
    even = max(sum(shares) / 2, 0.5 / num)
    return power.quality_power(num, even, even, rule_, num_axes) if num <= 20_000 else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
