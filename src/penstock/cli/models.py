"""`penstock models`: what the cache of the hub holds; check it, download into it, remove from it.

Exit status as everywhere, and of `verify` 4 where a file is damaged or missing.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from penstock.errors import ConfigError, ModelLoadError, UnsupportedModel

if TYPE_CHECKING:
    from penstock.hub.inventory import Check, Entry
    from penstock.hub.names import HubName

_DAMAGED = 4
_SHORT = 8  # digits of a commit that are shown


@click.group(invoke_without_command=True, epilog="Example: penstock models --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the models of the hub that are in the cache, or work on one.

    The cache is Hugging Face's: HF_HUB_CACHE, else `hub` in HF_HOME, else ~/.cache/huggingface/hub.
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list", epilog="Example: penstock models list --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_(as_json: bool) -> None:
    """List the models of the hub that are in the cache (also without `list`)."""
    _list(as_json)


@command.command(epilog="Example: penstock models pull Qwen/Qwen3-0.6B --revision main")
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit; default: main.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pull(name: str, revision: str | None, as_json: bool) -> None:
    """Download a model, or what is missing of it, and serve nothing.

    NAME is org/name, org/name@revision, or org/name:Q4_K_M for one model of a repository of GGUF
    files. HF_ENDPOINT names another hub; HF_TOKEN, or the file `token` in HF_HOME, is shown to it.
    """
    from penstock.hub.resolve import snapshot

    path = snapshot(_model(name, revision), is_cache_enough=False)
    click.echo(json.dumps({"path": str(path)}) if as_json else path)


@command.command(epilog="Example: penstock models verify Qwen/Qwen3-0.6B")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def verify(name: str, as_json: bool) -> int:
    """Hash every file of a model again, and compare with what the hub announced.

    NAME is org/name for all revisions that are here, or org/name@revision.

    Exit status: 4 if a file is damaged or missing.
    """
    from penstock.hub import inventory
    from penstock.hub.progress import Progress
    from penstock.hub.settings import cache_directory

    repo, commits = inventory.chosen(cache_directory(), _model(name))
    if not commits:
        raise ConfigError(
            f"Of `{repo.name}` the cache holds beginnings only.",
            hint=f"`penstock models pull {repo.name}` goes on with them",
        )
    total = sum(inventory.num_bytes_of(repo, commit) for commit in commits)
    with Progress(f"verifying {repo.name}", total) as progress:
        found = [inventory.check(repo, commit, progress.add) for commit in commits]
    if as_json:
        click.echo(json.dumps([{"ok": one.is_right, **asdict(one)} for one in found]))
    else:
        for one in found:
            click.echo("\n".join(_told(one)))
    return 0 if all(one.is_right for one in found) else _DAMAGED


@command.command(epilog="Example: penstock models remove Qwen/Qwen3-0.6B@main --yes")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; goes with --yes.")
def remove(name: str, yes: bool, as_json: bool) -> None:
    """Remove a model from the cache, with what no other revision of it needs.

    NAME is org/name for all revisions that are here, or org/name@revision.
    """
    from penstock.hub import inventory
    from penstock.hub.progress import in_units
    from penstock.hub.settings import cache_directory

    if not yes and (as_json or not _is_asked()):
        raise click.UsageError("Nobody can be asked here; give `--yes`.")
    removal = inventory.plan_removal(*inventory.chosen(cache_directory(), _model(name)))
    size = in_units(removal.num_bytes)
    what = f"{removal.repo.name}: {len(removal.commits)} revisions, {size}"
    if not yes and not click.confirm(f"Remove {what}?", err=True):
        raise click.Abort
    inventory.remove(removal)
    if as_json:
        facts = {"commits": removal.commits, "refs": removal.refs, "num_bytes": removal.num_bytes}
        click.echo(json.dumps({"name": removal.repo.name, **facts}))
    else:
        click.echo(f"removed {what}")


def _is_asked() -> bool:
    return sys.stdin.isatty()


def _model(name: str, revision: str | None = None) -> HubName:
    from penstock.hub import hub_model
    from penstock.hub.names import GRAMMAR

    model = hub_model(name, revision)
    if model is None:
        raise ConfigError(f"`{name[:200]}` is no model of a hub: those are called {GRAMMAR}.")
    return model


def _list(as_json: bool) -> None:
    from penstock.hub import inventory
    from penstock.hub.progress import in_units
    from penstock.hub.settings import cache_directory

    cache = cache_directory()
    found = inventory.entries(cache)
    if as_json:
        rows = [{**asdict(one), "path": str(one.path), **_support(one)} for one in found]
        click.echo(json.dumps(rows))
        return
    if found:
        click.echo("\n".join(_table([_HEAD, *(_row(one) for one in found)])))
    else:
        click.echo(f"no models in {cache}", err=True)
    if num_bytes := inventory.partial_bytes(cache):
        click.echo(f"and {in_units(num_bytes)} of downloads that were not finished", err=True)


_HEAD = ["NAME", "REVISION", "SIZE", "FORMAT", "ARCHITECTURE", "LAST USED"]


def _row(entry: Entry) -> list[str]:
    from penstock.hub.progress import in_units

    refs = f" ({', '.join(entry.refs)})" if entry.refs else ""
    told = _support(entry)
    doubt = " (not supported)" if told["is_supported"] is False else ""
    return [
        entry.name,
        entry.commit[:_SHORT] + refs,
        in_units(entry.num_bytes),
        entry.form + ("" if entry.is_whole else " (not whole)"),
        (told["architecture"] or "-") + doubt,
        _ago(time.time() - entry.last_used_s),
    ]


def _support(entry: Entry) -> dict[str, Any]:
    """The architecture and whether penstock has it; None: not told, or no engine is installed."""
    try:
        from penstock.models.architectures import ARCHITECTURES, POOLING_ARCHITECTURES

        known = entry.architecture or _of_gguf(entry)
    except UnsupportedModel:
        return {"architecture": None, "is_supported": False}
    except (ModuleNotFoundError, ModelLoadError):  # the base install has no numpy
        return {"architecture": entry.architecture, "is_supported": None}
    return {
        "architecture": known,
        "is_supported": None
        if known is None
        else known in ARCHITECTURES or known in POOLING_ARCHITECTURES,
    }


def _of_gguf(entry: Entry) -> str | None:
    """The architecture that a GGUF file says it has."""
    file = next(entry.path.rglob("*.gguf"), None)
    if file is None or not entry.form.startswith("GGUF"):
        return None
    from penstock.models.gguf_model import read_config

    return str(read_config(file)["architectures"][0])


def _ago(age_s: float) -> str:
    for num_s, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if age_s >= num_s:
            count = int(age_s // num_s)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "now"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns side by side; signs that a terminal would obey are shown, not sent."""
    rows = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    return [
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()[:width]
        for row in rows
    ]


def _plain(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def _told(found: Check) -> list[str]:
    from penstock.hub.progress import in_units

    title = f"{found.name} at {found.commit[:_SHORT]}"
    lines = [f"{title}: {found.num_files} files, {in_units(found.num_bytes)}"]
    states: dict[str, Any] = {
        "DAMAGED": found.damaged,
        "MISSING": found.missing,
        "no hash": found.unknown,
    }
    lines += [f"  {state}  {_plain(name)}" for state, names in states.items() for name in names]
    if found.is_right:
        return [*lines, "  all is as the hub announced it" if not found.unknown else "  no damage"]
    again = f"penstock models remove {found.name}@{found.commit[:_SHORT]}"
    return [*lines, f"  {again}, then pull it again"]
