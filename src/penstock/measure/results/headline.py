"""The few figures of a run that a reader asks for first: in the list, side by side, in short.

A function a kind, of the figures alone. A figure that a run does not have is None; what figures
that were tampered with lack is a ConfigError, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from penstock.errors import ConfigError
from penstock.measure.metrics import TITLES
from penstock.measure.report.units import number, quantity

# What JSON of another shape than the kind's leads to.
MISSHAPEN = (
    *(KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError),
    msgspec.MsgspecError,
)


class Headline(NamedTuple):
    """A figure with its title, its value, and the unit that the value is in (see `units`)."""

    title: str
    value: float | str | None
    unit: str = ""

    @property
    def text(self) -> str:
        """The value as people read it; `—` where it is not there."""
        return self.value if isinstance(self.value, str) else quantity(self.value, self.unit)


def headline(kind: str, figures: Mapping[str, Any]) -> list[Headline]:
    """The first figures of a run of a kind, in the order of their weight.

    Raises:
        ConfigError: the figures are not of the shape that the kind has.
    """
    make = _OF_KIND.get(kind)
    try:
        return [] if make is None else list(make(figures))
    except MISSHAPEN as error:
        raise ConfigError(
            f"The figures are not as the kind `{kind}` has them ({type(error).__name__}: {error}).",
            hint="changed, or of another version: `penstock verify` says which",
        ) from None


def key_figure(kind: str, figures: Mapping[str, Any]) -> str:
    """One figure in words, for a list; empty where there is none."""
    there = [one for one in headline(kind, figures) if one.value is not None]
    return f"{there[0].title} {there[0].text}" if there else ""


def _bench(figures: Mapping[str, Any]) -> Iterator[Headline]:
    stages = figures["stages"]
    if search := figures["search"]:
        yield Headline("requests/s within the limits", search["highest_passing"])
    for stage in stages:
        name = "" if len(stages) == 1 else f"{stage['stage']}: "
        latency = stage["latency"]
        for field, mark in (
            ("ttft_from_due_s", "p95"),
            ("ttft_from_due_s", "p50"),
            ("tpot_s", "p50"),
            ("e2e_from_due_s", "p50"),
            ("e2e_from_due_s", "p95"),
        ):
            yield Headline(f"{name}{TITLES[field]}, {mark}", latency[field][mark], "s")
        yield Headline(f"{name}output tokens/s", stage["tokens"]["output_per_s"])
        yield Headline(f"{name}requests answered/s", stage["rate"]["answered_per_s"])
        yield Headline(f"{name}requests failed", stage["requests"]["num_errors"])
        if stage["goodput"] is not None:
            yield Headline(f"{name}within the limits", stage["goodput"]["share"], "%")
        meters = stage["meters"]
        yield Headline(f"{name}peak memory", meters["memory"]["peak_rss_bytes"], "bytes")
        energy = meters["energy"]["joules_per_output_token"]
        yield Headline(f"{name}energy an output token", energy, "J")
        yield Headline(f"{name}cost an answer", stage["cost"]["usd_per_success"], "usd")


def _engines(figures: Mapping[str, Any]) -> Iterator[Headline]:
    for row in figures["rows"]:
        for arm, cell in row["arms"].items():
            name = f"{arm}: " if len(row["arms"]) > 1 else ""
            value = None if cell is None else cell["median"]
            figure = TITLES.get(row["figure"], row["figure"])
            unit = "" if row["unit"] in ("tokens/s", "1/s", "tokens") else row["unit"]
            yield Headline(f"{name}{row['stage']}, {figure}", value, unit)


def _eval(figures: Mapping[str, Any]) -> Iterator[Headline]:
    arms = figures["arms"]
    for arm, made in arms.items():
        for task, part in made["tasks"].items():
            name = f"{arm}: {task}" if len(arms) > 1 else task
            score = part["scores"].get(part["main_score"]) or {}
            value = score.get("value")
            is_share = value is not None and score.get("low") is not None and 0 <= value <= 1
            yield Headline(f"{name}, {part['main_score']}", value, "%" if is_share else "")
            yield Headline(f"{name}, answered", part["num_answered"])


def _compare(figures: Mapping[str, Any]) -> Iterator[Headline]:
    yield Headline("verdict", figures["overall"]["verdict"])
    for name, axis in figures["axes"].items():
        if axis is not None:
            yield Headline(name, axis["verdict"])
            unit = "percentage points" if axis["kind"] == "difference" else "times"
            yield Headline(f"{name}, effect", axis["estimate"], unit)


def _track(figures: Mapping[str, Any]) -> Iterator[Headline]:
    yield Headline("alarms", sum(drift["alarm"] for drift in figures["drift"]))
    for series, one in figures["series"].items():
        if not one["cells"]:
            yield Headline(f"{series}, availability", one["availability"], "%")
        for cell in one["cells"]:
            name = (
                f"{series} {cell['input_tokens']}/{cell['output_tokens']} x {cell['concurrency']}"
            )
            yield Headline(f"{name}, {TITLES['ttft_s']}, p50", cell["ttft_s"]["p50"], "s")
            yield Headline(f"{name}, tokens/s, p50", cell["tokens_per_s"]["p50"])
            yield Headline(f"{name}, availability", cell["availability"], "%")
            price = cell["usd_per_1m_output_tokens"]
            yield Headline(f"{name}, $ per 1M output tokens", price, "usd")


def _import(figures: Mapping[str, Any]) -> Iterator[Headline]:
    groups = figures["groups"]
    for group in groups:
        parts = (group["arm"], group["stage"]) if len(groups) > 1 else ()
        name = " ".join(part for part in parts if part)
        name = f"{name}: " if name else ""
        for task, scores in group["scores"].items():
            for score, part in scores.items():
                yield Headline(f"{name}{task}, {score}", part["mean"])
        for field in ("ttft_s", "tpot_s", "e2e_s", "e2e_from_due_s"):
            for mark in ("p50", "p95"):
                if group[field]["n"]:
                    yield Headline(f"{name}{TITLES[field]}, {mark}", group[field][mark], "s")
        yield Headline(f"{name}output tokens/s", group["output_tokens_per_s"])
        answered = f"{number(group['num_ok'])} of {number(group['num_requests'])}"
        yield Headline(f"{name}answered", answered)


_OF_KIND: Final[dict[str, Callable[[Mapping[str, Any]], Iterator[Headline]]]] = {
    "bench": _bench,
    "engines": _engines,
    "eval": _eval,
    "compare": _compare,
    "track": _track,
    "import": _import,
}
