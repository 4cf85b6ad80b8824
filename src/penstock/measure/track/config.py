"""What `penstock track` is told: one TOML file. Reads and checks it; knows no network.

Invariant: a configuration that was read can be run: the schedule has a next slot, the series have
different names, and each reference is a series.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from penstock.errors import ConfigError

MAX_NAME_CHARS = 300  # of `provider/model`
Positive = Annotated[int, msgspec.Meta(ge=1)]
_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}


class Schedule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When to probe: a cron expression, or an interval counted from midnight UTC, 1970."""

    cron: str | None = None
    every: str | None = None  # such as `30min`, `6h`
    timezone: str | None = None  # of the cron expression; none: UTC


class Probe(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a slot asks of each series."""

    input_tokens: list[Positive] = msgspec.field(default_factory=lambda: [100, 2000])
    output_tokens: list[Positive] = msgspec.field(default_factory=lambda: [100])
    concurrency: list[Positive] = msgspec.field(default_factory=lambda: [1, 8])
    rounds: Positive = 1  # requests that each of the concurrent clients sends, one after another
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    pause_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0  # between cells, for rate limits
    canaries: str | None = None  # a text file, one prompt a line; none: our own
    canary_tokens: Positive = 32
    first_token_samples: Annotated[int, msgspec.Meta(ge=0)] = 4  # of each canary, in each slot


class Alarm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a series counts as changed."""

    false_alarms_per_year: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # of the whole tracker
    window_slots: Positive = 48  # the newest slots, which are compared
    reference_slots: Positive = 96  # the first ones, where a series has no reference of its own


class Model(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A model at a provider: together they are a series."""

    name: str
    precision: str = ""  # as the provider declares it
    reference: str | None = None  # `provider/model` whose answers these should be
    # Under what a price list has it; none: the provider's name, then what its address tells.
    price_provider: str | None = None
    price_model: str | None = None


class Provider(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where models are served."""

    name: str
    url: str
    model: list[Model]
    api_key_env: str | None = None  # name of the variable that holds the key
    dialect: Literal["auto", "openai-chat", "openai-completions", "tgi"] = "auto"
    region: str = ""


class Config(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    schedule: Schedule
    provider: list[Provider]
    database: str = "track.sqlite"
    prices: str | None = None  # a prices.toml
    probe: Probe = msgspec.field(default_factory=Probe)
    alarm: Alarm = msgspec.field(default_factory=Alarm)

    @property
    def series(self) -> list[tuple[Provider, Model]]:
        """Every model at every provider."""
        return [(provider, model) for provider in self.provider for model in provider.model]


def interval_s(text: str) -> int:
    """Seconds of `45s`, `30min`, `6h` or `1d`.

    Raises:
        ConfigError: it is none of these, zero, or more than a year.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*(s|min|h|d)\s*", text)
    seconds = int(found[1]) * _UNITS_S[found[2]] if found is not None else 0
    if not 0 < seconds <= 366 * 86400:
        raise ConfigError(f"`schedule.every` is `{text}`.", hint="such as 30min, 6h or 1d")
    return seconds


def read_config(path: Path) -> Config:
    """Read and check a file. Paths in it are relative to its directory.

    Raises:
        ConfigError: it cannot be read, or a field in it is wrong; the message names the field.
    """
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        said = str(error).replace("`$.", "`").rstrip(".")
        raise ConfigError(f"`{path}`: {said}.", hint="docs/measure/track.md shows a file") from None
    _check(config)
    for owner, field in ((config, "database"), (config, "prices"), (config.probe, "canaries")):
        told = getattr(owner, field)
        if told is not None and "://" not in told:
            setattr(owner, field, str(path.parent / told))
    return config


def _check(config: Config) -> None:
    from penstock.measure.track.schedule import slots_of  # cron and time zones are checked there

    if (config.schedule.cron is None) == (config.schedule.every is None):
        raise ConfigError("`schedule` must have one of `cron` and `every`.")
    slots_of(config.schedule)
    if config.schedule.every is not None and config.schedule.timezone is not None:
        raise ConfigError(
            "`schedule.timezone` goes with `cron`; `every` counts from midnight UTC, 1970."
        )
    for owner in (config.probe, config.alarm):
        for field, value in msgspec.structs.asdict(owner).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"`{field}` is `{value}`, which is no number.")
    names = [f"{provider.name}/{model.name}" for provider, model in config.series]
    if not names:
        raise ConfigError("There is no `[[provider]]` with a `[[provider.model]]`.")
    for name in names:
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise ConfigError(
                f"The name of the series `{name[:40]!r}` is too long or not printable.",
                hint=f"provider/model, at most {MAX_NAME_CHARS} characters",
            )
        if names.count(name) > 1:
            raise ConfigError(f"The series `{name}` is there twice.", hint="name one differently")
    for provider, model in config.series:
        if model.reference is not None and model.reference not in names:
            raise ConfigError(
                f"The `reference` of `{provider.name}/{model.name}` is `{model.reference}`, which "
                "is no series.",
                hint=f"known: {', '.join(names)}",
            )
        # No message repeats the address, which may hold a password.
        try:
            address = urlsplit(provider.url)
            is_url = address.scheme in ("http", "https") and bool(address.hostname)
        except ValueError:
            is_url = False
        if not is_url:
            raise ConfigError(
                f"The `url` of provider `{provider.name}` is no address.",
                hint="it begins with http:// or https://",
            )
        if "@" in address.netloc:
            raise ConfigError(
                f"The `url` of provider `{provider.name}` holds a user or a password.",
                hint="put the key into the environment and its name into `api_key_env`",
            )
