"""A tripwire for whatever would wait for a GPU, on a machine that has none.

On a CPU nothing ever waits. What would is known by its operation, or by the Python method that
gives a tensor's numbers to the host; `gpu` tests ask CUDA itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The shape of what they give, or a number, has to be known on the host.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
READING = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")


class WouldWait(Exception):
    """Something that waits for a GPU was called."""


class _Tripwire(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask or (func is torch.ops.aten.repeat_interleave.Tensor):
            raise WouldWait(str(func))
        return func(*args, **kwargs or {})


@contextmanager
def no_wait() -> Iterator[None]:
    """Raise `WouldWait` where the block reads a tensor, or calls what waits for a GPU.

    `penstock.kernels.transfer` may look at the host memory that it has made.
    """

    def trap(name: str) -> Callable[..., Any]:
        inner = getattr(torch.Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_code.co_filename.endswith("kernels/transfer.py"):
                raise WouldWait(name)
            return inner(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, _Tripwire():
        for name in READING:
            patch.setattr(torch.Tensor, name, trap(name))
        yield
