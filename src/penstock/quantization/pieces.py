"""The pieces of quantized modules: which tensors of a checkpoint belong together, as numpy arrays.

Knows how safetensors names types, and no format. Every format names its pieces by suffixes; one of
them, the `lead`, is there if and only if the module is coded.

Invariant: an array is made of a tensor only after its type, its shape and its number of bytes were
checked, and what is wrong is told with the tensor's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.quantization.codes import F32, U8, Found, StoredTensor

_ITEMS = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1",
    "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
Joined = Found
MAX_PARTS = 2**18  # into which tensors are split; the largest models have a tenth


class Pieces:
    """The tensors of one coded module. `name` is what stands before their suffixes."""

    def __init__(self, name: str, found: Mapping[str, StoredTensor]) -> None:
        self.name = name
        self._found = found

    @property
    def num_bytes(self) -> int:
        """Of all of them, in the file."""
        return sum(tensor.data.nbytes for tensor in self._found.values())

    def has(self, suffix: str) -> bool:
        """Whether there is such a piece."""
        return suffix in self._found

    def tensor(self, suffix: str) -> StoredTensor:
        """A piece.

        Raises:
            ModelLoadError: it is missing.
        """
        if suffix not in self._found:
            raise ModelLoadError(
                f"`{told(self.name + suffix)}` is missing; its weight cannot be read without.",
                hint="the download may be incomplete.",
            )
        return self._found[suffix]

    def array(
        self, suffix: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None
    ) -> NDArray[Any]:
        """A piece as an array: see `array_of`."""
        return array_of(self.tensor(suffix), dtypes, shape)

    def wrong(self, suffix: str, problem: str) -> ModelLoadError:
        """What to raise when a piece cannot be used."""
        return damaged(self.tensor(suffix), problem)


class Suffixes(NamedTuple):
    """How the tensors of a coded module are named, behind the module's name."""

    leads: tuple[str, ...]  # one of them is there if and only if the module is coded
    others: tuple[str, ...] = ()  # that only a coded module has
    shared: tuple[str, ...] = ()  # that other modules have as well
    dropped: tuple[str, ...] = ()  # that nothing here needs, of any module


def join_pieces(
    tensors: Sequence[StoredTensor], suffixes: Suffixes, made: Callable[[Pieces], Sequence[Joined]]
) -> list[Joined]:
    """The tensors, where those of each coded module are replaced by what `made` makes of them.

    What it makes stands where the module's lead stood.

    Raises:
        ModelLoadError: two tensors of a module have the same name, a piece has no lead, or `made`
            refuses a module.
    """
    coded = _coded_modules(tensors, suffixes)
    found: dict[str, dict[str, StoredTensor]] = {name: {} for name in coded}
    parts: list[StoredTensor | str] = []  # a tensor, or the name of a module
    for tensor in tensors:
        suffix = _suffix(tensor.name, suffixes.leads + suffixes.others + suffixes.shared)
        name = tensor.name.removesuffix(suffix or "")
        if suffix is not None and name in coded:
            if suffix in found[name]:
                raise damaged(tensor, "is there twice")
            found[name][suffix] = tensor
            if suffix in suffixes.leads:
                parts.append(name)
        elif suffix is not None and suffix not in suffixes.shared:
            leads = "` or `".join(suffixes.leads)
            raise damaged(tensor, f"belongs to a quantized module, whose `{leads}` is missing")
        elif _suffix(tensor.name, suffixes.dropped) is None:
            parts.append(tensor)
    joined: list[Joined] = []
    for part in parts:
        joined += made(Pieces(part, found[part])) if isinstance(part, str) else [part]
        check_parts(len(joined))
    return joined


def check_parts(num_parts: int) -> None:
    """Refuse tensors that are split into so many parts that these alone fill the memory.

    Raises:
        ModelLoadError: there are more than `MAX_PARTS`.
    """
    if num_parts > MAX_PARTS:
        raise ModelLoadError(
            f"The tensors of the checkpoint have more than `{MAX_PARTS}` parts.",
            hint="no model has so many experts; the file is damaged.",
        )


def _coded_modules(tensors: Sequence[StoredTensor], suffixes: Suffixes) -> set[str]:
    coded: set[str] = set()
    for tensor in tensors:
        suffix = _suffix(tensor.name, suffixes.leads)
        if suffix is not None:
            name = tensor.name.removesuffix(suffix)
            if name in coded:
                leads = "` and `".join(suffixes.leads)
                raise damaged(tensor, f"is there twice, or its module has both `{leads}`")
            coded.add(name)
    return coded


