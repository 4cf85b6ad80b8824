"""Our engine as a model of lm-evaluation-harness: the same tokens and the same rules as its HFLM.

Owns how a context and a continuation become engine requests and an answer becomes a score. Knows
no task. Invariant: results are in the order of the requests and do not depend on batching.

A continuation's last token is not part of the prompt: the engine is told to generate just it, and
reports its raw log-probability and rank. So the prefix cache serves all continuations of a context.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from penstock.errors import ConfigError, InvalidField
from penstock.measure.quality.harness.access import Troubles
from penstock.types import SamplingParams

if TYPE_CHECKING:
    from penstock.llm import LLM, Job, Output

MAX_GEN_TOKS = 256  # of a task that names no number, as in HFLM
# What a task's `generation_kwargs` may hold besides `until`, lengths and `do_sample`.
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # key, context, continuation


class Score(NamedTuple):
    """Of a continuation."""

    logprob: float
    is_greedy: bool


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """`penstock.llm.LLM` as lm-eval's LM.

    Args:
        llm: the model.
        max_length: tokens that are conditioned on, HFLM's `max_length`. Default: two less than the
            context, so that results equal those of lm-eval's `local-completions` on our server,
            which needs room for one token of answer. Generation uses the whole context unless
            `max_length` is given.
        seed: of sampled answers; answer i of a call gets seed + i.
        progress: show a bar on a terminal.
    """

    def __init__(
        self, llm: LLM, *, max_length: int | None = None, seed: int = 0, progress: bool = True
    ) -> None:
        super().__init__()
        self._llm = llm
        self._text = llm.tokenizer
        context_len = llm.core.info.max_model_len
        if max_length is not None and not 2 <= max_length <= context_len - 1:
            raise ConfigError(
                f"`max_length` is `{max_length}`; it must be an integer in [2, {context_len - 1}]."
            )
        self.max_length = max_length or max(2, context_len - 2)
        self._generation_len = max_length or context_len
        self._seed = seed
        self._progress = progress
        self.troubles = Troubles()
        self._eos = self._text.special_tokens.get("eos_token")
        self._bos = self._text.special_tokens.get("bos_token")

    @property
    def eot_token_id(self) -> int:
        found = None if self._eos is None else self._text.token_id(self._eos)
        return self._llm.core.info.eos_token_ids[0] if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced with: the beginning of a sequence, else its end."""
        bos_id: int | None = self._text.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        return str(self._llm.config.model).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template; "" where there is none."""
        if chat_template is False:
            return None
        return self._text.chat_templates.get("default", "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt's text. Without a generation prompt the last message is left open."""
        if self._llm.template is None:
            raise ConfigError(
                f"The model `{self._llm.config.model}` has no chat template.",
                hint="evaluate it without one",
            )
        return rendered(self._llm.template, chat_history, add_generation_prompt, self.troubles)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; the beginning of a sequence is not written twice."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.token_text(self.prefix_token_id))
        return self._text.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation of a context, and whether greedy would write it."""
        scores: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or not (self._progress and sys.stderr.isatty())
        )
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = score(
            self._llm,
            [self._fitted(context, continuation) for _, context, continuation in requests],
            progress=self._progress and not disable_tqdm,
        )
        for request, found in zip(requests, scores, strict=True):
            if request[0] is not None:  # a window of a rolling request is kept with its request
                self.cache_hook.add_partial("loglikelihood", request[0], found)
        return list(scores)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut from the left, as HFLM does: `max_length` tokens in, one more scored."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"A continuation has `{len(continuation)}` tokens, more than the "
                f"`{self.max_length}` of the context.",
                hint="the task needs a model with a longer context",
            )
        surplus = len(context) + len(continuation) - (self.max_length + 1)
        if surplus > 0:
            self.troubles.add(f"A prompt was cut from the left to `{self.max_length}` tokens")
            context = context[surplus:]
        return context, continuation

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` that overlap in one token."""
        windows: list[TokenRequest] = []
        counts = []
        for (string,) in (request.args for request in requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, an end token or the length that the task allows."""
        jobs = [
            self._generation_job(context, gen_kwargs, self._seed + index)
            for index, (context, gen_kwargs) in enumerate(request.args for request in requests)
        ]
        outputs = run(self._llm, jobs, progress=self._progress and not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation_job(self, context: str, gen_kwargs: Mapping[str, Any], seed: int) -> Job:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_TOKS))
        max_tokens = kwargs.pop("max_gen_toks")
        max_context_len = self._generation_len - max_tokens
        if max_context_len < 1:
            raise too_long_answers(max_tokens, self._generation_len)
        starts = self._bos is not None and context.startswith(self._bos)
        token_ids = self._text.encode(context, add_special_tokens=not starts)
        if len(token_ids) > max_context_len:
            self.troubles.add(
                f"A prompt was cut from the left to `{max_context_len}` tokens, to leave room for "
                f"`{max_tokens}` of answer"
            )
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self._eos)
        stop, stop_ids = self._stops(until)
        if not kwargs.pop("do_sample", False):
            kwargs["temperature"] = 0.0
        if unknown := sorted(kwargs.keys() - set(SAMPLING)):
            raise ConfigError(
                f"`generation_kwargs` holds `{unknown[0]}`, which the engine does not know.",
                hint=f"known: {', '.join(SAMPLING)}",
            )
        params = SamplingParams(
            max_tokens=max_tokens, stop=stop, stop_token_ids=stop_ids, seed=seed, **kwargs
        )
        return self._llm.prepare(token_ids[-max_context_len:], params)

    def _stops(self, until: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings and stop tokens: the text of a special token never shows in an answer."""
        strings, token_ids = [], []
        for text in until:
            token_id = self._text.token_id(text) if text else None
            if token_id is not None and token_id in self._text.special_ids:
                token_ids.append(token_id)
            elif text:
                strings.append(text)
        return tuple(strings), tuple(token_ids)


def too_long_answers(max_tokens: int, context_len: int) -> ConfigError:
    """A task wants more tokens of answer than the model has context."""
    return ConfigError(
        f"The task wants up to `{max_tokens}` tokens of answer, but the context has "
        f"`{context_len}` with the prompt.",
        hint="set a smaller `max_gen_toks` in the generation arguments; the scores are then no "
        "longer those of the published task",
    )


def rendered(
    template: Any,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool,
    troubles: Troubles,
) -> str:
    """A conversation as text; a template that refuses the system message gets it without one."""
    try:
        text: str = template.render(messages, add_generation_prompt=add_generation_prompt)
    except InvalidField:
        kept = [message for message in messages if message["role"] != "system"]
        if len(kept) == len(messages):
            raise
        troubles.add("The chat template refused the system message, which was left out")
        text = template.render(kept, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    last = messages[-1]["content"]  # is continued: what the template puts behind it goes
    start = text.rindex(last.strip())
    whole = last.lstrip()
    return text[:start] + (whole if text[start:].startswith(whole) else last.strip())


def score(llm: LLM, pairs: Sequence[tuple[list[int], list[int]]], *, progress: bool) -> list[Score]:
    """Log-probability of each continuation, and whether greedy decoding would have written it.

    Args:
        pairs: token ids of a context (at least one) and of its continuation, which together are
            not longer than the engine's context.
    """
    sharing = Counter(tuple(context) for context, _ in pairs)
    block_size = llm.config.block_size if llm.config.enable_prefix_caching else None
    jobs: list[Job] = []
    owners: list[int] = []
    # One context after the other, the long ones first: the prefix cache holds what comes next.
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], i))
    for index in order:
        context, continuation = pairs[index]
        num_sharing = sharing[tuple(context)]
        for job in _jobs_of(llm, context, continuation, num_sharing, block_size):
            jobs.append(job)
            owners.append(index)
    totals = [Score(0.0, True)] * len(pairs)
    for index, output in zip(owners, run(llm, jobs, progress=progress), strict=True):
        before = totals[index]
        found = _read(output, len(pairs[index][1]))
        totals[index] = Score(before.logprob + found.logprob, before.is_greedy and found.is_greedy)
    return totals


