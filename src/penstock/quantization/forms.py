"""What the codes of a quantized matrix mean, as far as memory and kernels must know it beforehand.

Owns `CodeForm`. Imports nothing, because names of formats are asked for where no numpy is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from penstock.quantization.codes import F32

Code = Literal["int4", "uint4", "fp4", "nf4", "int8", "uint8", "e4m3", "e5m2"]
UNIT_COLUMNS = 256  # that share a unit, where scales are codes themselves


class CodeForm(NamedTuple):
    """What the codes of a matrix mean, as far as memory and kernels must know it beforehand.

    Scales are float32 or float16 numbers; or, as in the K-quants of ggml, integers: the scale of a
    group is unit * integer then, with one float32 unit for each 256 columns of a row, and minima
    (if there are any) have units of their own.
    """

    code: Code
    group_size: int  # columns that share a scale: 16, or a multiple of 32; 0: the whole row
    scales: Literal["float32", "float16", "int8"] = "float32"
    has_minima: bool = False

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 4 if self.code in {"int4", "uint4", "fp4", "nf4"} else 8

    @property
    def numbers(self) -> F32:
        """What each code stands for, [16] or [256]."""
        from penstock.quantization.codes import book  # which is made of numpy

        return book(self.code)
