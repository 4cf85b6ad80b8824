"""Counting the tokens of a text: with the server's own tokenizer, or with one that lies here.

Knows no prompt. What a request really cost is told by the server's usage; these counts only make
prompts of about the length that was asked for.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from penstock.errors import ConfigError
from penstock.measure.load.endpoint import address_of, with_key

_TIMEOUT_S = 10.0


class Counter(NamedTuple):
    """Tokens of a text, what a tokenizer puts in front of every text included."""

    count: Callable[[str], int]
    source: str  # for the report
    close: Callable[[], None] = lambda: None  # lets go of what it counts with


def from_file(path: Path) -> Counter:
    """The tokenizer of a `tokenizer.json`, or of the directory that holds one.

    Raises:
        ConfigError: it cannot be read.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"`--tokenizer {path}` is no file.")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises Exception itself
        raise ConfigError(f"`--tokenizer {path}` cannot be read: {error}.") from None
    return Counter(lambda text: len(tokenizer.encode(text).ids), f"tokenizer {path.name}")


def from_server(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Counter | None:
    """The tokenizer behind POST /tokenize (penstock, vLLM); None where there is no such route.

    Args:
        url: of the server, or of a route of it.
    """
    parts = urlsplit(url)
    path = address_of(url).root + "/tokenize"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname is not None
    connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    sent = {"Content-Type": "application/json"} | with_key(headers or {}, api_key)

    def count(text: str) -> int:
        body = {"prompt": text} | ({"model": model} if model else {})
        connection.request("POST", path, json.dumps(body), sent)
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        return int(json.loads(data)["count"])

    try:
        count("a")
    except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError):
        connection.close()
        return None
    return Counter(count, "the server's /tokenize", connection.close)
