"""Triton, where it is installed, and a stand-in where it is not: references need no compiler.

Owns the import. `TRITON_INTERPRET=1` in the environment, before the first import, lets the kernels
run on a CPU, slowly, through Triton's interpreter: that is how their tests run without a GPU.
"""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton: Any
tl: Any
jit: Any

try:
    import triton as _triton
    import triton.language as _language
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        """The kernel stays what it is, and cannot be launched."""
        return function if function is not None else jit
else:
    triton, tl, jit = _triton, _language, _triton.jit
    if INTERPRETED:
        from penstock.kernels.interpreter import mend

        mend()
