"""Blobs from a hub into the cache: resumed, checked, a few at a time.

Owns how bytes come onto the disk. Knows no model.
Invariant: a blob gets its name only after all of it was written, hashed and synced. What lies under
the partial name is a beginning that came in order; only who holds the blob's lock writes it.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from penstock.errors import ConfigError, ModelLoadError, PenstockError
from penstock.hub.cache import Repo, writing
from penstock.hub.client import Client, RemoteFile, Unavailable, seconds_to_wait
from penstock.hub.digests import Hash, hash_for
from penstock.hub.progress import Progress, in_units, tell

MAX_PARALLEL = 4  # files at a time
MAX_ATTEMPTS = 6  # without a byte in between
RANGE_BYTES = 8 << 30  # of one request; stores in front of hubs refuse answers of 50 GB and more
_CHUNK_BYTES = 1 << 20
_JOIN_S = 2.0  # for threads that were told to stop; a read may take longer, and writes no more
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def download(hub: Client, repo: Repo, commit: str, files: Sequence[RemoteFile]) -> None:
    """Bring the content of these files into the cache and show them in the commit's snapshot.

    Files whose content is there are not fetched. Interrupted, by whatever, it goes on where it was.

    Raises:
        ModelLoadError: the hub fails, or a file is not what the hub announced; it is removed then.
        ConfigError: there is not enough room, or the cache cannot be written.
        KeyboardInterrupt: and all that came is kept.
    """
    by_digest = {_digest(file): file for file in files}  # two may have the same content
    with writing(repo.folder):
        missing = [file for file in by_digest.values() if not _blob(repo, file).is_file()]
        kept_bytes = sum(_num_kept_bytes(repo, file) for file in missing)
        total = sum(_size(file) for file in missing)
        if missing:
            check_room(repo.cache, total - kept_bytes)
    if missing:
        tell(_opening(repo, commit, missing, total, kept_bytes))
        with Progress(f"downloading {repo.name}", total) as progress:
            _in_parallel([_Fetch(hub, repo, commit, file, progress) for file in missing])
    for file in files:
        repo.link(commit, file.name, _digest(file))


def check_room(cache: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ConfigError: the file system of the cache has less room.
    """
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if num_bytes > free_bytes:
        raise ConfigError(
            f"The download needs {in_units(num_bytes)}, and `{cache}` has {in_units(free_bytes)} "
            "of free room.",
            hint="`penstock models remove` makes room; HF_HOME names another directory",
        )


def _opening(
    repo: Repo, commit: str, files: Sequence[RemoteFile], total_bytes: int, kept_bytes: int
) -> str:
    what = f"`{files[0].name}`" if len(files) == 1 else f"{len(files)} files"
    kept = f", {in_units(kept_bytes)} of them are here" if kept_bytes else ""
    return f"downloading {repo.name} at {commit[:8]}: {what}, {in_units(total_bytes)}{kept}"


