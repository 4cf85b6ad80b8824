"""What lies in the cache: list it, check it, remove it.

Knows the cache's layout and `config.json`; neither network nor which architectures are supported.
Invariant: nothing outside a repository's own folder and its locks is ever removed, and no link is
followed to remove anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, ModelLoadError
from penstock.hub import files
from penstock.hub.cache import PARTIAL, Repo, links, repos, try_lock, writing
from penstock.hub.digests import is_digest, is_intact
from penstock.hub.names import HubName
from penstock.hub.resolve import read_object


@dataclass(slots=True)
class Entry:
    """One snapshot of the cache."""

    name: str  # org/name
    commit: str
    refs: list[str]  # branches and tags that it was when last asked
    num_bytes: int  # of its content; what snapshots share counts in each
    form: str  # "safetensors", "GGUF Q4_K_M", "safetensors gptq 4-bit", or "none"
    architecture: str | None
    is_whole: bool  # all weights are there
    last_used_s: float  # when penstock last took it, or a file was last added; since the epoch
    path: Path


@dataclass(slots=True)
class Check:
    """What was found of one snapshot."""

    name: str
    commit: str
    num_files: int = 0
    num_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # without a hash to check them by

    @property
    def is_right(self) -> bool:
        return not self.damaged and not self.missing


@dataclass(slots=True)
class Removal:
    """What goes, and what stays because another snapshot has it too."""

    repo: Repo
    commits: list[str]
    refs: list[str]
    blobs: list[Path]
    num_bytes: int
    is_all: bool  # nothing of the repository is left


def entries(cache: Path) -> list[Entry]:
    """The snapshots of all models, by name."""
    return [_entry(repo, commit) for repo in repos(cache) for commit in repo.commits()]


def chosen(cache: Path, model: HubName) -> tuple[Repo, list[str]]:
    """The snapshots that a name means: all of the model, or the one of its revision.

    Raises:
        ConfigError: it is not in the cache, or names a variant.
    """
    if model.variant is not None:
        raise ConfigError(
            f"`{model}` names a part of a model.", hint=f"name all of it: `{model.repo}`"
        )
    repo = Repo(cache, model.repo)
    commits = repo.commits()
    if model.revision is not None:
        commits = [commit for commit in commits if commit == repo.commit_of(model.revision or "")]
    with writing(repo.folder):
        is_there = repo.folder.is_dir() and not repo.folder.is_symlink()
    if not is_there or (model.revision is not None and not commits):
        raise ConfigError(
            f"`{model}` is not in the cache `{cache}`.", hint="`penstock models` lists what is"
        )
    for part in ("blobs", "snapshots", "refs"):
        if (repo.folder / part).is_symlink():
            raise ConfigError(
                f"`{repo.folder / part}` is a link, and what is behind it is not ours."
            )
    return repo, commits


def num_bytes_of(repo: Repo, commit: str) -> int:
    """How much there is to read of a snapshot, to check it."""
    return sum(path.stat().st_size for _, path in links(repo.snapshot(commit)) if repo.holds(path))


def check(repo: Repo, commit: str, told: Callable[[int], object]) -> Check:
    """Hash every file of a snapshot again. `told` gets the bytes that were read."""
    found = Check(repo.name, commit)
    root = repo.snapshot(commit)
    for name, path in links(root):
        found.num_files += 1
        digest = Path(os.readlink(path)).name if path.is_symlink() else ""
        if not repo.holds(path):
            found.missing.append(name)
            continue
        found.num_bytes += path.stat().st_size
        if not is_digest(digest):
            found.unknown.append(name)
            continue
        try:
            if not is_intact(path, digest, told):
                found.damaged.append(name)
        except OSError:
            found.damaged.append(name)
    found.missing += _missing_weights(repo, commit, found)
    return found


def plan_removal(repo: Repo, commits: list[str]) -> Removal:
    """What `remove` would do: the snapshots, and the blobs that no other has."""
    others = [commit for commit in repo.commits() if commit not in commits]
    kept = {path.name for commit in others for path in _blobs(repo, commit)}
    blobs = [path for path in _scan(repo.folder / "blobs") if path.name not in kept]
    if others:  # what is not whole may belong to them
        gone = {path.name for commit in commits for path in _blobs(repo, commit)}
        blobs = [path for path in blobs if path.name in gone]
    refs = [name for name, commit in repo.refs().items() if commit in commits or not others]
    num_bytes = sum(path.lstat().st_size for path in blobs)
    return Removal(repo, commits, sorted(refs), blobs, num_bytes, is_all=not others)


def remove(removal: Removal) -> None:
    """Remove it: first what makes it visible, then its content.

    Raises:
        ConfigError: it is being downloaded, or the cache cannot be written.
    """
    repo = removal.repo
    with _alone(repo), writing(repo.folder):
        for ref in removal.refs:
            (repo.folder / "refs" / ref).unlink(missing_ok=True)
        for commit in removal.commits:
            root = repo.snapshot(commit)
            root.unlink() if root.is_symlink() else shutil.rmtree(root)
        if removal.is_all:
            shutil.rmtree(repo.folder)  # which follows no link
            shutil.rmtree(repo.locks(), ignore_errors=True)
            return
        for blob in removal.blobs:
            blob.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(repo: Repo) -> Iterator[None]:
    """Hold all locks that there are, so that nobody is amid a download."""
    with contextlib.ExitStack() as stack:
        for path in sorted(repo.locks().glob("*.lock")) if repo.locks().is_dir() else []:
            if path.is_symlink():
                continue
            if (fd := try_lock(path)) is None:
                raise ConfigError(f"`{repo.name}` is being downloaded; stop that first.")
            stack.callback(os.close, fd)
        yield


def _entry(repo: Repo, commit: str) -> Entry:
    names = repo.files(commit)
    root = repo.snapshot(commit)
    stats = {name: (root / name).stat() for name in names}
    config: dict[str, Any] = {}
    with contextlib.suppress(ModelLoadError):
        config = read_object(root / "config.json") if "config.json" in names else {}
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    form, is_whole = _form(repo, root, names, config)
    return Entry(
        name=repo.name,
        commit=commit,
        refs=sorted(name for name, known in repo.refs().items() if known == commit),
        num_bytes=sum({stat.st_ino: stat.st_size for stat in stats.values()}.values()),
        form=form,
        architecture=first if isinstance(first, str) else None,
        is_whole=is_whole,
        last_used_s=root.stat().st_mtime,
        path=root,
    )


def _form(repo: Repo, root: Path, names: list[str], config: dict[str, Any]) -> tuple[str, bool]:
    """The format of the weights with its quantization, and whether all weights are there."""
    gguf = [files.label(stem) or "?" for stem in files.variants(names)]
    if any(name.endswith(".safetensors") for name in names):
        form = "safetensors" + _quantization(config)
        try:
            files.weight_files(repo.name, names, None, lambda name: read_object(root / name))
        except ModelLoadError:
            return form, False
        return form, True
    if gguf:
        return "GGUF " + ", ".join(sorted(gguf)), True
    return "none", False


def _quantization(config: dict[str, Any]) -> str:
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(method, str):
        return ""
    bits = said.get("bits") if isinstance(said, dict) else None
    return f" {method[:30]}" + (f" {bits}-bit" if type(bits) is int else "")


def _missing_weights(repo: Repo, commit: str, found: Check) -> list[str]:
    """Shards that the index names and that are not in the snapshot at all."""
    root = repo.snapshot(commit)
    try:
        shards = read_object(root / files.INDEX).get("weight_map")
    except ModelLoadError:
        return []
    named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
    return sorted(named - {name for name, _ in links(root)} - set(found.missing))


def _blobs(repo: Repo, commit: str) -> Iterator[Path]:
    for _, path in links(repo.snapshot(commit)):
        if path.is_symlink():
            yield repo.folder / "blobs" / Path(os.readlink(path)).name


def _scan(directory: Path) -> list[Path]:
    try:
        return sorted(directory / entry.name for entry in os.scandir(directory))
    except OSError:
        return []


def partial_bytes(cache: Path) -> int:
    """How much lies in the cache that was not downloaded to its end."""
    found = [
        path
        for repo in repos(cache)
        for path in _scan(repo.folder / "blobs")
        if path.name.endswith(PARTIAL)
    ]
    return sum(path.lstat().st_size for path in found)
