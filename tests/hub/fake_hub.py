"""A hub of models on the loopback interface, with a store on another port, and what can go wrong.

It speaks as much of the Hugging Face hub's protocol as a download needs. Large files (`lfs`) are
redirected to the store, as the real one does.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".gguf", ".bin")
_PIECE_BYTES = 1 << 14


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def digest_of(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_sha1(content)


@dataclass
class Asked:
    """One request as it arrived."""

    server: str  # "hub" or "store"
    method: str
    path: str
    authorization: str | None
    span: str | None  # the header Range
    num_sent_bytes: int = 0


@dataclass
class Repository:
    """The commits of one model."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


class FakeHub:
    """Use it with `with`. Faults are attributes, to be set before the download."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.token: str | None = None  # what must be shown
        self.refusal = (401, "RepoNotFound")  # who does not show it
        self.statuses: dict[str, list[int]] = {}  # "listing" or a file: answers to come first
        self.store_statuses: dict[str, list[int]] = {}
        self.headers: dict[str, str] = {}  # of those
        self.breaks: dict[str, list[int]] = {}  # a file: bytes after which a connection breaks
        self.contents: dict[str, bytes] = {}  # a file: other bytes than those that are announced
        self.gates: dict[str, threading.Event] = {}  # a file: its second half waits for this
        self.halves: dict[str, threading.Event] = {}  # a file: its first half was sent
        self.without_ranges: set[str] = set()
        self.encodings: dict[str, str] = {}  # a file: what its header Content-Encoding says
        self.sizes: dict[str, int] = {}  # a file: another size than it has
        self.is_terse = False  # whether the listing says neither hashes nor sizes
        self.listing: Any = None  # instead of the real one
        self.extra_names: list[str] = []
        self.redirect: str | None = None  # of large files, instead of the store
        self.hub = _Server("hub", self)
        self.store = _Server("store", self)

    @property
    def url(self) -> str:
        return self.hub.url

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit, which `revision` is then."""
        told = repr(sorted((name, digest_of(name, data)) for name, data in files.items()))
        commit = hashlib.sha1(told.encode()).hexdigest()
        repository = self.repositories.setdefault(repo, Repository())
        repository.commits[commit] = dict(files)
        repository.revisions[revision] = commit
        return commit

    def fetched(self, name: str) -> list[Asked]:
        """The requests for the content of a file, wherever it came from."""
        return [
            asked
            for asked in self.asked
            if asked.path.endswith("/" + name) and asked.method == "GET" and asked.num_sent_bytes
        ]

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.set()
        for server in (self.hub, self.store):
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, role: str, fake: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role, self.fake = role, fake
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def handle_error(self, *_: object) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        fake, role = self.server.fake, self.server.role
        asked = Asked(
            role, self.command, self.path, self.headers["Authorization"], self.headers["Range"]
        )
        fake.asked.append(asked)
        if role == "store":
            self._store(asked)
        elif fake.token is not None and asked.authorization != f"Bearer {fake.token}":
            self._say(fake.refusal[0], {"X-Error-Code": fake.refusal[1]})
        elif self.path.startswith("/api/models/"):
            self._listing()
        else:
            self._resolve(asked)

    def _listing(self) -> None:
        fake, url = self.server.fake, urlsplit(self.path)
        if planned := fake.statuses.get("listing"):
            self._say(planned.pop(0), fake.headers)
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", url.path)
        repository = fake.repositories.get(found[1]) if found else None
        commit = self._commit(repository, unquote(found[2])) if found and repository else None
        if repository is None or commit is None:
            self._say(404, {"X-Error-Code": "RevisionNotFound" if repository else "RepoNotFound"})
            return
        assert parse_qs(url.query) == {"blobs": ["true"]}
        files = repository.commits[commit]
        siblings = [self._sibling(name, data) for name, data in files.items()]
        siblings += [{"rfilename": name, "size": 1} for name in fake.extra_names]
        content = {"id": found[1] if found else "", "sha": commit, "siblings": siblings}
        body = json.dumps(content if fake.listing is None else fake.listing).encode()
        self._say(200, {"Content-Type": "application/json"}, body)

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        fake = self.server.fake
        if fake.is_terse:
            return {"rfilename": name}
        size = fake.sizes.get(name, len(data))
        told: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_sha1(data)}
        if name.endswith(LFS):
            told["lfs"] = {"sha256": digest_of(name, data), "size": size, "pointerSize": 134}
        return told

    def _resolve(self, asked: Asked) -> None:
        fake = self.server.fake
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(self.path))
        repository = fake.repositories.get(found[1]) if found else None
        commit = self._commit(repository, found[2]) if found and repository else None
        name = found[3] if found else ""
        files = repository.commits[commit] if repository and commit else {}
        if name not in files:
            self._say(404, {"X-Error-Code": "EntryNotFound"})
            return
        if planned := fake.statuses.get(name):
            self._say(planned.pop(0), fake.headers)
            return
        data = files[name]
        headers = {"X-Repo-Commit": str(commit), "ETag": f'"{digest_of(name, data)}"'}
        if not name.endswith(LFS):
            self._content(asked, name, data, headers)
            return
        headers["X-Linked-Etag"], headers["X-Linked-Size"] = headers.pop("ETag"), str(len(data))
        target = f"{self.server.fake.store.url}/{found[1] if found else ''}/{commit}/{name}"
        self._say(302, headers | {"Location": fake.redirect or target})

    def _store(self, asked: Asked) -> None:
        fake = self.server.fake
        org, repo, commit, name = unquote(self.path).lstrip("/").split("/", 3)
        if planned := fake.store_statuses.get(name):
            self._say(planned.pop(0), fake.headers)
            return
        data = fake.repositories[f"{org}/{repo}"].commits[commit][name]
        self._content(asked, name, data, {"ETag": '"of-the-store"'})

    def _content(self, asked: Asked, name: str, data: bytes, headers: dict[str, str]) -> None:
        fake = self.server.fake
        data = fake.contents.get(name, data)
        if name in fake.encodings:
            headers["Content-Encoding"] = fake.encodings[name]
        first, last = 0, len(data) - 1
        if asked.span is not None and name not in fake.without_ranges:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.span)
            assert found
            first, last = int(found[1]), min(int(found[2] or last), last)
            if first > last:
                self._say(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        part = data[first : last + 1]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        planned = fake.breaks.get(name)
        limit = planned.pop(0) if planned else None
        for start in range(0, len(part), _PIECE_BYTES):
            piece = part[start : start + _PIECE_BYTES]
            if limit is not None and start + len(piece) > limit:
                self._send(asked, piece[: max(limit - start, 0)])
                self._break()
                return
            if name in fake.gates and start >= len(part) // 2:
                fake.halves.setdefault(name, threading.Event()).set()
                fake.gates[name].wait(30)
            self._send(asked, piece)

    def _send(self, asked: Asked, piece: bytes) -> None:
        self.wfile.write(piece)
        asked.num_sent_bytes += len(piece)

    def _break(self) -> None:
        """End the connection with a reset, as a network that fails does."""
        linger = struct.pack("ii", 1, 0)
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def _commit(self, repository: Repository, revision: str) -> str | None:
        if revision in repository.revisions:
            return repository.revisions[revision]
        found = [commit for commit in repository.commits if commit.startswith(revision)]
        return found[0] if found else None

    def _say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def total_bytes(asked: Iterable[Asked]) -> int:
    return sum(one.num_sent_bytes for one in asked)