def _jobs_of(
    llm: LLM,
    context: list[int],
    continuation: list[int],
    num_sharing: int,
    block_size: int | None,
) -> list[Job]:
    """One request for a continuation, or one for each of its tokens where that computes less.

    A request that reports its prompt's log-probabilities computes all of its prompt. One for a
    single token starts from the cached blocks, and computes less than a block and that token.
    """
    num_whole = len(context) + len(continuation)
    if block_size is not None:
        num_single = len(context) / num_sharing + len(continuation) * block_size
        if len(continuation) == 1 or num_single < num_whole:
            return [
                _forced(llm, context + continuation[:end], token_id, False)
                for end, token_id in enumerate(continuation)
            ]
    if not continuation:
        return []
    prompt = context + continuation[:-1]
    return [_forced(llm, prompt, continuation[-1], len(continuation) > 1)]


def _forced(llm: LLM, prompt: list[int], token_id: int, reads_prompt: bool) -> Job:
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        allowed_token_ids=(token_id,),
        logprobs=0,
        prompt_logprobs=0 if reads_prompt else None,
    )
    return llm.prepare(prompt, params)


def _read(output: Output, num_tokens: int) -> Score:
    """The score of what one request was asked for: its token, and those of its prompt."""
    found = list(output.outputs[0].logprobs or ())
    assert len(found) == 1
    if output.prompt_logprobs is not None:
        before = output.prompt_logprobs[len(output.prompt_logprobs) - (num_tokens - 1) :]
        found += [entry for entry in before if entry is not None]
        assert len(found) == num_tokens
    return Score(sum(entry.logprob for entry in found), all(entry.rank == 1 for entry in found))


def run(llm: LLM, jobs: Sequence[Job], *, progress: bool) -> list[Output]:
    """The outputs of jobs, in their order; the engine batches them as it can."""
    from tqdm import tqdm

    outputs: dict[int, Output] = {}
    disable = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=len(jobs), unit="request", dynamic_ncols=True, disable=disable) as bar:
        for job, output in llm.run(jobs):
            outputs[id(job)] = output
            bar.update()
    return [outputs[id(job)] for job in jobs]
