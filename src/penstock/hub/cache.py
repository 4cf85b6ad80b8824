"""The cache on disk, in the layout that Hugging Face's tools share.

    models--org--name/blobs/<hash>                  content, named by its hash
    models--org--name/refs/<branch or tag>          the commit that it was when last asked
    models--org--name/snapshots/<commit>/<file>     a link to the blob
    .locks/models--org--name/<hash>.lock            held by who downloads a blob (flock, as theirs)

Owns paths, links, refs and locks. Knows no network.
Invariant: what stands under a blob's name was written whole and checked; a link or a ref appears
in one step or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import ConfigError, ModelLoadError
from penstock.hub.names import is_commit, is_safe_file

PARTIAL = ".penstock.incomplete"  # our own: others write theirs in other orders than from the start
_PREFIX = "models--"
_POLL_S = 0.1
_MAX_REF_CHARACTERS = 100
_MAX_FILES = 100_000  # of one snapshot; more is no model


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository's part of the cache."""

    cache: Path
    name: str  # org/name

    @property
    def folder(self) -> Path:
        return self.cache / (_PREFIX + self.name.replace("/", "--"))

    def blob(self, digest: str) -> Path:
        """Where the content with this hash lies, once it is whole."""
        return self.folder / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """Where as much of it lies as has come."""
        return self.folder / "blobs" / (digest + PARTIAL)

    def snapshot(self, commit: str) -> Path:
        """The directory that looks like the repository at a commit."""
        return self.folder / "snapshots" / commit

    def locks(self) -> Path:
        """Where its locks lie."""
        return self.cache / ".locks" / self.folder.name

    def commits(self) -> list[str]:
        """The commits of which there is a snapshot."""
        with contextlib.suppress(OSError):
            found = [
                entry.name for entry in os.scandir(self.folder / "snapshots") if entry.is_dir()
            ]
            return sorted(filter(is_commit, found))
        return []

    def refs(self) -> dict[str, str]:
        """Branches and tags, and the commits that they were."""
        root, found = self.folder / "refs", {}
        for directory, _, files in os.walk(root):
            for file in files:
                path = Path(directory) / file
                if (commit := _commit_in(path)) is not None:
                    found[str(path.relative_to(root))] = commit
        return found

    def commit_of(self, revision: str) -> str | None:
        """The commit of a branch, tag, commit or its first digits (7 or more), if it is here."""
        if is_commit(revision):
            return revision if revision in self.commits() else None
        if (known := self.refs().get(revision)) is not None:
            return known
        found = [commit for commit in self.commits() if commit.startswith(revision)]
        return found[0] if len(found) == 1 and len(revision) >= 7 else None

    def files(self, commit: str) -> list[str]:
        """Names of the files of a snapshot whose content is there and lies in this repository."""
        root = self.snapshot(commit)
        return [name for name, path in links(root) if self.holds(path)]

    def holds(self, path: Path) -> bool:
        """Whether a file of a snapshot is there, and is no link out of the cache.

        A blob may itself be a link to content that repositories share, elsewhere in the cache.
        """
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        return target.is_file() and target.is_relative_to(self.cache.resolve())

    def link(self, commit: str, file: str, digest: str) -> None:
        """Show a blob as a file of a snapshot.

        Raises:
            ConfigError: the file system cannot hold the link.
        """
        assert is_commit(commit)
        assert is_safe_file(file)
        path = self.snapshot(commit) / file
        target = os.path.relpath(self.blob(digest), path.parent)
        with writing(path):
            if path.is_symlink() and os.readlink(path) == target:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{secrets.token_hex(8)}")
            try:
                os.symlink(target, fresh)
                os.replace(fresh, path)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise

    def touch(self, path: Path) -> None:
        """Remember, where the file system lets us, that the snapshot of a path is used now."""
        root = self.folder / "snapshots"
        with contextlib.suppress(OSError):
            os.utime(root / path.relative_to(root).parts[0])

    def write_ref(self, revision: str, commit: str) -> None:
        """Remember which commit a branch or tag was.

        Raises:
            ConfigError: it cannot be written.
        """
        if revision == commit:
            return
        path = self.folder / "refs" / revision
        with writing(path):
            if _commit_in(path) == commit:  # a cache that is whole may be one to read only
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{secrets.token_hex(8)}")
            try:
                fresh.write_text(commit)
                os.replace(fresh, path)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def lock(self, digest: str, on_wait: Callable[[], object]) -> Iterator[None]:
        """Be the only one, of all processes, who downloads this blob.

        Args:
            on_wait: called again and again while another has the lock; it may raise.
        """
        path = self.locks() / f"{digest}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        while (fd := try_lock(path)) is None:
            on_wait()
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            os.close(fd)  # which unlocks; so does the end of the process, whatever ends it


def _commit_in(ref: Path) -> str | None:
    """The commit that a ref names; None: it is no file of ours, which may be anything."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if stat.S_ISREG(ref.lstat().st_mode):
            with ref.open() as opened:
                text = opened.read(_MAX_REF_CHARACTERS).strip()
            return text if is_commit(text) else None
    return None


def try_lock(path: Path) -> int | None:
    """Take the lock of a file, if nobody has it: what to close to give it back.

    Raises:
        ConfigError: the file cannot be made or locked.
    """
    with writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        except (BlockingIOError, FileNotFoundError):  # held, or removed by who held it
            pass
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        return None


def repos(cache: Path) -> list[Repo]:
    """The models of the cache, by name."""
    try:
        found = [entry.name for entry in os.scandir(cache) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    names = [name.removeprefix(_PREFIX) for name in found if name.startswith(_PREFIX)]
    return [Repo(cache, name.replace("--", "/")) for name in sorted(names) if name.count("--") <= 1]


def links(root: Path) -> Iterator[tuple[str, Path]]:
    """The files of a snapshot: name and path, in order; directories that are links are not entered.

    Raises:
        ModelLoadError: there are more than any model has.
    """
    num_files = 0
    for directory, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            num_files += 1
            if num_files > _MAX_FILES:
                raise ModelLoadError(f"`{root}` has more than `{_MAX_FILES}` files.")
            path = Path(directory) / file
            yield path.relative_to(root).as_posix(), path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says when the cache cannot be written into a sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"`{path}` of the model cache cannot be written: {error.strerror or error}.",
            hint="HF_HOME names another directory for models",
        ) from error
