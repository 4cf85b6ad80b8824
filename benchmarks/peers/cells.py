"""What is measured: cells, the prompts they send, and the figures they make of the tokens' times.

Pure: a cell is given a function that generates. Prompts are made of segments (protocol.py).
Invariant: within one load no prompt is sent twice, except where a cell says that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.protocol import Segments

Generate = Callable[[list[Segments], int], list[list[float]]]  # prompts, tokens -> times, s

SHARED_LEN, OWN_LEN, NUM_SHARING = 1024, 16, 15


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a cell."""

    title: str
    unit: str
    more_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: `measure(generate, round)` gives its figures by name."""

    figures: dict[str, Figure]
    measure: Callable[[Generate, str], dict[str, float]] | None  # None: taken by the driver
    batch: tuple[int, int, int] | None = None  # requests, tokens of a prompt, of an answer


def _decode(context: int, num_tokens: int) -> Cell:
    """Tokens a second of one request.

    The same prompt each round: the engine may know it, for only what follows is timed.
    """
    name = f"decode-{context}"

    def measure(generate: Generate, round_: str) -> dict[str, float]:
        (times,) = generate([[(name, context)]], num_tokens + 1)
        return {name: num_tokens / (times[-1] - times[0])}

    return Cell({name: Figure(f"decode, 1 request, context {context}", "tok/s")}, measure)


def _prefill(num_tokens: int) -> Cell:
    name = f"prefill-{num_tokens}"

    def measure(generate: Generate, round_: str) -> dict[str, float]:
        ((first_s,),) = generate([[(f"{name} {round_}", num_tokens)]], 1)
        return {name: num_tokens / first_s}

    return Cell({name: Figure(f"prefill of {num_tokens}", "tok/s")}, measure)


def _batch(num_requests: int, prompt_len: int, output_len: int) -> Cell:
    """Output tokens a second, from the submission of all until the last is done."""
    name = f"batch-{num_requests}"

    def measure(generate: Generate, round_: str) -> dict[str, float]:
        prompts: list[Segments] = [
            [(f"{name} {round_} {number}", prompt_len)] for number in range(num_requests)
        ]
        times = generate(prompts, output_len)
        return {name: num_requests * output_len / max(one[-1] for one in times)}

    title = f"{num_requests} requests, {prompt_len} -> {output_len}"
    size = (num_requests, prompt_len, output_len)
    return Cell({name: Figure(title, "output tok/s")}, measure, size)


def _shared_prefix() -> Cell:
    """One request, then others at once that begin like it; one new token each."""

    def measure(generate: Generate, round_: str) -> dict[str, float]:
        prompts: list[Segments] = [
            [(f"shared {round_}", SHARED_LEN), (f"own {round_} {number}", OWN_LEN)]
            for number in range(1 + NUM_SHARING)
        ]
        first = generate(prompts[:1], 1)
        others = generate(prompts[1:], 1)
        return {
            "shared-first": first[0][0],
            "shared-others": max(one[0] for one in others),
        }

    title = f"shared prefix of {SHARED_LEN}"
    return Cell(
        {
            "shared-first": Figure(f"{title}: first request", "s", False),
            "shared-others": Figure(f"{title}: {NUM_SHARING} more at once", "s", False),
        },
        measure,
    )


def cells(*, quick: bool) -> dict[str, Cell]:
    """All cells by name, in the order in which they are measured."""
    num_tokens = 16 if quick else 32
    prompt_len, output_len = (64, 32) if quick else (256, 128)
    return {
        "startup": Cell({"startup": Figure("process start to first token", "s", False)}, None),
        "decode-128": _decode(128, num_tokens),
        "decode-1024": _decode(1024, num_tokens),
        "decode-4096": _decode(4096, num_tokens),
        "prefill-1024": _prefill(1024),
        "prefill-2048": _prefill(2048),
        "shared-prefix": _shared_prefix(),
        "batch-16": _batch(16, prompt_len, output_len),
        "batch-64": _batch(64, prompt_len, output_len),
        "rss": Cell({"rss": Figure("peak resident memory", "GiB", False)}, None),
    }


def all_titles(*, quick: bool) -> dict[str, str]:
    """Figure -> what it is called."""
    return {
        name: figure.title
        for cell in cells(quick=quick).values()
        for name, figure in cell.figures.items()
    }
