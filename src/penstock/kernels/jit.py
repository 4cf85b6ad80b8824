"""Triton, where it is installed, and a stand-in where it is not: references need no compiler.

Owns the import. `TRITON_INTERPRET=1` in the environment, before the first import, lets the kernels
run on a CPU, slowly, through Triton's interpreter: that is how their tests run without a GPU. What
else means yes there, Triton says: `INTERPRETED` is what it has made of it.
"""

from __future__ import annotations

from typing import Any

INTERPRETED = False
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

    def _probe() -> None:
        """A kernel, to see what becomes of one."""

    INTERPRETED = not isinstance(jit(_probe), triton.JITFunction)
    if INTERPRETED:
        from penstock.kernels.interpreter import mend

        mend()
