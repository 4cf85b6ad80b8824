"""The offline API: prompts in, answers out, no server.

`LLM` joins text (tokenizer, template, stop strings) to an `EngineCore` in this process and drives
it step by step. Requests run in continuous batches; `run` hands answers out as they finish. A model
that pools is in `penstock.llm_pooling`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, final

from penstock.engine.config import EngineConfig
from penstock.engine.locate import locate
from penstock.engine.loop import Core
from penstock.engine.make import make_core
from penstock.errors import ConfigError, InvalidField, RequestError
from penstock.llm_pooling import PoolingLLM, Prompt, as_prompts, progress_bar
from penstock.text.stream import TextDelta, TextStream
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import load_tokenizer
from penstock.types import EngineRequest, SamplingParams, TokenEvent, TokenLogprobs

Message = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One of the `n` answers to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it


@dataclass(slots=True)
class Output:
    """A prompt and its answers, in order of their index."""

    request_id: str
    prompt: str | None  # None for token ids and conversations
    prompt_token_ids: list[int]
    outputs: list[Answer] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.outputs)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, tokenized, and how to answer it. `LLM.prepare` makes it."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    is_chat: bool = False


@final
class LLM(PoolingLLM):
    """A model, ready to answer.

    Args:
        model: a built-in model (`brook`), a directory in Hugging Face layout, a GGUF file, or a
            model of the hub (`org/name`), which is downloaded.
        options: any field of `EngineConfig`, such as `max_model_len` or `block_size`.

    Raises:
        ConfigError, ModelLoadError, NotEnoughMemory: before any prompt is read.
    """

    def __init__(self, model: str = "brook", **options: Any) -> None:
        try:
            config = EngineConfig(model=model, **options)
        except TypeError as error:
            raise ConfigError(
                f"{error}.", hint="the options are the fields of EngineConfig"
            ) from None
        self.config = locate(config)
        self.tokenizer = load_tokenizer(self.config.path)
        self.template = ChatTemplate.for_tokenizer(self.tokenizer)
        self.core: Core = make_core(self.config)
        self._ids = count()
        self._live: dict[str, tuple[_Entry, int]] = {}  # by engine request id; which answer it is

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Output]:
        """Continue each prompt (text or token ids); the outputs keep the prompts' order.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing was computed.
        """
        many = as_prompts(prompts)
        jobs = [self.prepare(*pair) for pair in zip(many, _spread(params, len(many)), strict=True)]
        return self._collect(jobs, progress)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[Output]:
        """Answer one conversation or several, rendered by the model's chat template.

        Raises:
            RequestError: a conversation cannot be rendered or served; nothing was computed.
        """
        many = [conversations] if _is_conversation(conversations) else conversations
        spread = _spread(params, len(many))
        jobs = [
            self.prepare_chat(messages, one, tools=tools)  # type: ignore[arg-type]
            for messages, one in zip(many, spread, strict=True)
        ]
        return self._collect(jobs, progress)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece. Closing the iterator aborts it."""
        job = self.prepare_chat(messages, params)
        for _, delta in self._deltas([job], window=1):
            if delta.text:
                yield delta.text

    def prepare(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> Job:
        """Tokenize one prompt."""
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Job(text, token_ids, params or SamplingParams(), priority)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        priority: int = 0,
    ) -> Job:
        """Render and tokenize one conversation. Without `params`: up to the end of the context."""
        if self.template is None:
            raise InvalidField(
                f"The model `{self.config.model}` has no chat template.",
                field="messages",
                hint="use `generate` with a plain prompt",
            )
        token_ids = self.template.encode(self.tokenizer, messages, tools)
        params = params or SamplingParams(max_tokens=None)
        return Job(None, token_ids, params, priority, is_chat=True)

    def run(
        self, jobs: Iterable[Job], on_error: Callable[[Job, RequestError], None] | None = None
    ) -> Iterator[tuple[Job, Output]]:
        """Answer jobs as they come and hand each out when it is done, first done first.

        Only so many jobs are taken ahead as keep the engine busy. A job that the engine refuses
        goes to `on_error`; without it the error is raised.
        """
        for entry, _ in self._deltas(jobs, window=4 * self.config.max_num_seqs, on_error=on_error):
            if entry.output.finished:
                yield entry.job, entry.output

    def _collect(self, jobs: list[Job], progress: bool) -> list[Output]:
        done: dict[int, Output] = {}
        num_tokens = 0
        with progress_bar(len(jobs), progress) as bar:
            # All are taken before the first step: a wrong one is told before anything is computed.
            for entry, _ in self._deltas(jobs, window=sys.maxsize):
                if not entry.output.finished:
                    continue
                done[id(entry.job)] = entry.output
                num_tokens += sum(len(answer.token_ids) for answer in entry.output.outputs)
                bar.set_postfix(tokens=num_tokens, refresh=False)
                bar.update()
        return [done[id(job)] for job in jobs]

    def _deltas(
        self,
        jobs: Iterable[Job],
        window: int,
        on_error: Callable[[Job, RequestError], None] | None = None,
    ) -> Iterator[tuple[_Entry, TextDelta]]:
        """Drive the engine; every text delta of every answer, with the entry that it went to.

        Several such iterators may be open: whoever steps, steps for all.
        """
        if self.core.info.pooling is not None:
            raise InvalidField(
                f"The model `{self.config.model}` pools; it writes no text.",
                field="model",
                hint="`penstock serve` answers for it; in Python: `embed`, `classify` or `score`",
            )
        source = iter(jobs)
        inbox: _Inbox = deque()
        open_ids: set[str] = set()
        try:
            while True:
                while len(open_ids) < window and (job := next(source, None)) is not None:
                    try:
                        open_ids |= self._admit(job, inbox)
                    except RequestError as error:
                        if on_error is None:
                            raise
                        on_error(job, error)
                if not open_ids:
                    return
                while not inbox:
                    self._step()
                while inbox:
                    request_id, entry, delta = inbox.popleft()
                    if delta.finish is not None:
                        open_ids.remove(request_id)
                    yield entry, delta
        finally:
            for request_id in open_ids & self._live.keys():
                del self._live[request_id]
                self.core.abort(request_id)

    def _admit(self, job: Job, inbox: _Inbox) -> set[str]:
        """Add a job's answers to the engine; their request ids."""
        number = next(self._ids)
        entry = _Entry(self, job, str(number), inbox)
        samples = [job.params.for_sample(index) for index in range(job.params.n)]
        requests = [
            self._request(job, params, f"{number}-{index}") for index, params in enumerate(samples)
        ]
        for index, request in enumerate(requests):  # which differ in nothing that can be refused
            self.core.add(request)
            self._live[request.request_id] = (entry, index)
        return {request.request_id for request in requests}

    def _step(self) -> None:
        """One step of the engine; its events become deltas in the inboxes they are for."""
        for event in self.core.step():
            if event.request_id not in self._live:
                continue  # its last tokens, behind a stop string
            entry, index = self._live[event.request_id]
            delta = entry.push(index, event)
            if delta.finish is not None:
                del self._live[event.request_id]
                if event.finish is None:
                    self.core.abort(event.request_id)
            entry.inbox.append((event.request_id, entry, delta))

    @staticmethod
    def _request(job: Job, params: SamplingParams, request_id: str) -> EngineRequest:
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=job.token_ids,
            params=params,
            priority=job.priority,
        )


