"""What a user may say about a comparison: how much is asked, and what is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.verdict import design
from penstock.measure.verdict.rule import AXES, Rule


def _option(default: Any, told: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": told, **more})


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """Options of the rule; see `rule.Rule`."""

    max_drop: float = _option(1.0, "Points of quality (of 100) that may be lost.")
    tolerance: float = _option(
        2.0, "Per cent by which speed, memory, energy and cost may be worse."
    )
    min_speedup: float | None = _option(None, "Overall `better` only from this speed-up on: 1.2.")
    guard: tuple[str, ...] = _option(
        ("quality", "speed"),
        "Axis that may not be worse; may be given several times.",
        choices=AXES,
    )
    alpha: float = _option(0.05, "How often any claim may be false, all axes and looks together.")
    success_at: float = _option(0.5, "Score from which on an answer is a success.")

    def rule(self, num_looks: int = 1) -> Rule:
        """The rule, checked.

        Raises:
            ConfigError: a value is out of range.
        """
        for name, low, high in (
            ("max_drop", 0, 100),
            ("tolerance", 0, 99),
            ("alpha", 1e-9, 0.5),
            ("min_speedup", 0, 1e9),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(
                    f"`--{name.replace('_', '-')}` is `{value}`; it must be from {low} to {high}."
                )
        return Rule(
            max_drop=self.max_drop,
            tolerance=self.tolerance,
            min_speedup=self.min_speedup,
            guard=tuple(dict.fromkeys(self.guard)),
            alpha=self.alpha,
            num_looks=num_looks,
            success_at=self.success_at,
        )


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Options of what is sent."""

    limit: int | None = _option(None, "Items of each task; default: all.")
    chunks: int = _option(8, "Parts of the items that are asked of both arms in turn.")
    blocks: int = _option(6, "Interleaved blocks (A B B A) under load; 0: no speed is compared.")
    max_blocks: int | None = _option(
        None, "Go on up to so many blocks while speed cannot be told; looks are paid for."
    )
    noise_blocks: int = _option(4, "Blocks of A against itself, for the noise floor.")
    requests: int = _option(16, "Requests in each leg of a block.")
    concurrency: int = _option(4, "Requests at the same time.")
    request_rate: float | None = _option(
        None, "Requests a second on a schedule (Poisson) instead of a fixed concurrency."
    )
    output_tokens: int = _option(64, "Tokens of each answer under load, exactly.")
    input_tokens: int | None = _option(
        None, "Load with made-up prompts of this length; default: the items' prompts."
    )
    warmup: int = _option(2, "Requests before each leg that are not measured.")
    idle_s: float = _option(3.0, "Seconds of rest whose energy is subtracted.")
    residency: str = _option(
        "auto",
        "Whether both arms stay loaded, or one is started when the other has ended.",
        choices=("auto", "both", "alternate"),
    )
    divergence_tokens: int = _option(
        16_384,
        "Tokens for the KL divergence of two precisions of one model on our engine; 0: none.",
    )
    seed: int = _option(0, "Of order, prompts and intervals.")

    def check(self) -> None:
        """Raise what cannot be.

        Raises:
            ConfigError: a value is out of range.
        """
        for name, low in (
            ("limit", 1),
            ("chunks", 2),
            ("blocks", 0),
            ("noise_blocks", 0),
            ("requests", 1),
            ("concurrency", 1),
            ("output_tokens", 1),
            ("input_tokens", 1),
            ("warmup", 0),
            ("idle_s", 0),
            ("divergence_tokens", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                flag = name.replace("_", "-")
                raise ConfigError(f"`--{flag}` is `{value}`; it must be at least {low}.")
        if self.blocks == 1:
            raise ConfigError("`--blocks` is `1`; one block has no spread: at least 2, or 0.")
        if self.noise_blocks == 1:
            raise ConfigError("`--noise-blocks` is `1`; it must be 0, or at least 2.")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ConfigError(f"`--request-rate` is `{self.request_rate}`; it must be above 0.")
        if self.max_blocks is not None and self.max_blocks < self.blocks:
            raise ConfigError(
                f"`--max-blocks` is `{self.max_blocks}`, less than `--blocks {self.blocks}`."
            )

    @property
    def looks(self) -> list[int]:
        """After how many blocks the data is looked at."""
        if not self.blocks:
            return [0]
        return design.looks(self.blocks, self.max_blocks or self.blocks)
