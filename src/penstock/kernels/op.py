"""An operation that is there twice: as a Triton kernel, and as a reference in plain torch.

Owns the choice between the two. `PENSTOCK_KERNELS` in the environment is `triton` or `reference`;
without it, Triton computes where it can: on a GPU, or through its interpreter.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from penstock.errors import ConfigError
from penstock.kernels.jit import INTERPRETED, triton

P = ParamSpec("P")
R = TypeVar("R")

MODES = ("triton", "reference")
_forced: str | None = None


@functools.cache
def triton_problem() -> str | None:
    """Why no Triton kernel can run here; None if they can. Settled when first asked."""
    if triton is None:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None


def mode() -> str:
    """Who computes: one of `MODES`.

    Raises:
        ConfigError: `PENSTOCK_KERNELS` is neither, or asks for what cannot run.
    """
    return _forced or _resolved(os.environ.get("PENSTOCK_KERNELS", ""))


@functools.cache  # an eager step asks some hundreds of times
def _resolved(asked: str) -> str:
    """The mode that the environment means with `asked`."""
    problem = triton_problem()
    if asked not in {"", *MODES}:
        raise ConfigError(
            f"`PENSTOCK_KERNELS` is `{asked}`; it must be `triton` or `reference`.",
            hint="unset `PENSTOCK_KERNELS`, or set it to one of these",
        )
    if asked == "triton" and problem is not None:
        raise ConfigError(
            f"`PENSTOCK_KERNELS` is `triton`, and {problem}.",
            hint="unset `PENSTOCK_KERNELS`, or set it to `reference` to try it on the CPU, slowly",
        )
    return asked or ("triton" if problem is None else "reference")


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Have every operation computed by one of `MODES` within the block; for tests."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class Op(Generic[P, R]):
    """Call it as the operation; `launch` and `reference` are the two ways to compute it.

    Args:
        launch: runs the Triton kernel.
        reference: the same in plain torch, of the same signature; the oracle.
        samples: arguments to try both with, on a device: small, odd and ragged ones. Each is
            (label, positional arguments, keyword arguments, relative tolerance).
    """

    def __init__(
        self,
        launch: Callable[P, R],
        reference: Callable[P, R],
        samples: Callable[[torch.device], Iterator[Sample]],
    ) -> None:
        self.launch = launch
        self.reference = reference
        self.samples = samples
        self.__doc__ = launch.__doc__
        self.name = launch.__name__.lstrip("_")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if mode() == "triton":
            return self.launch(*args, **kwargs)
        return self.reference(*args, **kwargs)


Sample = tuple[str, tuple[Any, ...], dict[str, Any], float]


class Compilation(NamedTuple):
    """One way to compile a kernel that an engine will need; tests compile it without a GPU.

    Every parameter of the kernel is in one of the two dictionaries.
    """

    label: str
    kernel: Any  # what `jit` returned
    # "*bf16", "*fp32", "*i8", "*fp8e4nv", "i32", ...; with ":16" behind it, the address or the
    # number is a multiple of 16, which is what wide accesses need and most launches give.
    signature: dict[str, str]
    constexprs: dict[str, Any]  # also what is None, and integers that are 1
    num_warps: int = 4
    num_stages: int = 3
    lowest: int = 80  # compute capability below which it is not compiled; fp8 needs 89
    wgmma: bool = False  # on Hopper it must multiply with warp groups
