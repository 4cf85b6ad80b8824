"""Access to a model behind a server, with lm-eval's own clients and settings that are sane.

What lm-eval leaves open is decided here: the context is asked of the server (its default cuts
prompts at 2,048 tokens), requests run concurrently, `OPENAI_API_KEY` goes to no server that it was
not given for, special tokens are written as in process, a chat template from a server is rendered
in our sandbox, and empty answers and cut prompts are counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, TypeVar
from urllib.parse import urldefrag, urlsplit

import requests
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.utils import RemoteTokenizer

from penstock.errors import ConfigError
from penstock.measure.quality.harness.access import Access, Troubles
from penstock.measure.quality.harness.contract import require
from penstock.measure.quality.harness.model import rendered

T = TypeVar("T")
PROBE = "The quick brown fox jumps over the lazy dog."
MAX_STOPS = 4  # that lm-eval sends on the chat route


def connect(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    chat: bool = False,
    route: Literal["auto", "completions", "chat"] = "auto",
    max_length: int | None = None,
    tokenizer: str | None = None,
    num_concurrent: int = 16,
    timeout_s: float = 600.0,
    retries: int = 3,
) -> Access:
    """Access to one model of a server.

    Args:
        url: of the server, with or without `/v1`; `#name` names the model.
        model: its name there; default: the first that the server lists.
        chat: prompts will be put into a chat template. A server that tells its template is asked on
            /v1/completions all the same, where texts can be scored, too.
        route: "completions", or "chat" for /v1/chat/completions. "auto": "chat" only for `chat`
            with a server that keeps its template for itself.
        max_length: as of `EngineLM`: tokens that are conditioned on. Default: what the server says
            of its context, less two.
        tokenizer: a directory in Hugging Face layout, for servers without /tokenize.
        num_concurrent: requests in flight.
        retries: attempts at a request; the last failure ends the evaluation.

    Raises:
        ConfigError: there is no server, or it does not say what must be known.
    """
    server = _Server(url, api_key, timeout_s)
    name, context_len = server.describe(model or urldefrag(url).fragment or None)
    if max_length is not None:
        context_len = min(context_len or max_length + 2, max_length + 2)
    if context_len is None:
        raise ConfigError(
            f"The server at `{server.base}` does not say how long its context is.",
            hint="set `max_length`, or lm-eval would cut prompts at its own default",
        )
    tells = server.tells()
    if route == "auto":
        route = "chat" if chat and not tokenizer and "chat_template" not in tells else "completions"
    backend = "huggingface" if tokenizer else ("remote" if tells else None)
    troubles = Troubles()
    lm = _client(
        server.base,
        route,
        troubles,
        tokenizer={"tokenizer_backend": backend, "tokenizer": tokenizer},
        model=name,
        header=server.headers,
        max_length=context_len,
        num_concurrent=num_concurrent,
        max_retries=retries,
        timeout=timeout_s,
        auth_token=api_key,
    )
    return Access(
        lm=lm,
        name=name,
        context_len=context_len,
        facts={
            "access": route,
            "url": server.base,
            "tokenizer": backend or "none",
            "max_length": context_len - 2,
            "num_concurrent": num_concurrent,
        },
        has_loglikelihood=route == "completions" and backend is not None,
        troubles=troubles,
        check=lambda: require(server.complete, name, lm.tok_encode(PROBE)),
        max_stops=MAX_STOPS if route == "chat" else None,
        same_seed=True,
    )


def _client(
    base: str, route: str, troubles: Troubles, *, tokenizer: dict[str, Any], **options: Any
) -> Any:
    """lm-eval's client of a route."""
    if route == "chat":
        return _Chat(troubles, base_url=f"{base}/v1/chat/completions", **options)
    return _Completions(troubles, base_url=f"{base}/v1/completions", **tokenizer, **options)


