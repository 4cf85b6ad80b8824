"""Readers of price lists: tokencost's, litellm's mirror, simonw/llm-prices, and the user's toml.

Each entry becomes a `Price` in US dollars per million tokens, with its source and date. Knows no
request. Lists write 0 both for "free" and for "not known": an entry whose prices are all 0 is left
out, unless it is the user's.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError

TOKENCOST, LITELLM, LLM_PRICES = "tokencost", "litellm", "llm-prices"
USER = "prices.toml"
_JSON_FILES = {
    TOKENCOST: "tokencost_model_prices.json",
    LITELLM: "litellm_mirror_model_prices.json",
}
_TEXT_MODES = {None, "chat", "completion", "responses"}
_ABOVE = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")
_PER_TOKEN = 1e6


class Tier(msgspec.Struct, kw_only=True, frozen=True):
    """Prices of a whole request whose prompt is longer than `above_tokens`."""

    above_tokens: int
    usd_in_per_million: float
    usd_out_per_million: float
    usd_cached_in_per_million: float | None = None


class Price(msgspec.Struct, kw_only=True, frozen=True):
    """What a provider takes for a model's tokens.

    `as_of` is the day on which the list was last changed, or from which the entry holds (ISO
    8601). `from_date` is included, `to_date` is not: on that day the next entry holds.
    """

    provider: str
    model: str
    usd_in_per_million: float
    usd_out_per_million: float
    usd_cached_in_per_million: float | None = None  # None: as other tokens
    usd_reasoning_per_million: float | None = None  # None: as output
    tiers: tuple[Tier, ...] = ()  # by rising `above_tokens`
    source: str  # list and entry
    as_of: str | None = None
    from_date: str | None = None
    to_date: str | None = None
    conflicts: tuple[str, ...] = ()  # what other lists say instead
    match: str = ""  # how the name was found

    def label(self) -> str:
        """For `Request.usd_source`: source and date."""
        return f"{self.source}, as of {self.as_of or 'an unknown day'}"


class MachinePrice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The table `[machine]` of a prices.toml."""

    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None


def read_lists(folder: Path) -> list[Price]:
    """Every price of the lists in a folder `table-prices`.

    Raises:
        ConfigError: a list is there, but is not what it should be.
    """
    dates = _dates(folder / "SOURCE.md")
    prices: list[Price] = []
    for name, file in _JSON_FILES.items():
        if (folder / file).is_file():
            try:
                prices += _of_litellm(name, _json(folder / file), dates.get(file))
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"`{folder / file}` is no list of {name}: {error!r}.") from None
    for file_path in sorted((folder / LLM_PRICES).glob("*.json")):
        as_of = dates.get(f"{LLM_PRICES}/{file_path.name}")
        try:
            prices += _of_llm_prices(_json(file_path), as_of)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"`{file_path}` is no list of llm-prices: {error!r}.") from None
    return prices


def read_user(file: Path) -> tuple[list[Price], MachinePrice]:
    """The user's prices.

    Raises:
        ConfigError: the file is no TOML, or an entry lacks a field or has a wrong one.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"`{file}` cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"`{file}` is no TOML: {error}.") from None
    if unknown := found.keys() - {"price", "machine"}:
        raise ConfigError(
            f"`{file}` has `{sorted(unknown)[0]}`, which is not known.",
            hint="write [[price]] tables, and at most one [machine]",
        )
    entries = found.get("price", [])
    if not isinstance(entries, list):
        raise ConfigError(f"`{file}` has `[price]`; write `[[price]]`, as there may be many.")
    prices = [_of_user(entry, number, file) for number, entry in enumerate(entries, start=1)]
    try:
        machine = msgspec.convert(found.get("machine", {}), MachinePrice)
    except msgspec.ValidationError as error:
        raise ConfigError(f"`[machine]` of `{file}` is wrong: {error}.") from None
    for name in MachinePrice.__struct_fields__:
        if (value := getattr(machine, name)) is not None:
            _positive(value, name, "[machine]", file)
    return prices, machine


class _UserEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table `[[price]]`."""

    provider: str
    model: str
    usd_in_per_million: float
    usd_out_per_million: float
    usd_cached_in_per_million: float | None = None
    usd_reasoning_per_million: float | None = None
    from_date: date | None = msgspec.field(default=None, name="from")
    to_date: date | None = msgspec.field(default=None, name="to")
    source: str = ""


