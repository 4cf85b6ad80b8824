"""What the environment says about the hub, with the names that Hugging Face's own library has.

Owns which variable means what. Read anew on each call, so that a test or a program may set them.
The token is a secret: it is held in an object whose `repr` does not show it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from penstock.errors import ConfigError

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "true", "yes", "on"}
_MAX_TOKEN_BYTES = 4096
TIMEOUT_S = 30.0  # for a connection, and between two pieces of an answer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A hub: where it is, and who asks."""

    url: str  # without a slash at the end
    token: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S


def cache_directory() -> Path:
    """Where models lie: HF_HUB_CACHE, else `hub` of HF_HOME, else `~/.cache/huggingface/hub`.

    Raises:
        ConfigError: a variable names the home of a user whom the system does not know.
    """
    return _path("HF_HUB_CACHE") or _path("HUGGINGFACE_HUB_CACHE") or _home() / "hub"


def is_offline() -> bool:
    """Whether the network must not be used: HF_HUB_OFFLINE=1, or transformers' variable."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.strip().lower() in _TRUE


def endpoint() -> Endpoint:
    """The hub of HF_ENDPOINT, with the token of HF_TOKEN or of the file `token` in HF_HOME.

    Raises:
        ConfigError: a variable or the token's file holds what cannot be; a token is never shown.
    """
    url = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).strip().rstrip("/")
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_right = is_right and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:
        is_right = False
    if not is_right or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("`HF_ENDPOINT` is not a URL such as `https://huggingface.co`.")
    if parts.username is not None:
        raise ConfigError(
            "`HF_ENDPOINT` holds a user name, and secrets do not belong into a URL.",
            hint="set HF_TOKEN",
        )
    return Endpoint(url, _token(), _timeout_s())


def _timeout_s() -> float:
    said = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT")
    if not said:
        return TIMEOUT_S
    try:
        timeout_s = float(said)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s <= 3600:
        raise ConfigError(f"`HF_HUB_DOWNLOAD_TIMEOUT` is `{said}`; it must be seconds, up to 3600.")
    return timeout_s


def _home() -> Path:
    return _path("HF_HOME") or (_path("XDG_CACHE_HOME") or _expanded("~/.cache")) / "huggingface"


def _path(variable: str) -> Path | None:
    named = os.environ.get(variable)
    return _expanded(named, variable) if named else None


def _expanded(named: str, variable: str = "HF_HOME") -> Path:
    try:
        return Path(named).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"`{named}` is in the home of a user whom the system does not know.",
            hint=f"{variable} names another directory",
        ) from None


def _token() -> str | None:
    source, token = "HF_TOKEN", os.environ.get("HF_TOKEN")
    if not token:
        file = _path("HF_TOKEN_PATH") or _home() / "token"
        source, token = str(file), _read(file)
    token = token.strip()
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"`{source}` does not hold a token: it has signs that no token has.")
    return token


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_TOKEN_BYTES).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ConfigError(
            f"`{file}`, the token's file, cannot be read: {error.strerror}."
        ) from None
