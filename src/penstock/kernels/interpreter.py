"""Mends errors of Triton's interpreter, so that what it says of a kernel is true of the kernel.

Owns nothing but the replacements; compiled kernels never come here. As of Triton 3.6 and 3.9 the
interpreter

- cuts off instead of rounding to nearest even where it converts to a shorter format, and turns
  what is too large for 8 bits into NaN, where a GPU gives the largest number;
- multiplies the bit patterns of bfloat16 operands in `tl.dot`;
- takes an integer for the bit pattern of the bfloat16 that it is converted to;
- takes the bound of a loop that was computed from an array of one number, which numpy 2.4 refuses;
- has numpy warn where numbers overflow, in lanes that are masked too; a GPU says nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


def mend() -> None:
    """Put the replacements in place, once a process."""
    from triton.runtime import interpreter

    def convert(numbers: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        """What `_convert_float` does: the bits of `numbers` in another format."""
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if not nearest or source.name not in _DTYPES or target.name not in _DTYPES:
            return original(numbers, source, target, rounding)  # type: ignore[no-any-return]
        return _rounded(numbers, _DTYPES[source.name], _DTYPES[target.name])

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        """The product of operands whose arrays hold numbers, not bits."""
        a, b = (
            self.cast_impl(operand, interpreter.tl.float32)
            if operand.dtype.scalar.name == "bf16"
            else operand
            for operand in (a, b)
        )
        return dot(self, a, b, *others)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        """Conversions to bfloat16 go through float32."""
        if target.scalar.name == "bf16" and source.dtype.scalar.name != "fp32":
            source = cast(self, source, interpreter.tl.float32)
        return cast(self, source, target)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A launch."""
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """What `_patch_lang_tensor` does, with numbers out of arrays of one dimension."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor
    original, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    cast, launch = interpreter.InterpreterBuilder.cast_impl, interpreter.GridExecutor.__call__
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.GridExecutor.__call__ = call
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot


def _rounded(
    numbers: NDArray[Any], source: torch.dtype, target: torch.dtype
) -> NDArray[np.unsignedinteger[Any]]:
    """The bits of `numbers`, given as numbers or bits of `source`, in the format `target`."""
    bits = np.ascontiguousarray(numbers).view(f"i{source.itemsize}")
    values = torch.from_numpy(bits).view(source).float()
    if target.itemsize == 1:  # saturates, as `cvt.satfinite` does; NaN stays
        limit = torch.finfo(target).max
        values = values.clamp(-limit, limit)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[target.itemsize]
    found: NDArray[Any] = values.to(target).view(integer).numpy().reshape(numbers.shape)
    return found.view(f"u{target.itemsize}")
