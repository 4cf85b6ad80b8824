"""What is asked, and when, for each stage of a bench: settings and files become asks and due times.

Owns which prompts a stage has: those of the warm-up and of each stage differ from one another where
they are made up, and all are decided by the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.load import arrivals, prompts, traces
from penstock.measure.load import words as made_up
from penstock.measure.load.driver import Windows
from penstock.measure.load.search import Point
from penstock.measure.load.settings import LoadSettings
from penstock.measure.load.target import Ask


class Workload:
    """Prompts and due times of one command."""

    def __init__(self, settings: LoadSettings) -> None:
        """Read the files that the settings name.

        Raises:
            ConfigError: one cannot be read, or a line of it; see `traces` and `prompts`.
        """
        self.settings = settings
        self.words = made_up.GUESS
        self.files: dict[str, str] = {}  # paths of what was read
        self.hashes: dict[str, str] = {}  # SHA-256 of these
        self.notes: list[str] = []
        self.trace: list[traces.Arrival] = []
        self.listed: list[Ask] = []
        if settings.trace:
            self._read_trace(Path(settings.trace))
        if settings.prompts is not None:
            self._read_prompts(settings.prompts)
        if self.listed and settings.ignore_eos and settings.max_tokens is None:
            without = [ask.prompt_id for ask in self.listed if ask.max_tokens is None]
            if without:
                raise ConfigError(
                    f"`--ignore-eos` needs a length, and the prompt `{without[0]}` has none.",
                    hint="give --max-tokens",
                )

    def _read_trace(self, path: Path) -> None:
        trace = traces.read_trace(path, self.settings.trace_kind)
        self.trace = trace.arrivals[: self.settings.num_prompts]
        self.files["trace"], self.hashes["trace"] = str(path), trace.sha256
        if trace.num_skipped:
            self.notes.append(
                f"{trace.num_skipped} lines of the trace are no request that can be sent again, "
                "and were left out."
            )

    def _read_prompts(self, name: str) -> None:
        if name in prompts.PUBLISHED:
            path = prompts.path_of(name)
            self.listed = prompts.published(name)
        else:
            path = Path(name)
            self.listed = prompts.read_jsonl(path)
        self.files["prompts"] = str(path)
        self.hashes["prompts"] = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def needs_words(self) -> bool:
        """Whether prompts are made up, and their tokens have to be counted."""
        if self.listed:
            return False
        return not self.trace or any(
            arrival.prompt is None and arrival.messages is None for arrival in self.trace
        )

    @property
    def longest(self) -> int | None:
        """Tokens of the longest made-up prompt with its answer; None: there are none."""
        settings = self.settings
        if not settings.is_synthetic:
            return None
        prompt = settings.input_tokens.most + settings.random_prefix_len
        return round(prompt + settings.output_tokens.most)

    def num_longer(self, num_tokens: int) -> int:
        """Requests of the trace whose prompt and answer are longer than that together."""
        return sum((one.num_in or 0) + (one.num_out or 0) > num_tokens for one in self.trace)

    def warmup(self, num: int) -> list[Ask]:
        """Prompts that are not measured; made-up ones of several lengths, so that a fit is one."""
        seed = f"{self.settings.seed}-warmup"
        if self.listed:
            return [self._told(ask) for ask in Random(seed).choices(self.listed, k=num)]
        length, answer = self.settings.input_tokens, self.settings.output_tokens
        if self.trace:
            known = sorted(arrival.num_in or 1 for arrival in self.trace)
            middle = float(known[len(known) // 2])
            length, answer = made_up.Lengths(middle, middle), made_up.Lengths(16, 16)
        asks = []
        for index in range(num):
            size = max(1.0, length.mean / (1, 2, 4)[index % 3])
            asks += made_up.synthetic(
                1,
                input_tokens=made_up.Lengths(size, size),
                output_tokens=answer,
                seed=f"{seed}-{index}",
                words=self.words,
                fixed_length=self._is_fixed,
                name="warmup",
            )
        return [self._told(ask) for ask in asks]

    def due_s(self, point: Point) -> list[float]:
        """Due times of an open loop."""
        settings = self.settings
        end_s = math.inf
        if settings.steady_s is not None:
            end_s = settings.ramp_s + settings.steady_s + settings.cooldown
        if self.trace:
            offsets = [arrival.due_s for arrival in self.trace]
            return arrivals.replayed(offsets, time_scale=settings.time_scale, duration_s=end_s)
        rates = (
            arrivals.parse_rates(settings.rate_schedule)
            if settings.rate_schedule
            else arrivals.steady(point.rate or 1.0, ramp_s=settings.ramp_s)
        )
        return arrivals.due_times(
            rates,
            seed=settings.seed,
            burstiness=settings.burstiness or 1.0,
            num=settings.num_prompts,
            duration_s=end_s,
        )

    def windows(self, point: Point, due_s: Sequence[float] = ()) -> Windows:
        """The parts of a stage."""
        settings = self.settings
        ends_s = math.inf if settings.steady_s is None else settings.ramp_s + settings.steady_s
        if due_s and settings.rate_schedule:
            rates = arrivals.parse_rates(settings.rate_schedule)
            ends_s = min(ends_s, math.fsum(part.duration_s for part in rates))
        if settings.num_prompts is not None and due_s and point.rate and math.isfinite(point.rate):
            # the last request's share of time is behind it
            ends_s = min(ends_s, due_s[-1] + 1 / point.rate)
        if len(due_s) == len(self.trace) and due_s and due_s[-1] < ends_s:
            ends_s = math.inf  # the trace is over before: the window ends with it
        steady_s = ends_s - settings.ramp_s if math.isfinite(ends_s) else None
        return Windows(settings.ramp_s, steady_s, settings.drain)

    def asks(self, stage: str, num: int | None) -> Iterable[Ask]:
        """Prompts of a stage: `num` made beforehand, or as many as are wanted."""
        settings = self.settings
        made: Iterable[Ask]
        if self.listed:
            made = self._in_turn(stage)
        elif self.trace:
            made = made_up.for_trace(
                self.trace, seed=settings.seed, words=self.words, fixed_length=self._is_fixed
            )
        else:
            made = made_up.endless(
                input_tokens=settings.input_tokens,
                output_tokens=settings.output_tokens,
                seed=settings.seed,
                prefix_share=settings.prefix_share,
                prefix_tokens=settings.random_prefix_len,
                words=self.words,
                fixed_length=self._is_fixed,
                name=stage or "synthetic",
            )
        told = map(self._told, made)
        return told if num is None else list(islice(told, num))

    def _in_turn(self, stage: str) -> Iterator[Ask]:
        """The listed prompts over and over, each time in another order."""
        seeds = (f"{self.settings.seed}/{stage}/{turn}" for turn in count())
        return chain.from_iterable(
            prompts.repeated(self.listed, len(self.listed), seed=seed) for seed in seeds
        )

    @property
    def _is_fixed(self) -> bool:
        if self.settings.ignore_eos is not None:
            return self.settings.ignore_eos
        return not self.listed

    def _told(self, ask: Ask) -> Ask:
        """With what the options say of every answer."""
        settings = self.settings
        more: dict[str, Any] = {}
        if settings.temperature is not None:
            more["temperature"] = settings.temperature
        if ask.max_tokens is None and settings.max_tokens is not None:
            more["max_tokens"] = settings.max_tokens
        if self.listed and self._is_fixed:
            more["fixed_length"] = True
        return msgspec.structs.replace(ask, **more) if more else ask
