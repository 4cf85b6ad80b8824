"""A model as lm-evaluation-harness takes it, and what went wrong on the way to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Troubles:
    """What a reader of the scores must know, counted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, message: str) -> None:
        """Count one case of `message`, a sentence without its full stop."""
        self._counts[message] += 1

    def drain(self) -> list[str]:
        """The sentences with how often each was true, and forget them."""
        found = [f"{message} (`{count}` times)." for message, count in self._counts.items()]
        self._counts.clear()
        return found


@dataclass(frozen=True, kw_only=True)
class Access:
    """One model behind lm-eval's interface `LM`.

    Attributes:
        lm: an `lm_eval.api.model.LM`.
        name: of the model.
        context_len: tokens of prompt and answer together.
        facts: what the run shall keep: lengths, concurrency, hash of the chat template.
        has_loglikelihood: whether prompts can be scored, which multiple choice needs.
        troubles: filled while it works.
        check: what must hold before a request is scored; raises ConfigError.
        max_stops: stop strings that are sent; None: all.
        same_seed: every request is sent with one seed, so that repeats may be copies.
    """

    lm: Any
    name: str
    context_len: int
    facts: dict[str, Any]
    has_loglikelihood: bool = True
    troubles: Troubles = field(default_factory=Troubles)
    check: Callable[[], None] = lambda: None
    max_stops: int | None = None
    same_seed: bool = False
    close: Callable[[], None] = lambda: None
