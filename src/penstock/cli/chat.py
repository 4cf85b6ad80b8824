"""`penstock chat`: a conversation in the terminal.

With `--url` it talks to any OpenAI-compatible server and needs no engine; without, it loads a model
into this process, with the engine's options. One question can be given as an argument, or on stdin.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from penstock import builtin
from penstock.cli.options import build, options_of
from penstock.engine.config import EngineConfig
from penstock.errors import ConfigError, EngineError, PenstockError
from penstock.protocol.sse import DONE_DATA, Decoder
from penstock.types import SamplingParams

Message = dict[str, Any]
HELP = "/clear starts anew, /exit leaves (or Ctrl-D); Ctrl-C stops an answer."


@click.command(epilog='Example: penstock chat "What is 17 + 25?"')
@click.argument("question", required=False)
@click.option("--model", "-m", help="A model, as serve takes it [default: brook, or the server's].")
@click.option("--url", help="A running server, such as http://127.0.0.1:8000.")
@click.option("--api-key", envvar="PENSTOCK_API_KEY", help="For --url.")
@click.option("--system", help="System message.")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--max-tokens", type=int, help="Default: up to the model's context.")
@click.option("--seed", type=int)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON line.")
@options_of(EngineConfig, skip=frozenset({"model", "seed"}))
def command(
    question: str | None,
    model: str | None,
    url: str | None,
    api_key: str | None,
    system: str | None,
    as_json: bool,
    temperature: float,
    max_tokens: int | None,
    seed: int | None,
    **options: Any,
) -> int:
    """Chat with a model; give a QUESTION for one answer."""
    # Made and read first: what is wrong is told before a model is loaded.
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    if question is None and not sys.stdin.isatty():
        question = _stdin()
    if question in builtin.NAMES:
        raise ConfigError(
            f"`{question}` would be the question, and is a model.",
            hint=f"penstock chat --model {question}",
        )
    if question == "":
        raise ConfigError("The question is empty.", hint="give it as an argument or on stdin")
    if as_json and question is None:
        raise ConfigError("`--json` needs a question.", hint='penstock chat --json "Hello!"')
    if url:
        _check_none(options)
    partner = Remote(url, model, api_key) if url else Local(model or "brook", options)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    if question is not None:
        # A terminal may pass bytes that are no UTF-8; no server would take them.
        content = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        _once(partner, [*start, {"role": "user", "content": content}], params, as_json)
        return 0
    _converse(partner, start, params)
    return 0


def _check_none(options: dict[str, Any]) -> None:
    """Refuse options of an engine where a server has its own; the environment may be for others."""
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` is for an engine in this process, and `--url` is "
                "set.",
                hint="leave one of them out; `penstock serve` takes the options of its engine",
            )


class Local:
    """A model in this process."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from penstock.llm import LLM  # torch, only now

        self.name = model
        config = build(EngineConfig, options, model=model)
        self._llm = LLM(**{field.name: getattr(config, field.name) for field in fields(config)})

    def stream(self, messages: list[Message], params: SamplingParams) -> Iterator[str]:
        return self._llm.stream_chat(messages, params)


class Remote:
    """A server that speaks the OpenAI protocol."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"`--url` is `{url}`; it must begin with http:// or https://.")
        if api_key is not None and not api_key.isascii():
            raise ConfigError("`--api-key` has characters that no header can carry.")
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=base, headers=headers, timeout=httpx.Timeout(10, read=None)
        )
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        try:
            return str(self._request("GET", "/v1/models").json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise EngineError(
                f"`{self._client.base_url}` does not list its models as the OpenAI protocol does.",
                hint="is the URL right? Name the model with `--model`",
            ) from None

    def _request(self, method: str, path: str) -> Any:
        import httpx

        try:
            response = self._client.request(method, path)
        except httpx.HTTPError as error:
            raise _unreachable(self._client.base_url, error) from None
        if response.is_error:
            raise EngineError(_error_text(response.status_code, response.text))
        return response

    def stream(self, messages: list[Message], params: SamplingParams) -> Iterator[str]:
        import httpx

        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "temperature": params.temperature,
            "stream": True,
        }
        if params.max_tokens is not None:
            body["max_tokens"] = params.max_tokens
        if params.seed is not None:
            body["seed"] = params.seed
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise EngineError(_error_text(response.status_code, response.read().decode()))
                yield from _pieces(response.iter_bytes())
        except httpx.HTTPError as error:
            raise _unreachable(self._client.base_url, error) from None


def _pieces(stream: Iterator[bytes]) -> Iterator[str]:
    """The texts of a streamed answer, which ends with [DONE]."""
    decoder = Decoder()
    for data in stream:
        for event in decoder.push(data):
            if event.data == DONE_DATA:
                return
            yield _delta(event.data)
    raise EngineError("The server's answer broke off.")


def _delta(data: str) -> str:
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise EngineError(str(chunk["error"].get("message", chunk["error"])))
        choices = chunk.get("choices") or [{}]
        return choices[0].get("delta", {}).get("content") or ""
    except (ValueError, AttributeError, LookupError, TypeError):
        raise EngineError(
            f"The server sent what is no chunk of an answer: `{data[:80]}`."
        ) from None


def _unreachable(url: Any, error: Exception) -> EngineError:
    return EngineError(f"`{url}` does not answer: {error}.", hint="is `penstock serve` running?")


def _error_text(status: int, text: str) -> str:
    try:
        return f"{json.loads(text)['error']['message']} (status {status})"
    except (ValueError, KeyError, TypeError):
        return f"The server answered with status {status}."


def _once(
    partner: Local | Remote, messages: list[Message], params: SamplingParams, as_json: bool
) -> None:
    pieces = []
    for piece in partner.stream(messages, params):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    click.echo(json.dumps({"model": partner.name, "answer": "".join(pieces)}) if as_json else "")


def _converse(partner: Local | Remote, start: list[Message], params: SamplingParams) -> None:
    _use_readline()
    click.echo(f"{partner.name}. {HELP}", err=True)
    messages = list(start)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}", err=True)
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(start)
        elif line.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            question = {"role": "user", "content": line}
            try:
                answer = _say(partner, [*messages, question], params)
            except PenstockError as error:  # the conversation goes on without this question
                click.echo(f"error: {error}", err=True)
                continue
            messages += [question, {"role": "assistant", "content": answer}]


def _say(partner: Local | Remote, messages: list[Message], params: SamplingParams) -> str:
    """Print an answer as it comes; Ctrl-C keeps what was said so far."""
    pieces: list[str] = []
    try:
        # Closing the stream aborts the request, here and on the server.
        with closing(partner.stream(messages, params)) as stream:  # type: ignore[type-var]
            for piece in stream:
                pieces.append(piece)
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False, err=True)
    click.echo()
    return "".join(pieces)


def _stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"The standard input is not UTF-8 text: {error}.") from None


def _use_readline() -> None:
    if os.name == "posix":
        import readline  # noqa: F401 - gives input() its history and keys
