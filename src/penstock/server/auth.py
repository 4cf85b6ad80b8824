"""Who may talk to the server: API keys.

Deny by default: every method and path needs a key, but to read the two paths in `OPEN`. Keys are
kept as SHA-256 digests and compared in constant time; what is wrong about a key is never told.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.server.failures import HttpError

OPEN = frozenset(("GET", "HEAD")), frozenset(("/health", "/ready"))
_MAX_HEADER_BYTES = 1024


def _is_open(scope: Scope) -> bool:
    methods, paths = OPEN
    return scope["method"] in methods and scope["path"] in paths


class AuthMiddleware:
    """Refuses what brings no valid `Authorization: Bearer KEY`.

    Raises (out of the application): HttpError 401.
    """

    def __init__(self, app: ASGIApp, *, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not (_is_open(scope) or self._knows(scope)):
            raise HttpError(
                401,
                "invalid_api_key",
                "The request brings no valid API key.",
                hint="send the header `Authorization: Bearer KEY`",
                headers={"www-authenticate": "Bearer"},
                close=True,
            )
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1 or len(values[0]) > _MAX_HEADER_BYTES:
            return False
        scheme, _, key = values[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        found = False
        for known in self._digests:  # all of them: the time tells nothing
            found |= hmac.compare_digest(digest, known)
        return found
