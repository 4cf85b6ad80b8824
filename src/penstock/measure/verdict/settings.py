"""What a user may say about a comparison: how much is asked, and what is decided."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.verdict import design
from penstock.measure.verdict.rule import AXES, MEMORY_SPREAD, Rule
from penstock.measure.verdict.statistics import FEWEST_BLOCKS

CONCURRENCY = 4


def _option(default: Any, told: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": told, **more})


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """Options of the rule; see `rule.Rule`."""

    max_drop: float = _option(1.0, "Points of quality (of 100) that may be lost.")
    tolerance: float = _option(
        2.0,
        "Per cent by which speed, energy and cost may be worse; memory, of one start each, by at "
        f"least {MEMORY_SPREAD:g}.",
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
            ("success_at", 0, 1),
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
    blocks: int = _option(
        6,
        "Interleaved blocks (A B B A) under load; 0: no speed is compared. Fewer than "
        f"{FEWEST_BLOCKS} cannot tell anything.",
    )
    max_blocks: int | None = _option(
        None, "Go on up to so many blocks while speed cannot be told; looks are paid for."
    )
    noise_blocks: int = _option(
        4, f"Blocks of A against itself, for the noise floor: 0, or at least {FEWEST_BLOCKS}."
    )
    requests: int = _option(16, "Requests in each leg of a block.")
    concurrency: int | None = _option(
        None, f"Closed loop, and items: requests at the same time. Default: {CONCURRENCY}."
    )
    request_rate: float | None = _option(
        None, "Open loop: requests a second on a schedule (Poisson) instead of --concurrency."
    )
    random_output_len: int = _option(64, "Tokens of each answer under load, exactly.")
    random_input_len: int | None = _option(
        None, "Load with made-up prompts of this length; default: the items' prompts."
    )
    num_warmups: int = _option(2, "Requests before each leg that are not measured.")
    idle: float = _option(3.0, "Seconds of rest whose energy is subtracted.")
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
            ("random_output_len", 1),
            ("random_input_len", 1),
            ("num_warmups", 0),
            ("idle", 0),
            ("divergence_tokens", 0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                flag = name.replace("_", "-")
                raise ConfigError(f"`--{flag}` is `{value}`; it must be at least {low}.")
        if self.blocks == 1:
            raise ConfigError("`--blocks` is `1`; one block has no spread: at least 2, or 0.")
        if self.max_blocks is not None and not self.blocks:
            raise ConfigError(f"`--max-blocks` is `{self.max_blocks}`, and `--blocks` is `0`.")
        if 0 < self.noise_blocks < FEWEST_BLOCKS:
            raise ConfigError(
                f"`--noise-blocks` is `{self.noise_blocks}`; it must be 0, or at least "
                f"{FEWEST_BLOCKS}: fewer show no noise floor."
            )
        if self.request_rate is not None and not 0 < self.request_rate < math.inf:
            raise ConfigError(f"`--request-rate` is `{self.request_rate}`; it must be above 0.")
        if self.request_rate is not None and self.concurrency is not None:
            raise ConfigError("`--request-rate` and `--concurrency` exclude one another.")
        if self.max_blocks is not None and self.max_blocks < self.blocks:
            raise ConfigError(
                f"`--max-blocks` is `{self.max_blocks}`, less than `--blocks {self.blocks}`."
            )

    @property
    def clients(self) -> int:
        """Requests at the same time, but those of an open loop."""
        return self.concurrency or CONCURRENCY

    def as_facts(self) -> dict[str, Any]:
        """For the header: what was said, and what follows from it."""
        return asdict(self) | {"concurrency": self.clients}

    @property
    def looks(self) -> list[int]:
        """After how many blocks the data is looked at."""
        if not self.blocks:
            return [0]
        return design.looks(self.blocks, self.max_blocks or self.blocks)