class _Server:
    """What is asked of a server apart from lm-eval's requests."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        base = urldefrag(url).url.rstrip("/")
        for suffix in ("/chat/completions", "/completions", "/v1"):
            base = base.removesuffix(suffix)
        if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).netloc:
            raise ConfigError(f"`{url}` is no URL of a server.", hint="such as http://host:8000")
        self.base = base
        # Never empty: lm-eval would send OPENAI_API_KEY, whoever the server is.
        self.headers = {"Accept": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        url = f"{self.base}{path}"
        try:
            return requests.request(
                "GET" if body is None else "POST",
                url,
                json=body,
                headers=self.headers,
                timeout=self._timeout_s,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise ConfigError(
                f"The server at `{self.base}` does not answer: {type(error).__name__}.",
                hint="is it running?",
            ) from None

    def describe(self, wanted: str | None) -> tuple[str, int | None]:
        """The model's name, and its context where the server says it."""
        answer = self._ask("/v1/models")
        data = _json(answer).get("data") if answer.status_code == 200 else None
        models = [entry for entry in data or () if isinstance(entry, dict) and entry.get("id")]
        found = next((entry for entry in models if wanted in (None, entry["id"])), {})
        name = wanted or found.get("id")
        if name is None:
            raise ConfigError(
                f"The server at `{self.base}` lists no models (HTTP {answer.status_code}).",
                hint="name the model, or set the API key",
            )
        context_len = found.get("max_model_len")
        return str(name), context_len if isinstance(context_len, int) else None

    def tells(self) -> dict[str, Any]:
        """What it tells of its tokenizer; empty where lm-eval's `remote` tokenizer fails here."""
        info = self._ask("/tokenizer_info")
        if info.status_code != 200 or "eos_token" not in _json(info):
            return {}
        answer = self._ask("/tokenize", {"prompt": "test", "add_special_tokens": False})
        works = answer.status_code == 200 and isinstance(_json(answer).get("tokens"), list)
        found = {name: value for name, value in _json(info).items() if value is not None}
        return found if works else {}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        answer = self._ask("/v1/completions", body)
        return answer.status_code, _json(answer)