def _in_parallel(fetches: Sequence[_Fetch]) -> None:
    """Run them all, a few at a time; the first error stops the others and is raised."""
    waiting: SimpleQueue[_Fetch] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    stop = threading.Event()
    for fetch in fetches:
        waiting.put(fetch)

    def work() -> None:
        error: BaseException | None = None
        try:
            while not stop.is_set():
                waiting.get_nowait()(stop)
        except Empty:
            pass
        except BaseException as found:  # noqa: BLE001 - raised by who waits
            error = found
        done.put(error)

    threads = [
        threading.Thread(target=work, name="penstock-download", daemon=True)
        for _ in range(min(MAX_PARALLEL, len(fetches)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if (error := done.get()) is not None:
                raise error
    finally:
        stop.set()
        for thread in threads:
            thread.join(_JOIN_S)


class _Stopped(Exception):
    """Another file failed, or the user stopped it."""


class _Wrong(Exception):
    """The content is not what was announced."""


class _Fetch:
    """One blob on its way."""

    def __init__(
        self, hub: Client, repo: Repo, commit: str, file: RemoteFile, progress: Progress
    ) -> None:
        self._hub, self._repo, self._commit = hub, repo, commit
        self._name, self._digest, self._size = file.name, _digest(file), _size(file)
        self._progress = progress
        self._hash: Hash = hash_for(self._digest, self._size)
        self._stop = threading.Event()
        self._num_shown_bytes = 0

    def __call__(self, stop: threading.Event) -> None:
        """Fetch it, unless another process does while we wait.

        Raises:
            ModelLoadError, ConfigError: see `download`.
        """
        self._stop = stop
        blob, partial = self._repo.blob(self._digest), self._repo.partial(self._digest)
        try:
            with writing(blob):
                blob.parent.mkdir(parents=True, exist_ok=True)
            with self._repo.lock(self._digest, self._wait_for_another()):
                if not blob.is_file():
                    self._fetch(partial)
                    with writing(blob):
                        os.replace(partial, blob)
        except _Stopped:
            return
        self._show(self._size)

    def _wait_for_another(self) -> Callable[[], None]:
        told = threading.Event()

        def wait() -> None:
            if not told.is_set():
                told.set()
                tell(f"`{self._name}` is being downloaded by another process; waiting for it")
            self._check_stop()

        return wait

    def _fetch(self, partial: Path) -> None:
        """Fill the partial file; begin anew once, if what was kept of it turns out to be wrong."""
        try:
            had_bytes = partial.stat().st_size if partial.is_file() else 0
            try:
                self._fill(partial)
            except _Wrong:
                partial.unlink(missing_ok=True)
                if not had_bytes:
                    raise
                tell(f"what was kept of `{self._name}` is damaged; fetching it anew")
                self._fill(partial)
        except _Wrong as error:
            partial.unlink(missing_ok=True)
            raise ModelLoadError(
                f"`{self._name}` of `{self._repo.name}` is not what the hub announced: {error}. "
                "It is removed.",
                hint="try again; if it stays so, the file on the hub or the way to it is damaged",
            ) from None
        except OSError as error:
            room = error.errno in _FULL
            raise ConfigError(
                f"`{partial}` cannot be written: {error.strerror or error}.",
                hint="`penstock models remove` makes room; the download goes on where it was"
                if room
                else "HF_HOME names another directory for models",
            ) from error

    def _fill(self, partial: Path) -> None:
        """Append to the partial file until it is whole, and check it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o644), "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > self._size:
                file.truncate(0)
            self._hash_kept(file)
            num_failed = 0
            while (offset := file.tell()) < self._size:
                try:
                    self._append(file)
                    error: Exception | None = None
                except Unavailable as refused:
                    if not refused.is_passing:
                        raise
                    error = refused
                except (http.client.HTTPException, _Broken) as broken:
                    error = broken
                num_failed = 0 if file.tell() > offset else num_failed + 1
                if error is not None or num_failed:
                    self._pause(num_failed, error)
            found = self._hash.hexdigest()
            if found != self._digest:
                raise _Wrong(f"its hash is `{found}`, not `{self._digest}`")
            os.fsync(file.fileno())

    def _hash_kept(self, file: Any) -> None:
        """Hash what is there; the file stands at its end then."""
        buffer = bytearray(_CHUNK_BYTES)
        self._hash = hash_for(self._digest, self._size)
        file.seek(0)
        self._show(0)
        while num_bytes := file.readinto(buffer):
            self._check_stop()
            self._hash.update(memoryview(buffer)[:num_bytes])
            self._show(file.tell())

    def _append(self, file: Any) -> None:
        """One request from where the file ends. Whatever ends it, hash and file are of one mind."""
        first = file.tell()
        last = min(first + RANGE_BYTES, self._size) - 1
        with self._hub.content(self._commit, self._name, first, last) as answer:
            if answer.status == 200 and first:  # it does not know ranges: all comes again
                file.truncate(0)
                self._hash_kept(file)
            elif answer.status == 206:
                _check_range(answer.headers.get("Content-Range"), first, self._size)
            while piece := memoryview(_read(answer)):
                self._check_stop()
                if file.tell() + len(piece) > self._size:
                    raise _Wrong(f"it is longer than `{self._size}` bytes")
                self._hash.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
                self._show(file.tell())

    def _pause(self, num_failed: int, error: Exception | None) -> None:
        if num_failed >= MAX_ATTEMPTS:
            if isinstance(error, PenstockError):
                raise error
            raise Unavailable(
                f"The hub does not give `{self._name}` of `{self._repo.name}`: "
                f"{error or 'its answers are empty'}.",
                hint="run it again: what has come is kept",
            )
        if self._stop.wait(seconds_to_wait(num_failed, error)):
            raise _Stopped

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _show(self, num_bytes: int) -> None:
        """So much of the file is there."""
        self._progress.add(num_bytes - self._num_shown_bytes)
        self._num_shown_bytes = num_bytes


class _Broken(Exception):
    """The connection broke, or what came makes no sense; another request may help."""


def _read(answer: Any) -> bytes:
    """What has come of an answer; what fails here is the network, not the disk.

    Never waits for more than there is: what has come before a connection breaks would be lost.
    """
    try:
        piece: bytes = answer.read1(_CHUNK_BYTES)
    except OSError as error:
        raise _Broken(str(error) or type(error).__name__) from None
    return piece


def _check_range(told: str | None, first: int, size: int) -> None:
    found = re.fullmatch(r"bytes (\d{1,16})-\d{1,16}/(\d{1,16}|\*)", told or "", re.ASCII)
    if found is None or int(found[1]) != first:
        raise _Broken(f"the answer holds `{ascii(told)[:60]}`, not what follows byte `{first}`")
    if found[2] != "*" and int(found[2]) != size:
        raise _Wrong(f"it has `{found[2]}` bytes, not `{size}`")


def _digest(file: RemoteFile) -> str:
    assert file.digest is not None, "the hub was asked"
    return file.digest


def _size(file: RemoteFile) -> int:
    assert file.num_bytes is not None, "the hub was asked"
    return file.num_bytes


def _blob(repo: Repo, file: RemoteFile) -> Path:
    return repo.blob(_digest(file))


def _num_kept_bytes(repo: Repo, file: RemoteFile) -> int:
    try:
        num_bytes = repo.partial(_digest(file)).stat().st_size
    except OSError:
        return 0
    return num_bytes if num_bytes <= _size(file) else 0
