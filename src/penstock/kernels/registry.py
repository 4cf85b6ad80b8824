"""Every operation of this package by name: what the tests of all kernels enumerate.

Owns the table. Imports the operations only when they are asked for. A module in the table has its
`Op` and a function `compilations()`, which yields what its kernels are compiled for in earnest.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from penstock.kernels.op import Compilation, Op

# "module:name", the module being one of `penstock.kernels`, the name that of an `Op` in it.
OPS = (
    "add_rms_norm:add_rms_norm",
    "fp8_matmul:fp8_matmul",
    "gated:gated",
    "int_matmul:int_matmul",
    "paged_decode:paged_decode",
    "paged_prefill:paged_prefill",
    "quantize_fp8:quantize_fp8",
    "rope_store:rope_store",
    "sample:sample",
    "step_inputs:step_inputs",
)


def load() -> list[Op[Any, Any]]:
    """All operations."""
    found = []
    for path in OPS:
        module, _, name = path.partition(":")
        found.append(getattr(importlib.import_module(f"{__package__}.{module}"), name))
    return found


def compilations() -> Iterator[Compilation]:
    """What all kernels are compiled for."""
    for module in dict.fromkeys(path.partition(":")[0] for path in OPS):
        yield from importlib.import_module(f"{__package__}.{module}").compilations()
