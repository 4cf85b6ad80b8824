"""Prices of models by provider, and the cost of requests and of machines in US dollars.

A model is found by its exact name, or after a normalisation that the price names (`match`); a
similar name is only suggested. What is not known is None with the reason. Sums only: intervals of
ratios are the verdict's.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from penstock.errors import ConfigError
from penstock.measure.meters.carbon import JOULES_PER_KWH
from penstock.measure.meters.price_lists import (
    LLM_PRICES,
    USER,
    MachinePrice,
    Price,
    read_lists,
    read_user,
)
from penstock.measure.records import Request

# Names of one provider in the lists. Vertex AI and Gemini's own API are two offers.
_SAME = (
    {"google", "gemini"},
    {"moonshot", "moonshot-ai"},
    {"together", "together_ai"},
    {"fireworks", "fireworks_ai"},
    {"azure", "azure_ai", "azure_text"},
    {"openai", "text-completion-openai"},
)
_HOSTS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "api.mistral.ai": "mistral",
    "api.groq.com": "groq",
    "api.together.xyz": "together_ai",
    "api.together.ai": "together_ai",
    "api.deepinfra.com": "deepinfra",
    "api.fireworks.ai": "fireworks_ai",
    "openrouter.ai": "openrouter",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "xai",
    "generativelanguage.googleapis.com": "gemini",
    "api.cerebras.ai": "cerebras",
    "api.sambanova.ai": "sambanova",
    "api.perplexity.ai": "perplexity",
    "api.moonshot.ai": "moonshot",
}
# Errors for which nothing is billed: there was no answer, not even a part of one.
_NOT_BILLED = ("http_", "connect")


class Cost(msgspec.Struct, kw_only=True):
    """US dollars; None: not known, and why. `explanation` names the price otherwise."""

    usd: float | None
    explanation: str


class NoPrice(msgspec.Struct, kw_only=True):
    """There is no price, and why."""

    reason: str
    similar: list[str] = []


class CostSums(msgspec.Struct, kw_only=True):
    """What many requests cost together.

    `usd` is a lower bound if `num_unknown` is not 0, and None if no request's cost is known.
    """

    usd: float | None
    num_requests: int
    num_unknown: int  # requests whose cost is not known
    num_success: int
    usd_per_success: float | None  # None: no success, or a cost is not known


class Prices:
    """Prices of lists and of the user."""

    def __init__(self, entries: Iterable[Price], machine: MachinePrice | None = None) -> None:
        self.machine = machine or MachinePrice()
        self._by_name: dict[tuple[str, str], list[Price]] = {}
        self._models: dict[str, set[str]] = {}  # providers by model
        for entry in entries:
            for key in _names(entry):
                self._by_name.setdefault(key, []).append(entry)
            self._models.setdefault(entry.model.lower(), set()).add(entry.provider)

    def __len__(self) -> int:
        return len({id(one) for some in self._by_name.values() for one in some})

    def find(self, provider: str, model: str, on: date | None = None) -> Price | NoPrice:
        """The price of a provider's model on a day, today unless it is given.

        The user's entry precedes lists; of lists, the one with the latest date. What others say
        instead is in `conflicts`.
        """
        if not provider:
            return NoPrice(reason="no provider was named: each has its own price of a model")
        day = (on or date.today()).isoformat()
        there: dict[Price, str] = {}  # and how each was found
        for key, match in _ways(provider.lower(), model):
            for one in self._by_name.get(key, ()):
                if _holds(one, day):
                    there.setdefault(one, match)
        if there:
            best = max(there, key=lambda one: _rank(one, provider))
            others = [one for one in there if one is not best]
            return _with_conflicts(best, others, there[best])
        known = self._models.get(model.lower())
        told = f"; {', '.join(sorted(known))} have" if known else ""
        return NoPrice(
            reason=f"no list has `{model}` of `{provider}` on {day}{told}",
            similar=difflib.get_close_matches(model.lower(), self._models, n=3, cutoff=0.8),
        )


def load(path: Path | None = None, data_dir: Path | None = None) -> Prices:
    """The user's prices.toml, if it is given, and the lists in `data_dir`, if it has them.

    Raises:
        ConfigError: the file or a list is damaged.
    """
    entries: list[Price] = []
    machine = None
    if path is not None:
        user, machine = read_user(path)
        entries += user
    if data_dir is None and os.environ.get("PENSTOCK_DATA"):
        data_dir = Path(os.environ["PENSTOCK_DATA"])
    for folder in () if data_dir is None else (data_dir / "table-prices", data_dir):
        if (folder / LLM_PRICES).is_dir() or any(folder.glob("*_model_prices.json")):
            entries += read_lists(folder)
            break
    return Prices(entries, machine)


def provider_of(url: str) -> str:
    """The provider behind an address, for those that the lists know; empty: not known."""
    return _HOSTS.get(urlsplit(url).hostname or "", "")


def cost(row: Request, price: Price | NoPrice) -> Cost:
    """What a request cost: cached tokens at their own price, reasoning as output.

    A refusal (an HTTP status, no connection) costs nothing. What was cut, timed out or broke off
    may have been billed: it is not known. Writing to a provider's cache, tools and searches are not
    in the rows and not in the cost.
    """
    if isinstance(price, NoPrice):
        return Cost(usd=None, explanation=price.reason)
    if row.error_class is not None and row.error_class.startswith(_NOT_BILLED):
        return Cost(usd=0.0, explanation=f"refused ({row.error_class}): not billed")
    if row.error_class is not None:
        return Cost(usd=None, explanation=f"broke off ({row.error_class}): it may have been billed")
    if row.n_in is None or row.n_out is None or row.count_source in ("chunks", "none"):
        return Cost(usd=None, explanation="nobody told the tokens")
    usd_in, usd_out = price.usd_in_per_million, price.usd_out_per_million
    usd_cached = price.usd_cached_in_per_million
    usd_reasoning = price.usd_reasoning_per_million
    for tier in price.tiers:
        if row.n_in > tier.above_tokens:
            usd_in, usd_out = tier.usd_in_per_million, tier.usd_out_per_million
            usd_cached = tier.usd_cached_in_per_million
    num_cached = min(row.n_cached or 0, row.n_in)
    num_reasoning = 0
    if usd_reasoning is not None:
        if row.n_reasoning is None:
            reason = "reasoning has a price of its own, and nobody told its tokens"
            return Cost(usd=None, explanation=reason)
        num_reasoning = row.n_reasoning
    usd = (row.n_in - num_cached) * usd_in + (row.n_out - num_reasoning) * usd_out
    usd += num_cached * (usd_in if usd_cached is None else usd_cached)
    usd += num_reasoning * (usd_reasoning or 0.0)
    return Cost(usd=usd * 1e-6, explanation=price.label())


def set_cost(row: Request, price: Price | NoPrice) -> None:
    """Write a request's cost into its row."""
    found = cost(row, price)
    row.usd, row.usd_source = found.usd, found.explanation


