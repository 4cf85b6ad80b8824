"""A comparison that nobody ran: header and records, with a known truth and realistic noise.

Times of legs carry noise that is correlated from leg to leg (first-order autoregressive, as heat
and neighbours are) and a slow drift; items differ in length, and both arms answer the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.measure.records import Arm, Header, Mark, Record, Request, Sample
from penstock.measure.verdict import design
from penstock.measure.verdict.figures import Comparison
from penstock.measure.verdict.rule import Axis, Rule, Verdict, overall

BASE, VARIANT = "base", "variant"
POWER = {
    "cpu": {"busy_w": 100.0, "idle_w": 20.0, "num_cpus": 2, "explanation": "simulated"},
    "ram": {"watts_per_gb": 0.3, "source": "simulated"},
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is so, and how large the experiment is."""

    num_items: int = 600
    share_right: float = 0.7
    share_lost: float = 0.01  # of the items that only the base, and only the variant, gets right
    share_won: float = 0.01
    slower: float = 0.0  # log of the time of the variant over that of the base
    blocks: int = 6
    noise_blocks: int = 4
    leg_sd: float = 0.02  # of the log of a leg's time
    correlation: float = 0.5  # from leg to leg
    drift: float = 0.001  # of the log of a leg's time, from leg to leg
    memory_ratio: float = 1.0


class Machine:
    """Time that passes in legs, with noise that remembers."""

    def __init__(self, truth: Truth, rng: np.random.Generator) -> None:
        self.truth, self.rng = truth, rng
        self.now_ns = 0
        self.noise = float(rng.standard_normal()) * truth.leg_sd
        self.num_legs = 0
        self.cpu_s = {BASE: 0.0, VARIANT: 0.0}
        self.records: list[Record] = []

    def leg(self, arm: str, role: int, rows: list[Request], lengths: Any) -> None:
        """One after the other, the rows answer; each takes its length times the leg's noise."""
        truth = self.truth
        fresh = truth.leg_sd * np.sqrt(1 - truth.correlation**2)
        self.noise = truth.correlation * self.noise + fresh * float(self.rng.standard_normal())
        self.num_legs += 1
        slower = truth.slower if role and arm == VARIANT else 0.0
        factor = float(np.exp(self.noise + truth.drift * self.num_legs + slower))
        self.sample(arm)
        for row, length_s in zip(rows, lengths, strict=True):
            row.arm, row.details = arm, row.details | {"role": role}
            row.t_due_ns = row.t_sent_ns = self.now_ns
            row.t_first_ns = self.now_ns + int(0.1 * factor * length_s * 1e9)
            self.now_ns += int(factor * length_s * 1e9)
            row.t_last_ns = row.t_done_ns = self.now_ns
            self.cpu_s[arm] += 2 * factor * length_s
            self.records.append(row)
        self.sample(arm)

    def sample(self, arm: str) -> None:
        size = 1e9 * (self.truth.memory_ratio if arm == VARIANT else 1.0)
        values = {"rss_bytes": size, "hwm_bytes": size, "cpu_s": self.cpu_s[arm]}
        self.records.append(Sample(t_ns=self.now_ns, arm=arm, source="proc", values=values))


def simulated(truth: Truth, seed: int, rule: Rule | None = None) -> tuple[Header, list[Record]]:
    """A whole comparison."""
    rng = np.random.default_rng(seed)
    machine = Machine(truth, rng)
    quality_legs(machine, rng)
    for stage, num_blocks, arms in (
        ("noise", truth.noise_blocks, (BASE, BASE)),
        ("speed", truth.blocks, (BASE, VARIANT)),
    ):
        for block in range(num_blocks):
            for leg in design.legs(block, seed):
                rows = [
                    Request(
                        stage=stage,
                        block=block,
                        index=index,
                        n_out=32,
                        count_source="usage",
                        details={"slot": leg.slot},
                    )
                    for index in range(4)
                ]
                machine.leg(arms[leg.role], leg.role, rows, np.full(4, 0.5))
    header = Header(
        run_id=f"simulated-{seed}",
        kind="compare",
        started_at="2026-01-01T00:00:00Z",
        version="0",
        arms=[Arm(name=BASE, target=BASE), Arm(name=VARIANT, target=VARIANT)],
        settings={
            "rule": {**_plain(rule or Rule())},
            "seed": seed,
            "load": {"request_rate": None},
            "tasks": {"sums": {"main_score": "exact_match", "scores": {"exact_match": {}}}},
            "power": POWER,
            "machine_price": {"usd_per_hour": 1.0},
        },
    )
    return header, machine.records


def quality_legs(machine: Machine, rng: np.random.Generator, num_chunks: int = 8) -> None:
    """The items in chunks, each asked of both arms; then of the base again."""
    truth = machine.truth
    right = rng.random(truth.num_items) < truth.share_right
    draw = rng.random(truth.num_items)
    # Of all items, not only of those that the base gets right.
    lost = right & (draw < truth.share_lost / truth.share_right)
    won = ~right & (draw < truth.share_won / (1 - truth.share_right))
    outcomes = (right, (right & ~lost) | won)
    lengths = 0.05 * rng.lognormal(0.0, 0.5, truth.num_items)
    for chunk, items in enumerate(design.chunks(range(truth.num_items), num_chunks, 0)):
        for role in (0, 1) if chunk % 2 else (1, 0):
            rows = [graded("quality", chunk, item, bool(outcomes[role][item])) for item in items]
            machine.leg((BASE, VARIANT)[role], role, rows, lengths[items])
    rows = [graded("repeat", 0, item, bool(right[item])) for item in range(truth.num_items)]
    machine.leg(BASE, 0, rows, lengths)


def graded(stage: str, block: int, item: int, is_right: bool) -> Request:
    return Request(
        stage=stage,
        block=block,
        prompt_id=f"item-{item}",
        prompt_hash=f"hash-{item}",
        task="sums",
        scores={"exact_match": float(is_right)},
        output="right" if is_right else "wrong",
        output_hash=str(is_right),
        n_out=16,
        count_source="usage",
    )


def judged(truth: Truth, seed: int, rule: Rule | None = None) -> tuple[Verdict, dict[str, Axis]]:
    """From rows to the verdict."""
    header, records = simulated(truth, seed, rule)
    made = Comparison(header, records)
    axes = made.axes()
    return overall(axes, made.rule)[0], axes


def window_mark(**facts: Any) -> Mark:
    return Mark(t_ns=0, name="divergence", facts=facts)


def _plain(rule: Rule) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(rule)
    return plain
