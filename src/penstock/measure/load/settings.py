"""What a user may say about a load, and which of it goes together: the options of `penstock bench`.

Owns names, defaults and checks; builds nothing. A combination that would ignore an option is an
error.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.load import slo as limits_of
from penstock.measure.load.arrivals import parse_rates
from penstock.measure.load.prompts import PUBLISHED
from penstock.measure.load.traces import KINDS
from penstock.measure.load.words import Lengths

DEFAULT_DURATION_S = 30.0
DEFAULT_INPUT, DEFAULT_OUTPUT = "512", "128"


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """One load; see `penstock.cli.options.options_of`."""

    request_rate: float | None = _option(
        None, "Open loop: requests a second, whatever the server does; `inf`: all at once."
    )
    burstiness: float | None = _option(
        None, "Shape of the gamma distributed times between requests; 1, Poisson, unless given."
    )
    rate_schedule: str | None = _option(
        None, "Open loop: rates over time, as SECONDS@RATE or SECONDS@FROM-TO: `30@2,10@2-8,60@8`."
    )
    trace: str | None = _option(
        None, "Open loop: arrivals of a file (Azure CSV, Mooncake JSONL, penstock's log)."
    )
    trace_kind: str = _option("auto", "Form of the trace.", choices=KINDS)
    time_scale: float = _option(1.0, "Of the trace's times; 0.5 is twice the load.")
    concurrency: int | None = _option(
        None, "Closed loop: clients that ask again when they are answered. Default load: 1."
    )
    max_concurrency: int | None = _option(
        None, "Open loop: more requests than this wait in the client; the wait is counted."
    )
    num_prompts: int | None = _option(None, "Number of requests, ramp included.")
    duration: float | None = _option(
        None, "Seconds of the steady window. Default: 30, or the whole of a trace or of a schedule."
    )
    ramp: float | None = _option(
        None, "Seconds in which the load grows, not measured. Default: a tenth of the duration."
    )
    cooldown: float = _option(0.0, "Seconds of load behind the steady window, not measured.")
    drain: float = _option(60.0, "Seconds that answers have to come when the load has ended.")
    num_warmups: int = _option(4, "Requests before the load, with prompts of their own.")
    prompts: str | None = _option(
        None, f"JSONL file (prompt or messages a line), or a set: {', '.join(PUBLISHED)}."
    )
    random_input_len: str | None = _option(
        None, "Tokens of made-up prompts: `512`, `256-1024`, `normal:512:64`. Default: 512."
    )
    random_output_len: str | None = _option(None, "Tokens of their answers. Default: 128.")
    random_prefix_len: int = _option(0, "Tokens before each prompt that all have in common.")
    prefix_share: float = _option(0.0, "Share of each prompt that all have in common, 0 to 1.")
    tokenizer: str | None = _option(
        None, "tokenizer.json that counts prompts; default: the server's /tokenize, if it has one."
    )
    max_tokens: int | None = _option(None, "Of answers to prompts that name none.")
    temperature: float | None = _option(None, "Of all answers; default: 0, or what a line says.")
    ignore_eos: bool | None = _option(
        None,
        "Answers of exactly the length asked for. Default: yes for made-up prompts, else no.",
    )
    seed: int = _option(0, "Of arrivals and prompts. The same prompts again hit a prefix cache.")
    slo: str | None = _option(
        None, "Limits, such as `ttft_p95=0.5s,tpot_p95=50ms,error_rate=1%,e2e=20s`."
    )
    goodput: str | None = _option(
        None, "Limits of each request that is good: `ttft=500ms,tpot=50ms`."
    )

    @property
    def is_open(self) -> bool:
        return any((self.request_rate, self.rate_schedule, self.trace))

    @property
    def clients(self) -> int:
        """Of a closed loop."""
        return self.concurrency or 1

    @property
    def is_synthetic(self) -> bool:
        return self.prompts is None and self.trace is None

    @property
    def steady_s(self) -> float | None:
        """Length of the steady window; None: until the load ends by itself."""
        if self.duration is not None:
            return self.duration
        endless = self.num_prompts is None and not self.trace and not self.rate_schedule
        return DEFAULT_DURATION_S if endless else None

    @property
    def ramp_s(self) -> float:
        if self.ramp is not None:
            return self.ramp
        grows = self.steady_s is not None and not self.trace and not self.rate_schedule
        return min(5.0, self.steady_s / 10) if grows and self.steady_s is not None else 0.0

    @property
    def limits(self) -> list[limits_of.Limit]:
        return [
            *limits_of.parse(self.slo or ""),
            *limits_of.per_request(limits_of.parse(self.goodput or "")),
        ]

    @property
    def input_tokens(self) -> Lengths:
        return Lengths.parse(self.random_input_len or DEFAULT_INPUT, "--random-input-len")

    @property
    def output_tokens(self) -> Lengths:
        return Lengths.parse(self.random_output_len or DEFAULT_OUTPUT, "--random-output-len")

    def as_facts(self) -> dict[str, Any]:
        """For the header of a run: what was said, and what follows from it."""
        said = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        return {
            "load": {
                name: str(value) if value == math.inf else value for name, value in said.items()
            },
            "prompts": self.prompts or (self.trace and "lengths of the trace") or "synthetic",
            "prefix": "shared" if self.prefix_share or self.random_prefix_len else "cold",
        }


def check(settings: LoadSettings, *, sweeps_rates: bool = False) -> None:
    """Refuse what cannot be done, or not together.

    Args:
        sweeps_rates: whether rates will be tried that the settings do not name.

    Raises:
        ConfigError: one sentence, with the names of the options.
    """
    _exclude(settings, "request_rate", "rate_schedule", "trace", "concurrency")
    _exclude(settings, "random_prefix_len", "prefix_share")
    has_rates = sweeps_rates or settings.request_rate or settings.rate_schedule
    is_open = sweeps_rates or settings.is_open
    _need(settings, "burstiness", has_rates, "--request-rate")
    _need(settings, "max_concurrency", is_open, "an open loop, such as --request-rate")
    _need(settings, "trace_kind", settings.trace, "--trace")
    _need(settings, "time_scale", settings.trace, "--trace")
    for name in ("random_input_len", "random_output_len", "random_prefix_len", "prefix_share"):
        _need(settings, name, settings.is_synthetic, "made-up prompts: no --prompts, no --trace")
    _need(settings, "max_tokens", settings.prompts, "--prompts")
    made_up = settings.prompts is None
    _need(settings, "tokenizer", made_up, "made-up prompts: no --prompts")
    if settings.cooldown and (not is_open or settings.duration is None):
        raise ConfigError("`--cooldown` goes with an open loop and `--duration`.")
    if (settings.trace or settings.rate_schedule) and settings.ramp and settings.duration is None:
        raise ConfigError(
            "`--ramp` with a trace or a schedule leaves out its begin, and needs `--duration`."
        )
    if settings.request_rate == math.inf and settings.num_prompts is None:
        raise ConfigError("`--request-rate inf` sends all at once and needs `--num-prompts`.")
    if settings.prefix_share > 1:
        raise ConfigError(f"`--prefix-share {settings.prefix_share:g}` is more than 1.")
    _positive(settings)
    limits_of.parse(settings.slo or "")
    Lengths.parse(settings.random_input_len or DEFAULT_INPUT, "--random-input-len")
    Lengths.parse(settings.random_output_len or DEFAULT_OUTPUT, "--random-output-len")
    if settings.rate_schedule:
        parse_rates(settings.rate_schedule)
    bad = limits_of.over_many(limits_of.parse(settings.goodput or ""))
    if bad:
        raise ConfigError(
            f"`--goodput` has `{bad[0]}`, which is no limit of one request.",
            hint="name it without a quantile: `ttft=500ms`; quantiles go to --slo",
        )


def _default(name: str) -> Any:
    return LoadSettings.__dataclass_fields__[name].default


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _exclude(settings: LoadSettings, *names: str) -> None:
    given = [_flag(name) for name in names if getattr(settings, name) != _default(name)]
    if len(given) > 1:
        raise ConfigError(f"`{given[0]}` and `{given[1]}` exclude one another.")


def _need(settings: LoadSettings, name: str, there: object, what: str) -> None:
    if getattr(settings, name) != _default(name) and not there:
        raise ConfigError(f"`{_flag(name)}` goes with {what}.")


def _positive(settings: LoadSettings) -> None:
    above = ["request_rate", "burstiness", "time_scale", "concurrency", "max_concurrency"]
    above += ["num_prompts", "duration", "max_tokens"]
    for name in (*above, "ramp", "cooldown", "drain", "num_warmups", "prefix_share", "temperature"):
        value = getattr(settings, name)
        if value is None:
            continue
        if math.isnan(value) or value < 0 or (name in above and value == 0):
            least = "more than 0" if name in above else "0 or more"
            raise ConfigError(f"`{_flag(name)} {value:g}` is not {least}.")
        if math.isinf(value) and name not in ("request_rate", "burstiness"):
            raise ConfigError(f"`{_flag(name)} inf` would never end.")