def hourly(usd_per_hour: float, duration_s: float) -> float:
    """What a machine costs for some time."""
    return usd_per_hour * duration_s / 3600


def machine_cost(
    settings: dict[str, object], duration_s: float, joules: float | None = None
) -> Cost:
    """What the machine cost in a window, by `settings["machine_price"]` of a run's header.

    Price of the hour, and of the energy if a price of a kWh is given.
    """
    try:
        price = msgspec.convert(settings.get("machine_price") or {}, MachinePrice)
    except msgspec.ValidationError as error:
        raise ConfigError(f"`machine_price` of the run's settings is wrong: {error}.") from None
    if price.usd_per_hour is None and price.usd_per_kwh is None:
        reason = "no price of the machine (--usd-per-hour) or of its energy (--usd-per-kwh)"
        return Cost(usd=None, explanation=reason)
    usd, told = 0.0, []
    if price.usd_per_hour is not None:
        usd += hourly(price.usd_per_hour, duration_s)
        told.append(f"{price.usd_per_hour:g} USD/h")
    if price.usd_per_kwh is not None:
        if joules is None:
            return Cost(usd=None, explanation="a kWh has a price, but the energy is not known")
        usd += joules / JOULES_PER_KWH * price.usd_per_kwh
        told.append(f"{price.usd_per_kwh:g} USD/kWh")
    return Cost(usd=usd, explanation=" and ".join(told))


def cost_per_success(
    rows: Iterable[Request], is_success: Callable[[Request], bool] = lambda row: row.ok
) -> CostSums:
    """Sum of the costs over the number of successes: a ratio of sums, never a mean of ratios."""
    every = list(rows)
    known = [row.usd for row in every if row.usd is not None]
    num_success = sum(1 for row in every if is_success(row))
    num_unknown = len(every) - len(known)
    usd = math.fsum(known)
    is_known = num_success > 0 and num_unknown == 0
    return CostSums(
        usd=usd if known else None,
        num_requests=len(every),
        num_unknown=num_unknown,
        num_success=num_success,
        usd_per_success=usd / num_success if is_known else None,
    )


def _names(entry: Price) -> set[tuple[str, str]]:
    """Under what an entry is found: as it is written, and without its own provider's prefix."""
    provider = entry.provider.lower()
    names = {(provider, entry.model), (provider, entry.model.lower())}
    prefix, _, rest = entry.model.partition("/")
    if rest and prefix.lower() in _aliases(provider):
        names |= {(provider, rest), (provider, rest.lower())}
    return names


def _ways(provider: str, model: str) -> list[tuple[tuple[str, str], str]]:
    """Keys to look up, and what was done to the name, the most exact first."""
    aliases = [provider, *sorted(_aliases(provider) - {provider})]
    prefix, _, rest = model.partition("/")
    names = [(model, "as written"), (model.lower(), "in lower case")]
    if rest and prefix.lower() in aliases:
        names.append((rest.lower(), f"without `{prefix}/`, in lower case"))
    return [
        ((alias, name), told if alias == provider else f"{told}, provider `{alias}`")
        for alias in aliases
        for name, told in names
    ]


def _aliases(provider: str) -> set[str]:
    return {provider}.union(*(same for same in _SAME if provider in same))


def _rank(entry: Price, provider: str) -> tuple[bool, bool, str]:
    """The user's entry first, then the provider's own name, then the latest date."""
    is_user = entry.source.startswith(USER)
    return is_user, entry.provider.lower() == provider.lower(), entry.as_of or ""


def _holds(entry: Price, day: str) -> bool:
    return (entry.from_date or "") <= day < (entry.to_date or "9999")


def _with_conflicts(best: Price, others: Iterable[Price], match: str) -> Price:
    def told(one: Price) -> str:
        cached = one.usd_cached_in_per_million
        return (
            f"in {one.usd_in_per_million:g}, out {one.usd_out_per_million:g}"
            f"{'' if cached is None else f', cached {cached:g}'} USD per million"
        )

    different = tuple(f"{one.label()}: {told(one)}" for one in others if told(one) != told(best))
    return msgspec.structs.replace(best, conflicts=different, match=match)