def _json(response: requests.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Tokenizer(RemoteTokenizer):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's, which never asks for special tokens: here they are added as the model wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; those of contexts are kept, each is asked for again and again."""
        key = (text, add_special_tokens)
        if key not in self._known:
            body = {"prompt": text, "add_special_tokens": add_special_tokens}
            answer = self._request_with_retries("POST", f"{self.base_url}/tokenize", json=body)
            self._known[key] = answer.json()["tokens"]
        return list(self._known[key])

    def forget(self) -> None:
        self._known.clear()


class _Stoppable:
    """Of a client: its work in another thread ends soon after `stop`, with CancelledError."""

    _is_stopped = False
    _asking: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def stop(self) -> None:
        self._is_stopped = True
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # of every request that is cut off
        if self._asking is not None:
            loop, task = self._asking
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)

    def _go_on(self) -> None:
        if self._is_stopped:
            raise asyncio.CancelledError

    async def get_batched_requests(self, *args: Any, **kwargs: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._asking = (asyncio.get_running_loop(), task)
        try:
            self._go_on()
            return await super().get_batched_requests(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._asking = None

    def model_call(self, *args: Any, **kwargs: Any) -> Any:
        self._go_on()
        return super().model_call(*args, **kwargs)  # type: ignore[misc]


class _Completions(_Stoppable, LocalCompletionsAPI):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's `local-completions`."""

    def __init__(self, troubles: Troubles, **options: Any) -> None:
        remote = options["tokenizer_backend"] == "remote"
        # Made without one first: lm-eval would make its own.
        super().__init__(**(options | {"tokenizer_backend": None} if remote else options))
        self._troubles = troubles
        self._lens: list[int] = []  # of the prompts of the generation under way
        if remote:
            self.tokenizer_backend, self.tokenized_requests = "remote", True
            self.tokenizer = _Tokenizer(
                self.base_url, self.timeout, True, None, options["auth_token"]
            )

    @cached_property
    def prefix_token_id(self) -> int | None:
        """As of `EngineLM`; lm-eval's takes a beginning of sequence with the id 0 for none."""
        if self.tokenizer_backend != "remote":
            found: int | None = super().prefix_token_id
            return found
        bos_id: int | None = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos_id is None else bos_id

    @cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token or "")

    def tok_encode(
        self, string: Any, left_truncate_len: Any = None, add_special_tokens: Any = None, **_: Any
    ) -> Any:
        """As `EngineLM` does: special tokens as the model wants them, none of them twice."""
        self._go_on()
        if not isinstance(string, str):
            encoded = [self.tok_encode(one) for one in string]
            self._lens = [len(token_ids) for token_ids in encoded]
            return encoded
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix and string.startswith(self._prefix))
        if self.tokenizer_backend == "remote":
            return self.tokenizer.encode(string, add_special_tokens)
        return super().tok_encode(string, left_truncate_len, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Any:
        """The prompt's text. The template is the server's, and code: it runs in our sandbox."""
        if self.tokenizer_backend != "remote":
            return super().apply_chat_template(chat_history, add_generation_prompt)
        return rendered(self._template, chat_history, add_generation_prompt, self._troubles)

    @cached_property
    def _template(self) -> Any:
        from penstock.text.template import ChatTemplate

        info = self.tokenizer.tokenizer_info
        source = info.get("chat_template")
        if not isinstance(source, str) or not source:
            raise ConfigError(
                f"The server says no chat template for `{self.model}`.",
                hint="evaluate it without one, or on the chat route",
            )
        special = {k: v for k, v in info.items() if k.endswith("_token") and isinstance(v, str)}
        return ChatTemplate(source, special)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if self.tokenizer_backend != "remote":
            return ""
        return str(self.tokenizer.tokenizer_info.get("chat_template") or "")

    def batch_loglikelihood_requests(self, chunks: Any) -> Any:
        inputs, ctxlens, keys = super().batch_loglikelihood_requests(chunks := list(chunks))
        wholes = (len(context) + len(cont) for chunk in chunks for _, context, cont in chunk)
        for kept, whole in zip(inputs, wholes, strict=True):
            if len(kept) < whole:
                self._troubles.add(f"A prompt was cut from the left to `{self.max_length}` tokens")
        return inputs, ctxlens, keys

    def loglikelihood(self, requests: Any, **kwargs: Any) -> Any:
        try:
            return _off_loop(
                lambda: super(_Completions, self).loglikelihood(requests, **kwargs), self.stop
            )
        finally:
            self._forget()

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> Any:
        return _off_loop(
            lambda: super(_Completions, self).loglikelihood_rolling(requests, **kwargs), self.stop
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self._lens = []
        try:
            answers: list[str] = _off_loop(
                lambda: super(_Completions, self).generate_until(requests, disable_tqdm), self.stop
            )
        finally:
            self._forget()
        for length, request in zip(self._lens, requests, strict=False):
            room = self.max_length - request.args[1].get("max_gen_toks", self._max_gen_toks)
            if length > room:
                self._troubles.add(f"A prompt was cut from the left to `{room}` tokens")
        return answers

    def _forget(self) -> None:
        if isinstance(self.tokenizer, _Tokenizer):
            self.tokenizer.forget()

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        return _counted(super().parse_generations(outputs, **kwargs), self._troubles)


class _Chat(_Stoppable, LocalChatCompletion):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's `local-chat-completions`."""

    def __init__(self, troubles: Troubles, **options: Any) -> None:
        super().__init__(**options)
        self._troubles = troubles

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return _off_loop(
            lambda: super(_Chat, self).generate_until(requests, disable_tqdm), self.stop
        )

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        return _counted(super().parse_generations(outputs, **kwargs), self._troubles)


def _off_loop(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Do what calls `asyncio.run`, in another thread if an event loop runs in this one.

    Args:
        stop: ends the work from this thread, where a signal breaks in.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            return working.result()
        except BaseException:
            if not working.done():
                stop()  # else the pool would wait for all answers
            raise


def _counted(answers: Sequence[str | None], troubles: Troubles) -> list[str]:
    """Answers without text, which lm-eval scores as an empty text."""
    for answer in answers:
        if not answer:
            troubles.add("An answer had no text and was graded as empty")
    return [answer or "" for answer in answers]
