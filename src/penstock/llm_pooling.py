"""The part of the offline API that is for models that pool: texts in, vectors and scores out.

Owns `PoolingLLM`, a base of `penstock.LLM`, which gives it what it works with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.loop import Core
from penstock.errors import InvalidField
from penstock.text import pooled
from penstock.text.tokenizer import Tokenizer
from penstock.types import EngineRequest, PoolingInfo, SamplingParams

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Pooled:
    """A text, or a pair, and what a model that pools makes of it.

    Attributes:
        prompt: None for token ids.
        vector: [size] float32: an embedding, or the scores of labels.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    vector: pooled.F32


class PoolingLLM:
    """What an `LLM` can do with a model that pools."""

    config: EngineConfig
    tokenizer: Tokenizer
    core: Core
    _ids: Iterator[int]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        progress: bool = True,
    ) -> list[Pooled]:
        """The embedding of each text (or token ids); the outputs keep their order.

        Args:
            dimensions: numbers of each embedding, of a model that was made to be cut.
            prompt_name: one of the checkpoint's prompts, put before each text.
            truncate_prompt_tokens: how many tokens to keep of a text; -1: as many as fit. None: a
                longer one is refused.

        Raises:
            RequestError: a text cannot be served; nothing was computed.
            EngineError: an embedding is not finite.
        """
        pooling = self._pooling("embed", is_classifier=False)
        pooled.check_dimensions(dimensions, pooling)
        found = self._pool(
            as_prompts(prompts),
            pooled.prompt_of(prompt_name, pooling),
            truncate_prompt_tokens,
            progress,
        )
        return [replace(one, vector=pooled.cut(one.vector, dimensions, pooling)) for one in found]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        progress: bool = True,
    ) -> list[Pooled]:
        """The scores of all labels of each text; `core.info.pooling.labels` are their names."""
        self._pooling("classify", is_classifier=True)
        return self._pool(as_prompts(prompts), "", truncate_prompt_tokens, progress)

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        progress: bool = True,
    ) -> list[float]:
        """How well each document goes with its query, or with the only one: higher is better.

        A classifier of one label reads both texts at once; of other models it is the cosine of
        their embeddings.

        Raises:
            RequestError: the numbers do not fit, or a text cannot be served.
        """
        firsts, seconds = (
            [texts] if isinstance(texts, str) else list(texts) for texts in (queries, documents)
        )
        pooled.num_pairs(len(firsts), len(seconds), ("queries", "documents"))
        pooling = self._pooling("score")
        pooled.check_scores(pooling)
        keep = truncate_prompt_tokens
        if pooling.is_classifier:
            if len(firsts) == 1:
                firsts *= len(seconds)
            found = self._pool(firsts, "", keep, progress, seconds)
            return [float(one.vector[0]) for one in found]
        prompt = pooled.prompt_of(None, pooling)
        vectors = [one.vector for one in self._pool([*firsts, *seconds], prompt, keep, progress)]
        return pooled.pair_scores(vectors[: len(firsts)], vectors[len(firsts) :])

    def _pooling(self, verb: str, *, is_classifier: bool | None = None) -> PoolingInfo:
        """What the model pools to, if it does what is asked."""
        pooling = self.core.info.pooling
        if pooling is None:
            raise InvalidField(
                f"The model `{self.config.model}` generates; it cannot `{verb}`.",
                field="model",
                hint='make it with `LLM(..., runner="pooling")`',
            )
        if is_classifier is not None and pooling.is_classifier != is_classifier:
            does = "has labels" if pooling.is_classifier else "embeds"
            other = "classify" if pooling.is_classifier else "embed"
            raise InvalidField(
                f"The model `{self.config.model}` {does}; it cannot `{verb}`.",
                field="model",
                hint=f"use `{other}` or `score`",
            )
        return pooling

    def _pool(
        self,
        prompts: Sequence[Prompt],
        before: str,
        num_kept: int | None,
        progress: bool,
        seconds: Sequence[str] | None = None,
    ) -> list[Pooled]:
        """The vector of each text, behind `before`, or of each pair."""
        info, tokenizer = self.core.info, self.tokenizer
        keep = pooled.check_truncation(num_kept, info)
        texts: dict[str, tuple[int, str | None, pooled.Ids]] = {}
        for index, prompt in enumerate(prompts):
            field = f"prompts[{index}]"
            if isinstance(prompt, str):
                second = None if seconds is None else seconds[index]
                ids = pooled.text_ids(
                    tokenizer, info, before + prompt, second, keep=keep, field=field
                )
            else:
                ids = pooled.given_ids(list(prompt), info, keep=keep, field=field)
            named = prompt if isinstance(prompt, str) else None
            texts[str(next(self._ids))] = (index, named, ids)
        found: dict[int, Pooled] = {}
        try:
            for request_id, (_, _, ids) in texts.items():
                request = EngineRequest(
                    request_id=request_id,
                    prompt_token_ids=ids.token_ids,
                    params=SamplingParams(),
                    second_start=ids.second_start,
                )
                self.core.add(request)
            with progress_bar(len(texts), progress) as bar:
                while len(found) < len(texts):
                    for event in self.core.step():
                        index, named, ids = texts[event.request_id]
                        vector = pooled.vector_of(event.vector, f"prompts[{index}]")
                        found[index] = Pooled(named, ids.token_ids, vector)
                        bar.update()
        finally:
            for request_id in texts:
                self.core.abort(request_id)
        return [found[index] for index in range(len(texts))]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def progress_bar(total: int, wanted: bool) -> Any:
    """A bar over prompts, on a terminal."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, unit="prompt", dynamic_ncols=True, disable=None if wanted else True)
