"""What is asked of a hub over HTTP, and what its refusals mean.

Owns requests, redirects and the sentences for 401, 403, 404, 429 and a network that fails. Knows no
disk. Over the standard library's HTTP: model files are few and long, and nothing of a session is
worth keeping between them.
Invariant: the token goes to the endpoint's own scheme, host and port, and to nobody else; no
sentence or log line holds it.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

import msgspec

from penstock import __version__
from penstock.errors import ModelLoadError
from penstock.hub.digests import is_digest
from penstock.hub.names import HubName, is_commit, is_safe_file
from penstock.hub.progress import tell
from penstock.hub.settings import Endpoint

_MAX_LISTING_BYTES = 32 << 20
_MAX_LISTING_S = 60.0
_MAX_FILE_BYTES = 1 << 50
_MAX_FILES = 50_000  # of a listing; each is looked at for what it may be
_PIECE_BYTES = 1 << 16
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_WAIT_S = 60.0  # what a server may ask for
_TOLD_WAIT_S = 4.0
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before the second attempt, the third, ...

Answer = TypeVar("Answer")


class Unavailable(ModelLoadError):
    """The hub did not give what was asked; `is_passing` if it may, when asked again.

    `status` is that of its answer, `wait_s` how long it asks to be left alone, where it said.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        is_passing: bool = False,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.is_passing = is_passing
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository as the hub announces it. Not every hub says all in its listing."""

    name: str
    num_bytes: int | None
    digest: str | None  # SHA-256 or git's SHA-1 of a blob


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: dict[str, RemoteFile]


class _Lfs(msgspec.Struct):
    sha256: str | None = None
    size: int | None = None


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blob_id: str | None = msgspec.field(default=None, name="blobId")
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []


class Client:
    """A hub, asked about one model."""

    def __init__(self, endpoint: Endpoint, model: HubName, num_attempts: int = 4) -> None:
        """Args:
        num_attempts: for what is short, where the hub may give it when asked again.
        """
        self._endpoint, self._model = endpoint, model
        self._num_attempts = num_attempts
        self._opener = _opener(endpoint)

    def listing(self, revision: str) -> Listing:
        """The files at a branch, tag or commit. Names that are not safe are not among them.

        Raises:
            Unavailable: the hub refuses, does not answer, or answers with something else.
        """
        path = f"/api/models/{self._model.repo}/revision/{quote(revision, safe='')}?blobs=true"
        content = self._patiently(path, "the list of files", _read_all)
        try:
            info = msgspec.json.decode(content, type=_Info)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._nonsense(f"its list of files: {error}") from None
        if not is_commit(info.sha) or (is_commit(revision) and info.sha != revision):
            raise self._nonsense(f"`{ascii(info.sha)[1:-1][:60]}` for the commit of `{revision}`")
        if len(info.siblings) > _MAX_FILES:
            raise self._nonsense(f"a list of `{len(info.siblings)}` files, over `{_MAX_FILES}`")
        files = [_remote(found) for found in info.siblings if is_safe_file(found.rfilename)]
        return Listing(info.sha, {file.name: file for file in files})

    def announced(self, commit: str, name: str) -> RemoteFile:
        """Ask for size and hash of one file, where the listing does not say them.

        Raises:
            Unavailable: the hub refuses, does not answer, or does not say them.
        """
        path = _file_path(self._model.repo, commit, name)
        headers = self._patiently(path, f"`{name}`", lambda answer: answer.headers, "HEAD")
        digest = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
        digest = digest.removeprefix("W/").strip('"')
        num_bytes = _number(headers.get("X-Linked-Size") or headers.get("Content-Length"))
        if not is_digest(digest) or num_bytes is None:
            raise self._nonsense(f"neither hash nor size of `{name}` that can be checked")
        return RemoteFile(name, num_bytes, digest)

    @contextlib.contextmanager
    def content(self, commit: str, name: str, first: int, last: int) -> Iterator[Any]:
        """The answer with bytes `first` to `last` of a file, both included; status 200: with all.

        Raises:
            Unavailable: the hub refuses or does not answer; reading may raise OSError and
                http.client.HTTPException besides.
        """
        path = _file_path(self._model.repo, commit, name)
        with self._open(path, f"`{name}`", Range=f"bytes={first}-{last}") as answer:
            yield answer

    def _patiently(
        self, path: str, what: str, read: Callable[[Any], Answer], method: str = "GET"
    ) -> Answer:
        for attempt in range(1, self._num_attempts + 1):
            try:
                with self._open(path, what, method) as answer:
                    return read(answer)
            except Unavailable as error:
                if not error.is_passing or attempt == self._num_attempts:
                    raise
                time.sleep(seconds_to_wait(attempt, error))
        raise AssertionError("the last attempt returns or raises")

    @contextlib.contextmanager
    def _open(self, path: str, what: str, method: str = "GET", **headers: str) -> Iterator[Any]:
        request = Request(self._endpoint.url + path, method=method, headers=headers)
        request.add_header("User-Agent", f"penstock/{__version__}")
        request.add_header("Accept-Encoding", "identity")  # a part of a compressed file is no use
        if self._endpoint.token is not None:
            # urllib takes such a header along to no other request
            request.add_unredirected_header("Authorization", f"Bearer {self._endpoint.token}")
        try:
            answer = self._opener.open(request, timeout=self._endpoint.timeout_s)
        except HTTPError as error:
            error.close()
            raise self._refused(error, what) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(what, error) from None
        with answer:
            if (answer.headers.get("Content-Encoding") or "identity").lower() != "identity":
                raise self._nonsense(f"{what} in an encoding that was not asked for")
            yield answer

    # --- sentences ---

    def _refused(self, error: HTTPError, what: str) -> Unavailable:
        model, status, host = self._model, error.code, self._endpoint.url
        page = f"{self._endpoint.url}/{model.repo}"
        code = error.headers.get("X-Error-Code") or ""
        if _origin(error.url) != _origin(host):  # the store behind it; what it was told may be old
            store = urlsplit(error.url).hostname
            return Unavailable(
                f"`{store}`, where `{host}` sends for {what} of `{model}`, answers with status "
                f"{status}.",
                status=status,
                is_passing=status in _RETRIED or status == 403,
            )
        if status == 403 or code == "GatedRepo":
            return Unavailable(
                f"`{host}` refuses `{model}` (status {status}): the model is gated or private.",
                hint=f"ask for access at {page}, and set HF_TOKEN to a token that may read it"
                + ("" if self._endpoint.token is None else "; the one that is set may not"),
                status=status,
            )
        if status == 401:
            return Unavailable(
                f"`{host}` refuses `{model}` (status 401): there is no such model, or it is "
                "private or gated"
                + (", and no token is set." if self._endpoint.token is None else ".")
                + (" The token that is set is not taken." if self._endpoint.token else ""),
                hint=f"check the name at {page}; HF_TOKEN holds a token that may read the model",
                status=status,
            )
        if status == 404:
            named = f" at `{model.revision}`" if model.revision else ""
            return Unavailable(
                f"`{host}` has no model `{model.repo}`{named}, or does not show it "
                f"(status 404 for {what}).",
                hint=f"check name and revision at {page}; a private model needs HF_TOKEN",
                status=status,
            )
        wait_s = _number(error.headers.get("Retry-After"))
        return Unavailable(
            f"`{host}` answers with status {status} for {what} of `{model}`.",
            hint="too many requests: a token in HF_TOKEN has a higher limit"
            if status == 429
            else None,
            status=status,
            is_passing=status in _RETRIED,
            wait_s=None if wait_s is None else min(float(wait_s), _MAX_WAIT_S),
        )

    def _unreachable(self, what: str, error: Exception) -> Unavailable:
        reason = error.reason if isinstance(error, URLError) else error
        told = str(reason) or type(reason).__name__
        return Unavailable(
            f"`{self._endpoint.url}` does not give {what} of `{self._model}`: {told}.",
            hint="HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1 takes what is in the cache",
            is_passing=True,
        )

    def _nonsense(self, what: str) -> Unavailable:
        return Unavailable(
            f"`{self._endpoint.url}` gives {what}, for `{self._model}`.",
            hint="does HF_ENDPOINT name a hub of models?",
        )


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https, never from https to http; the token stays where it belongs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        is_home = _origin(newurl) == _origin(self._endpoint.url)
        if req.get_method() == "HEAD" and not is_home:
            return None  # the hub has said what is to be known; its store would say less
        fresh = super().redirect_request(req, fp, code, msg, headers, newurl)
        fp.close()  # urllib would read all of it, however much comes
        if fresh is not None:
            fresh.method = req.get_method()
            if is_home and self._endpoint.token is not None:
                fresh.add_unredirected_header("Authorization", f"Bearer {self._endpoint.token}")
        return fresh

    def http_error_302(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        """The answer behind a redirect; of HEAD the redirect itself, where it leads away."""
        try:
            target = urljoin(req.full_url, headers.get("Location", ""))
            schemes = {"https"} if urlsplit(req.full_url).scheme == "https" else {"http", "https"}
            if urlsplit(target).scheme not in schemes:
                raise URLError(f"a redirect leads to what is not {' or '.join(sorted(schemes))}")
            answer = super().http_error_302(req, fp, code, msg, headers)
        except HTTPError:  # which holds the answer
            raise
        except BaseException:
            fp.close()
            raise
        return fp if answer is None and req.get_method() == "HEAD" else answer

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def seconds_to_wait(num_failed: int, error: Exception | None) -> float:
    """How long to leave a hub alone after so many failures; a long wait is told."""
    wait_s = WAITS_S[min(max(num_failed, 1), len(WAITS_S)) - 1]
    if isinstance(error, Unavailable) and error.wait_s is not None:
        wait_s = error.wait_s
    if wait_s >= _TOLD_WAIT_S:
        told = error.message.rstrip(".") if isinstance(error, Unavailable) else "The hub fails"
        tell(f"{told}; asking again in {wait_s:.0f} s")
    return wait_s


def _opener(endpoint: Endpoint) -> OpenerDirector:
    opener = build_opener(_Redirects(endpoint))
    opener.addheaders = []
    return opener


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _file_path(repo: str, commit: str, name: str) -> str:
    return f"/{repo}/resolve/{commit}/{quote(name)}"


def _remote(found: _Sibling) -> RemoteFile:
    lfs = found.lfs
    digest = found.blob_id if lfs is None else lfs.sha256
    size = found.size if lfs is None or lfs.size is None else lfs.size
    is_size = size is not None and 0 <= size <= _MAX_FILE_BYTES
    is_right = digest is not None and is_digest(digest) and is_size
    return RemoteFile(found.rfilename, size if is_right else None, digest if is_right else None)


def _number(text: str | None) -> int | None:
    is_number = text is not None and re.fullmatch(r"[0-9]{1,15}", text.strip(), re.ASCII)
    return int(text) if text is not None and is_number else None


def _read_all(answer: Any) -> bytes:
    """A short answer, within bounds of size and time.

    Raises:
        Unavailable: it is longer, slower, or breaks off.
    """
    content, until = bytearray(), time.monotonic() + _MAX_LISTING_S
    try:
        while piece := answer.read1(_PIECE_BYTES):
            content += piece
            if len(content) > _MAX_LISTING_BYTES:
                raise Unavailable(f"The hub's list of files is over `{_MAX_LISTING_BYTES}` bytes.")
            if time.monotonic() > until:
                raise Unavailable("The hub's list of files takes too long.", is_passing=True)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"The hub's list of files broke off: {error or type(error).__name__}.", is_passing=True
        ) from None
    length = _number(answer.headers.get("Content-Length"))
    if length is not None and length != len(content):
        raise Unavailable("The hub's list of files broke off.", is_passing=True)
    return bytes(content)
