"""A tripwire for operations that would make the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",  # item, tolist, int(), bool()
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(AssertionError):
    """The operation waits on a GPU."""


class Tripwire(TorchDispatchMode):
    """Raises at what would wait on a GPU, although on a CPU nothing does."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name in INDEXING and any(map(is_mask, args[1]))):
            raise Waits(f"{func} waits for the device")
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            raise Waits(f"{func} waits for the device")
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


def is_mask(index: torch.Tensor | None) -> bool:
    """Whether indexing with it has to count first."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)