def array_of(
    tensor: StoredTensor, dtypes: Sequence[str], shape: Sequence[int | None] | None = None
) -> NDArray[Any]:
    """A tensor as an array that is mapped, not copied. BF16 and floats of 8 bits are integers.

    Args:
        shape: what it must be; None where any size will do.

    Raises:
        ModelLoadError: its type, shape or number of bytes is not what it must be.
    """
    if tensor.dtype not in dtypes:
        raise damaged(tensor, f"is of type {told(tensor.dtype)}, not {' or '.join(dtypes)}")
    if shape is not None and not (
        len(shape) == len(tensor.shape)
        and all(wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise damaged(tensor, f"has shape {list(tensor.shape)}, not [{wanted}]")
    if 0 in tensor.shape:
        raise damaged(tensor, "is empty")
    item = np.dtype(_ITEMS[tensor.dtype])
    if tensor.data.nbytes != math.prod(tensor.shape) * item.itemsize:
        raise damaged(tensor, f"has `{tensor.data.nbytes}` bytes, which is not its shape's size")
    return tensor.data.view(item).reshape(tensor.shape)


def floats_of(numbers: NDArray[Any]) -> F32:
    """An array of FLOATS as float32, which holds each of them exactly."""
    if numbers.dtype == np.dtype("<u2"):  # bfloat16: the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def powers_of(codes: U8, name: str) -> F32:
    """What scales of e8m0 mean, 2 ** (code - 127): OCP Microscaling Formats (2023), 5.4.1.

    Raises:
        ModelLoadError: one of them is 255, which means no number; `name` is the tensor's.
    """
    if codes.size and codes.max() == 255:
        raise ModelLoadError(f"`{told(name)}` has scales that are no numbers (255).")
    return _powers_of_two()[codes]


@cache
def _powers_of_two() -> F32:
    """Of all codes but the last. The first is a denormal float32, and exact."""
    return np.ldexp(1.0, np.arange(255) - 127).astype(np.float32)


class BlockScales:
    """Scales that some rows share: [ceil(N / rows_each), G], or one for the whole matrix.

    Args:
        shape: of the scales, 2-D; a matrix or rows with one scale each may also leave out sizes
            of 1.
    """

    def __init__(self, pieces: Pieces, suffix: str, shape: tuple[int, int], rows_each: int) -> None:
        tensor = pieces.tensor(suffix)
        wanted = [size for size in shape if size != 1]
        if [size for size in tensor.shape if size != 1] != wanted:
            raise damaged(tensor, f"has shape {list(tensor.shape)}, not {list(shape)}")
        self._name = tensor.name
        self._is_power = tensor.dtype == "F8_E8M0"
        self._scales = array_of(tensor, (*FLOATS, "F8_E8M0")).reshape(shape)
        self._rows_each = rows_each

    def rows(self, first: int, last: int) -> F32:
        """Of the rows [first, last), [n, G]."""
        start = first // self._rows_each
        some = self._scales[start : -(-last // self._rows_each)]
        numbers = powers_of(some, self._name) if self._is_power else floats_of(some)
        return numbers[np.arange(first, last) // self._rows_each - start]


def nibbles(packed: U8, num_columns: int) -> U8:
    """4-bit codes, the low half of a byte first: [n, ceil(K / 2)] to [n, K]."""
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes[:, :num_columns]


def minima_of(scales: F32, zeros: NDArray[Any]) -> F32:
    """What codes with a zero point add: value = scale * code - scale * zero."""
    return -scales * zeros.astype(np.float32)


def damaged(tensor: StoredTensor, problem: str) -> ModelLoadError:
    """What to raise when a tensor cannot be used."""
    return ModelLoadError(
        f"`{told(tensor.name)}` {problem}.",
        hint="the weights do not fit the model's config, or the file is damaged.",
    )


def told(text: str) -> str:
    """A stranger's text as an error message can print it."""
    return ascii(text)[1:-1][:120]


def _suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    """The longest of the suffixes that a name has, with something before it."""
    if not suffixes or not name.endswith(suffixes):
        return None
    return max((suffix for suffix in suffixes if name.endswith(suffix)), key=len)
