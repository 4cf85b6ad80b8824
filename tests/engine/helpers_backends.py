"""Backends of a machine that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FakeBackends:
    """Implements `Backends`; by default a machine where all can compute, on no GPU."""

    native: str | None = None
    triton: str | None = None
    num_gpus: int = 0
    shows_gpu: bool = False
    fp8: str | None = None
    remedies: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What can be used is shown."""
        self.shows_gpu |= self.num_gpus > 0

    def problem(self, name: str) -> str | None:
        """What the machine is said to lack."""
        self.asked.append(name)
        problem: str | None = getattr(self, name)
        return problem

    def remedy(self, name: str) -> str | None:
        """What is said to help."""
        return self.remedies.get(name)

    def fp8_problem(self) -> str | None:
        """What its GPUs are said to lack."""
        return self.fp8
