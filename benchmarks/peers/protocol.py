"""The worker's half of the conversation: one JSON object a line in, one out.

Standard library only, so that it runs in every engine's environment. What an engine prints goes to
stderr. A request is `{"op": ..., ...}`; the reply is `{"result": ...}` or `{"error": sentence}`.
A prompt is a list of segments `[seed, number of tokens]`, drawn here: equal seeds are equal tokens,
so that prompts share what they are meant to share and nothing else.
Invariant: the clock runs from the submission of the prompts, and a token's time is when the
engine handed it out.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>

Segments = list[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an engine is loaded with; the same for all.

    `directory` is what `prepare` wrote, `extra` are options of this one engine.
    """

    checkpoint: str
    directory: str
    precision: str
    group: int  # weights a scale in 4 bits, where the engine lets one choose
    num_threads: int
    max_len: int
    max_num_seqs: int
    max_batched_tokens: int
    kv_bytes: int
    vocab_size: int
    extra: dict[str, Any]


class Engine(ABC):
    """One inference engine in this process. Its package is imported in the methods only."""

    packages: tuple[str, ...] = ()  # whose versions are reported

    def prepare(self, options: Options) -> None:  # noqa: B027
        """Write what `load` reads to `options.directory`, which exists and is empty.

        An engine that reads the checkpoint itself has nothing to do.
        """

    @abstractmethod
    def load(self, options: Options) -> None:
        """Get ready to answer."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        """Continue all prompts at once, greedily, by exactly `num_tokens` tokens each.

        Returns:
            for each prompt the clock (`time.perf_counter`, s) when each of its tokens was there.
        """


def draw(segments: Segments, vocab_size: int) -> list[int]:
    """The token ids of a prompt."""
    return [
        token_id
        for seed, num_tokens in segments
        for token_id in random.Random(seed).choices(range(vocab_size), k=num_tokens)
    ]


def serve(engine: Engine) -> None:
    """Answer requests until stdin ends, or the driver does; a paused worker sees no end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what engines print is no reply
    converse(engine, sys.stdin, replies)


def converse(engine: Engine, requests: TextIO, replies: TextIO) -> None:
    """Answer requests, one a line, until there are no more."""
    vocab_size = 0
    for line in requests:
        request = json.loads(line)
        try:
            if "options" in request:
                options = Options(**request["options"])
                vocab_size = options.vocab_size
            if request["op"] == "prepare":
                engine.prepare(options)
                result: Any = None
            elif request["op"] == "load":
                result = _load(engine, options)
            elif request["op"] == "generate":
                result = _generate(engine, request, vocab_size)
            else:
                raise ValueError(f"`op` is `{request['op']}`")
            reply = {"result": result}
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()  # whatever an engine raises is its row's reason
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _load(engine: Engine, options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    engine.load(options)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "versions": {name: _version(name) for name in engine.packages}}


def _generate(engine: Engine, request: dict[str, Any], vocab_size: int) -> list[list[float]]:
    prompts = [draw(segments, vocab_size) for segments in request["prompts"]]
    num_tokens = request["num_tokens"]
    started = time.perf_counter()
    times = engine.generate(prompts, num_tokens)
    if [len(one) for one in times] != [num_tokens] * len(prompts):
        raise RuntimeError(f"asked for {num_tokens} tokens, got {[len(one) for one in times]}")
    return [[when - started for when in one] for one in times]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def num_equal(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
