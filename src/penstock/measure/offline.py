"""penstock's engine in this process as a target: the same rows as over HTTP, without a server.

The only module of `measure` that imports the engine. Text is put in front of it as the server does
(`TextStream`); the engine steps on a thread of its own, and shares this process's interpreter lock
with whoever measures. Invariant: each token that counts is in exactly one chunk of the row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import types
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from itertools import count
from typing import Any, Union, get_args, get_origin, get_type_hints

from penstock import __version__
from penstock.engine.client import EngineClient, ThreadClient
from penstock.engine.config import EngineConfig
from penstock.engine.locate import locate
from penstock.errors import ConfigError, InvalidField, RequestError
from penstock.measure.load.target import Ask, Reply, identify, output_hash
from penstock.measure.records import Arm, Clock, Request
from penstock.text.stream import TextStream
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from penstock.types import EngineRequest, SamplingParams, TokenEvent

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI has it; a chat may fill the context
_NOT_OURS = frozenset({"n", "logprobs", "prompt_logprobs"})  # a reply is one text
_EXTRA = {field.name for field in dataclasses.fields(SamplingParams)} - _NOT_OURS


class InProcess:
    """A `Target` over an engine that this process runs."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        arm: Arm,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """`client` is started by `start`, and shut down by `close`.

        Args:
            timeout_s: for a whole answer.
        """
        self.timeout_s = timeout_s
        self.client, self.tokenizer, self.template = client, tokenizer, template
        self.arm = arm
        self.limits: list[str] = []
        self._ids = count()

    @classmethod
    def of(
        cls,
        model: str,
        options: Mapping[str, str | None] | None = None,
        *,
        arm_name: str = "",
        timeout_s: float | None = None,
    ) -> InProcess:
        """An engine of this model; `options` are fields of `EngineConfig`, as text.

        Raises:
            ConfigError, ModelLoadError: there is no such model, or no such option.
        """
        options = options or {}
        config = locate(config_of(model, options))
        tokenizer = load_tokenizer(config.path)
        arm = Arm(
            name=arm_name or f"inprocess:{model}",
            target=f"inprocess:{model}",
            model=model,
            engine="penstock",
            engine_version=__version__,
            flags=[f"{name}={value}" for name, value in options.items()],
        )
        template = ChatTemplate.for_tokenizer(tokenizer)
        return cls(ThreadClient(config), tokenizer, template, arm, timeout_s=timeout_s)

    async def start(self) -> None:
        """Load the model. Raises what loading raises."""
        await self.client.start()
        info = self.client.info
        self.arm.precision = info.dtype if info.quantization == "none" else info.quantization

    async def ask(self, ask: Ask, row: Request, clock: Clock) -> Reply | None:
        """Answer in this process; see `Target.ask`.

        What the engine refuses is `http_400`, as the server would have said.
        """
        identify(row, ask, self.arm)
        row.t_sent_ns = clock.now_ns()
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._answer(ask, row, clock)
        except RequestError as error:
            row.error_class, row.error = "http_400", str(error)
            row.n_in, row.n_out, row.count_source = None, None, "none"
        except TimeoutError:
            row.error_class = "timeout"
            row.error = f"No whole answer within `{self.timeout_s:g}` s."
        except Exception as error:  # noqa: BLE001 - a target never raises
            row.error_class, row.error = "server", f"{type(error).__name__}: {error}"
        finally:
            row.t_done_ns = clock.now_ns()
            if row.error_class is None and row.finish_reason is None:
                row.error_class = "cut"
        return None

    async def close(self) -> None:
        """Stop the engine; what still runs gets an error."""
        await self.client.shutdown()

    async def _answer(self, ask: Ask, row: Request, clock: Clock) -> Reply:
        params = params_of(ask)
        prompt_ids = self._prompt_ids(ask)
        stream = TextStream(
            self.tokenizer, params, prompt_ids=() if ask.messages is not None else prompt_ids
        )
        request = EngineRequest(
            request_id=f"measure-{next(self._ids)}", prompt_token_ids=prompt_ids, params=params
        )
        texts: list[str] = []
        row.count_source, row.n_in, row.n_out, row.chunk_t_ns, row.chunk_n = "usage", 0, 0, [], []
        async with aclosing(_generator(self.client, request)) as events:
            async for event in events:
                now_ns = clock.now_ns()
                delta = stream.push(event)
                _note(row, now_ns, delta.usage.num_generated_tokens)
                row.n_in = delta.usage.num_prompt_tokens
                row.n_cached = delta.usage.num_cached_tokens
                texts.append(delta.text)
                if delta.finish is not None:
                    row.finish_reason = delta.finish.value
                    break  # a stop string: the generator's end aborts the rest
        text = "".join(texts)
        row.output_hash = output_hash(text)
        return Reply(text=text, finish_reason=row.finish_reason)

    def _prompt_ids(self, ask: Ask) -> list[int]:
        if isinstance(ask.prompt, str):
            return self.tokenizer.encode(ask.prompt)
        if ask.prompt is not None:
            return list(ask.prompt)
        if self.template is None:
            raise InvalidField("This model has no chat template.", field="messages")
        messages = ask.messages or []
        return self.template.encode(self.tokenizer, messages, add_generation_prompt=True)


def _note(row: Request, now_ns: int, num_tokens: int) -> None:
    """A chunk has come; `num_tokens` are there in all."""
    assert row.n_out is not None
    num_new, row.n_out = num_tokens - row.n_out, num_tokens
    if num_new < 1:
        return
    row.t_last_ns = now_ns
    if row.t_first_ns is None:
        row.t_first_ns = row.t_first_visible_ns = now_ns
    row.chunk_t_ns.append(now_ns)
    row.chunk_n.append(num_new)
    row.n_chunks += 1


async def _generator(
    client: EngineClient, request: EngineRequest
) -> AsyncGenerator[TokenEvent, None]:
    """The events of a request; closing it closes the client's iterator, which aborts."""
    events = client.generate(request)
    try:
        async for event in events:
            yield event
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def params_of(ask: Ask) -> SamplingParams:
    """How to sample an answer.

    Raises:
        InvalidField: a value is out of range, or `extra` has what only a server knows.
    """
    unknown = sorted(ask.extra.keys() - _EXTRA)
    if unknown:
        raise InvalidField(
            f"`{unknown[0]}` is no sampling parameter, and there is no server that knows it.",
            field=unknown[0],
        )
    default = DEFAULT_MAX_TOKENS if ask.messages is None else None
    max_tokens = default if ask.max_tokens is None else ask.max_tokens
    values: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "stop": tuple(ask.stop),
    }
    if ask.fixed_length:
        values |= {"ignore_eos": True, "min_tokens": max_tokens or 0}
    return SamplingParams(**(values | ask.extra))


def config_of(model: str, options: Mapping[str, str | None]) -> EngineConfig:
    """The settings of an engine from an arm's options, such as `{"num_threads": "2"}`.

    Raises:
        ConfigError: there is no such option, or it has another type.
    """
    hints = get_type_hints(EngineConfig)
    values: dict[str, Any] = {}
    for name, text in options.items():
        field = name.replace("-", "_")
        if field in ("precision", "ready_timeout_s", "model", "model_path"):
            raise ConfigError(f"`{name}` is no option of an engine in process.")
        if field not in hints:
            raise ConfigError(
                f"The engine has no option `{name}`.",
                hint=f"it has {', '.join(sorted(hints.keys() - {'model', 'model_path'}))}",
            )
        values[field] = _value(name, text, hints[field])
    return EngineConfig(model=model, **values)


def _value(name: str, text: str | None, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if kind is bool:
        known = {None: True, "true": True, "1": True, "false": False, "0": False}
        if text in known:
            return known[text]
        raise ConfigError(f"`{name}` is `{text}`; it must be `true` or `false`.")
    if text is None:
        raise ConfigError(f"`{name}` needs a value.")
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"`{name}` is `{text}`; it must be a number.") from None