class _Entry:
    """A job on its way: its output so far and the text stream of each answer."""

    def __init__(self, llm: LLM, job: Job, request_id: str, inbox: _Inbox) -> None:
        self.job = job
        self.inbox = inbox
        self.output = Output(request_id, job.prompt, job.token_ids)
        self.output.outputs = [Answer(index) for index in range(job.params.n)]
        before = () if job.is_chat else job.token_ids  # what the answer's text continues
        self._streams = [
            TextStream(llm.tokenizer, job.params, prompt_ids=before) for _ in range(job.params.n)
        ]

    def push(self, index: int, event: TokenEvent) -> TextDelta:
        delta = self._streams[index].push(event)
        answer = self.output.outputs[index]
        answer.text += delta.text
        # Tokens behind a stop string do not count.
        num_new = delta.usage.num_generated_tokens - len(answer.token_ids)
        answer.token_ids += event.token_ids[:num_new]
        if event.logprobs is not None:
            answer.logprobs = answer.logprobs or []
            answer.logprobs += event.logprobs[:num_new]
        if event.prompt_logprobs is not None:
            self.output.prompt_logprobs = event.prompt_logprobs
        if index == 0:
            self.output.num_cached_tokens = event.usage.num_cached_tokens
        if delta.finish is not None:
            answer.finish_reason = delta.finish.value
            answer.stop_reason = delta.stop_reason
        return delta


_Inbox = deque[tuple[str, _Entry, TextDelta]]  # what an iterator has not handed out yet


def _is_conversation(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict)


def _spread(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams | None]:
    """One set of parameters for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidField(
            f"`params` has `{len(params)}` entries for `{num_prompts}` prompts.",
            field="params",
            hint="give one SamplingParams for all, or one for each prompt",
        )
    return list(params)