def _of_user(entry: Any, number: int, file: Path) -> Price:
    where = f"[[price]] number {number}"
    try:
        found = msgspec.convert(entry, _UserEntry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"`{where}` of `{file}` is wrong: {error}.") from None
    for name in _UserEntry.__struct_fields__:
        if name.startswith("usd") and (value := getattr(found, name)) is not None:
            _positive(value, name, where, file)
    if found.from_date and found.to_date and found.to_date <= found.from_date:
        raise ConfigError(f"`to` of `{where}` of `{file}` is not later than `from`.")
    return Price(
        provider=found.provider,
        model=found.model,
        usd_in_per_million=found.usd_in_per_million,
        usd_out_per_million=found.usd_out_per_million,
        usd_cached_in_per_million=found.usd_cached_in_per_million,
        usd_reasoning_per_million=found.usd_reasoning_per_million,
        source=f"{USER}: {found.source or f'{found.provider}/{found.model}'}",
        as_of=found.from_date.isoformat() if found.from_date else None,
        from_date=found.from_date.isoformat() if found.from_date else None,
        to_date=found.to_date.isoformat() if found.to_date else None,
    )


def _positive(value: float, name: str, where: str, file: Path) -> None:
    if not 0 <= value < float("inf"):
        raise ConfigError(f"`{name}` of `{where}` of `{file}` is `{value}`, which is no price.")


def _of_litellm(name: str, entries: Any, as_of: str | None) -> Iterator[Price]:
    """Entries of litellm's format, which tokencost shares; those without prices of tokens go."""
    for key, entry in entries.items():
        usd_in, usd_out = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
        if usd_in is None or usd_out is None or entry.get("mode") not in _TEXT_MODES:
            continue
        if usd_in == usd_out == 0:
            continue
        reasoning = entry.get("output_cost_per_reasoning_token")
        yield Price(
            provider=entry["litellm_provider"],
            model=key,
            usd_in_per_million=_million(usd_in),
            usd_out_per_million=_million(usd_out),
            usd_cached_in_per_million=_maybe(entry.get("cache_read_input_token_cost")),
            usd_reasoning_per_million=_maybe(None if reasoning == usd_out else reasoning),
            tiers=_tiers(entry),
            source=f"{name}: {key}",
            as_of=as_of,
        )


def _tiers(entry: dict[str, Any]) -> tuple[Tier, ...]:
    found = []
    for field, usd_in in entry.items():
        if match := _ABOVE.fullmatch(field):
            suffix = f"_above_{match[1]}k_tokens"
            usd_out = entry.get(f"output_cost_per_token{suffix}", entry["output_cost_per_token"])
            cached = entry.get(f"cache_read_input_token_cost{suffix}")
            found.append(
                Tier(
                    above_tokens=int(match[1]) * 1000,
                    usd_in_per_million=_million(usd_in),
                    usd_out_per_million=_million(usd_out),
                    usd_cached_in_per_million=_maybe(cached),
                )
            )
    return tuple(sorted(found, key=lambda tier: tier.above_tokens))


def _of_llm_prices(found: Any, as_of: str | None) -> Iterator[Price]:
    """Entries of simonw/llm-prices; `NAME-200k` is the tier of `NAME` above 200k tokens."""
    models = {model["id"]: model for model in found["models"]}
    for model in found["models"]:
        for entry in model["price_history"]:
            yield Price(
                provider=found["vendor"],
                model=model["id"],
                usd_in_per_million=float(entry["input"]),
                usd_out_per_million=float(entry["output"]),
                usd_cached_in_per_million=entry["input_cached"],
                tiers=_sibling(model, entry, models),
                source=f"{LLM_PRICES}: {found['vendor']}/{model['id']}",
                as_of=entry["from_date"] or as_of,
                from_date=entry["from_date"],
                to_date=entry["to_date"],
            )


def _sibling(model: Any, entry: Any, models: dict[str, Any]) -> tuple[Tier, ...]:
    match = re.search(r"≤(\d+)k$", model["name"])
    above = models.get(f"{model['id']}-{match[1]}k") if match else None
    if match is None or above is None:
        return ()
    for other in above["price_history"]:
        if (other["from_date"], other["to_date"]) == (entry["from_date"], entry["to_date"]):
            return (
                Tier(
                    above_tokens=int(match[1]) * 1000,
                    usd_in_per_million=float(other["input"]),
                    usd_out_per_million=float(other["output"]),
                    usd_cached_in_per_million=other["input_cached"],
                ),
            )
    return ()


def _dates(file: Path) -> dict[str, str]:
    """The day on which each list was last changed, from the table of a SOURCE.md."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\| \w+ (\d{4}-\d\d-\d\d) \|", text, re.M)
    return dict(lines)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{file}` cannot be read: {error}.") from None


def _million(usd_per_token: float) -> float:
    return round(usd_per_token * _PER_TOKEN, 9)  # 1.5e-07 is 0.15, not 0.15000000000000002


def _maybe(usd_per_token: float | None) -> float | None:
    return None if usd_per_token is None else _million(usd_per_token)
