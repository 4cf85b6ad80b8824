"""`penstock verify`: compute every figure of a run again from its raw records.

Exit status 0: all is equal; 1: a file is damaged; 3: the run was not finished, or is not valid;
4: something differs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from penstock.cli import runs

if TYPE_CHECKING:
    from penstock.measure.verify import Verification

_MOST = 20


@click.command(epilog="Example: penstock verify 20261122T1923 --json")
@click.argument("run")
@click.option("--finish", is_flag=True, help="Compute the figures of a run that was stopped first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(run: str, finish: bool, as_json: bool) -> int:
    """Compute every figure of a run again from its raw records, and compare.

    RUN is a run's directory (wherever it was written with --output), its id, or a part of the id
    that no other in PENSTOCK_RUNS has.

    Exit status: 0 all is equal; 1 a file is damaged; 3 the run was not finished, or it is not
    valid; 4 something differs.
    """
    import msgspec

    from penstock.measure.results import store
    from penstock.measure.verify import verify

    found = verify(store.find(run), finish=finish)
    if as_json:
        click.echo(json.dumps({"ok": found.ok, **msgspec.to_builtins(found)}))
    else:
        for line in _lines(found):
            click.echo(line)
    if found.finished and not found.ok:
        return runs.BAD
    return runs.NOT_VALID if found.problems or not found.finished else runs.OK


def _lines(found: Verification) -> list[str]:
    told = [f"{found.run_id} ({found.kind}, {found.num_records} records)"]
    told += [f"  {note}" for note in found.notes]
    if not found.finished:
        return [*told, f"  compute them: penstock verify --finish {found.path}"]
    told.append(f"  records   {_state(found.records_unchanged)}")
    told.append(f"  header    {_state(found.header_unchanged)}")
    num_wrong = len(found.mismatches)
    told.append(
        f"  figures   {num_wrong} of {found.num_values} values differ"
        if num_wrong
        else f"  figures   all {found.num_values} values are computed again and equal"
    )
    for wrong in found.mismatches[:_MOST]:
        stored = "nothing" if wrong.only_in == "recomputed" else json.dumps(wrong.stored)[:80]
        computed = "nothing" if wrong.only_in == "stored" else json.dumps(wrong.recomputed)[:80]
        told.append(f"    {wrong.path}: stored {stored}, computed {computed}")
    if num_wrong > _MOST:
        told.append(f"    and {num_wrong - _MOST} others (--json has all)")
    told.append(f"  page      {found.page}")
    told += [f"  file      {state}: {name}" for name, state in found.files.items()]
    if found.version != found.version_here:
        told.append(
            f"  version   measured with {found.version}, computed with {found.version_here}"
        )
    told += [f"  NOT VALID: {problem}" for problem in found.problems]
    if found.ok and found.problems:
        return [*told, "verified: the figures follow from the records; the run is not valid"]
    return [*told, "verified" if found.ok else "NOT verified"]


def _state(unchanged: bool | None) -> str:
    return {True: "unchanged", False: "CHANGED since the figures were made", None: "not known"}[
        unchanged
    ]
