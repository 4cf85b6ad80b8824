"""A comparison of two finished `penstock eval` runs: their answers, paired, as a run of its own.

Quality and the cost of tokens alone: runs at different times say nothing of speed. The rows are
copied, so that `penstock verify` needs this run only.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.records import Arm, Request
from penstock.measure.run import Figures, Run, Writer, new_header
from penstock.measure.verdict.plan import QUALITY
from penstock.measure.verdict.settings import RuleSettings

NUM_BLOCKS = 20  # of items: the cost of tokens has its interval by leaving out one after the other


def compare_runs(
    base: Path, variant: Path, rules: RuleSettings, directory: Path | None = None, seed: int = 0
) -> tuple[Path, Figures]:
    """Compare two runs of the kind `eval`, one arm each.

    Raises:
        ConfigError: one is of another kind, has no graded rows or several arms, or they share no
            task; or an item was not asked alike.
    """
    runs = (Run(base), Run(variant))
    arms = [_arm(run) for run in runs]
    if arms[0].name == arms[1].name:
        arms = [
            msgspec.structs.replace(arm, name=f"{arm.name} ({run.header.run_id})")
            for arm, run in zip(arms, runs, strict=True)
        ]
    facts = [run.header.settings.get("tasks", {}) for run in runs]
    shared = {name: told for name, told in facts[0].items() if name in facts[1]}
    if not shared:
        raise ConfigError("The two runs have no task in common.")
    header = new_header(
        "compare",
        settings={"rule": msgspec.to_builtins(rules.rule()), "seed": seed, "tasks": shared},
        arms=arms,
        hashes={f"run {run.header.run_id}": run.records_sha256 for run in runs},
    )
    with Writer(header, directory) as writer:
        for run in runs:
            for problem in _problems(run):
                writer.mark("problem", message=f"`{run.header.run_id}`: {problem}")
        places: dict[tuple[str, str], int] = {}
        for role, (run, arm) in enumerate(zip(runs, arms, strict=True)):
            for row in run.requests:
                if row.task in shared:
                    place = places.setdefault((row.task, row.prompt_id), len(places))
                    writer.add(_copied(row, arm.name, role, place % NUM_BLOCKS))
    return writer.path, kinds.finish(writer.path)


def _problems(run: Run) -> list[str]:
    """Why a finished run is not valid, which makes the comparison not valid either."""
    made = run.figures()
    if made is None:
        return ["the run came to no end"]
    return made.problems


def _arm(run: Run) -> Arm:
    header = run.header
    if header.kind != "eval":
        raise ConfigError(
            f"Run `{header.run_id}` is of the kind `{header.kind}`.",
            hint="two runs of `penstock eval` can be compared; give arms to compare speed too",
        )
    if len(header.arms) != 1:
        raise ConfigError(f"Run `{header.run_id}` has `{len(header.arms)}` arms, not one.")
    return header.arms[0]


def _copied(row: Request, arm: str, role: int, block: int) -> Request:
    row.stage, row.arm, row.block = QUALITY, arm, block
    row.details = row.details | {"role": role, "slot": 0}
    return row
