"""Checkpoints of random numbers in the formats that models are published in.

Owns how each format lies in files, written down once more from its own tools' layout: nothing of
the readers is used. A format draws a matrix as codes with scales, not by quantizing: speed and
memory do not depend on the values, and `Drawn.values` says what they stand for.
Invariant: a checkpoint that exists is whole, and the same for the same shape, format and spread.

The layouts of GGUF are in `benchmarks.stored_gguf`.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.shapes import WEIGHT_STD, Shape

F32 = NDArray[np.float32]
Array = NDArray[Any]
_AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight rows, by nibble
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_KINDS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


class Tensor(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str  # as safetensors names it
    numbers: Array  # of that type; of BF16 the bits, of F8_E4M3 the codes


class Drawn(NamedTuple):
    """A matrix: its tensors, named by their suffixes, and its numbers, [N, K]."""

    tensors: list[Tensor]
    values: Callable[[], F32]


Draw = Callable[[np.random.Generator, int, int, float], Drawn]  # rows, columns, spread


class Format(NamedTuple):
    """How the maps of the blocks are stored. Embedding, head and norms stay bfloat16."""

    config: dict[str, Any]  # quantization_config
    draw: Draw


def write(
    shape: Shape, form: Format, target: Path, spread: float = WEIGHT_STD, plain: Path | None = None
) -> Path:
    """A directory with such a checkpoint, written if it is not there.

    Args:
        spread: standard deviation of the weights.
        plain: takes the same numbers as an unquantized checkpoint in float32.
    """
    if target.exists():
        return target
    config = shape.config()
    twin = None if plain is None else plain_file(plain, config)
    unfinished = target.with_name(f"{target.name}.unfinished")
    file = Growing(unfinished, config | {"quantization_config": form.config})
    for name, dimensions in shape.tensors():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(dimensions) == 1 or "embed" in name:
            drawn = _plain(rng, dimensions, spread)
        else:
            drawn = form.draw(rng, dimensions[0], dimensions[1], spread)
        stem = name.removesuffix(".weight")
        for tensor in drawn.tensors:
            file.add(tensor._replace(name=stem + tensor.name))
        if twin is not None:
            twin.add(Tensor(name, "F32", drawn.values()))
    for one in (file, twin):
        if one is not None:
            one.close()
    return unfinished.rename(target)


def plain_file(directory: Path, config: dict[str, Any]) -> Growing:
    """An unquantized checkpoint in float32, to which tensors are added."""
    return Growing(directory, config | {"torch_dtype": "float32"})


class Growing:
    """A checkpoint's directory that grows by tensors: 8 bytes of length, JSON header, numbers."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        generation = {"bos_token_id": 1, "eos_token_id": 2}
        (directory / "generation_config.json").write_text(json.dumps(generation))
        self._path = directory / "model.safetensors"
        self._numbers = self._path.with_suffix(".numbers")
        self._file = self._numbers.open("wb")
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}

    def add(self, tensor: Tensor) -> None:
        """Write one more."""
        start = self._file.tell()
        numbers = np.ascontiguousarray(tensor.numbers, _KINDS.get(tensor.dtype))
        self._file.write(numbers.data)
        self._header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": numbers.shape,
            "data_offsets": [start, self._file.tell()],
        }

    def close(self) -> None:
        """Make it whole."""
        self._file.close()
        text = json.dumps(self._header).encode()
        text += b" " * (-len(text) % 8)
        with self._path.open("wb") as whole, self._numbers.open("rb") as numbers:
            whole.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(numbers, whole, 1 << 24)
        self._numbers.unlink()


def bfloat16(numbers: F32) -> NDArray[np.uint16]:
    """The bits of numbers that bfloat16 holds, cut from those of float32."""
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def in_bfloat16(numbers: F32) -> F32:
    """The numbers, cut to what bfloat16 holds."""
    return (numbers.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _plain(rng: np.random.Generator, dimensions: tuple[int, ...], spread: float) -> Drawn:
    if len(dimensions) == 1:
        numbers = np.ones(dimensions, np.float32)
    else:
        numbers = in_bfloat16(rng.standard_normal(dimensions, np.float32) * np.float32(spread))
    return Drawn([Tensor(".weight", "BF16", bfloat16(numbers))], lambda: numbers)


def _codes(rng: np.random.Generator, num_rows: int, num_columns: int, bits: int) -> Array:
    """Integers of so many bits, each as likely, [N, K]."""
    codes = np.frombuffer(rng.bytes(num_rows * num_columns), np.uint8) >> np.uint8(8 - bits)
    return codes.reshape(num_rows, num_columns)


def _scales(rng: np.random.Generator, shape: tuple[int, int], spread: float) -> F32:
    """Of codes whose standard deviation times a scale is about `spread`; exact in 8 bits."""
    scales = in_bfloat16(rng.uniform(0.5, 1.5, shape).astype(np.float32))
    scales *= np.float32(np.exp2(np.round(np.log2(spread))))
    return scales


def _spread_of(bits: int) -> float:
    """The standard deviation of integers of so many bits, each as likely."""
    return float(2**bits / np.sqrt(12))


def _words(codes: Array, bits: int) -> NDArray[np.int32]:
    """Codes [n, m] packed along the last axis into int32, the first lowest; zeros fill up."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(padded).view("<i4")


def _repeated(numbers: Array, group_size: int, num_columns: int) -> Any:
    return np.repeat(numbers, group_size, 1)[:, :num_columns]


def _zeros(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, *, is_symmetric: bool
) -> Array:
    """Zero points about the middle."""
    middle = 2 ** (bits - 1)
    reach = 0 if is_symmetric else middle // 4
    return rng.integers(middle - reach, middle + reach + 1, shape).astype(np.uint8)


def _values(codes: Array, zeros: Array, scales: F32, group_size: int) -> F32:
    """scale * (code - zero)."""
    num_columns = codes.shape[1]
    numbers = codes.astype(np.float32) - _repeated(zeros, group_size, num_columns)
    made: F32 = numbers * _repeated(scales, group_size, num_columns)
    return made


def gptq(bits: int, group_size: int, *, is_symmetric: bool) -> Format:
    """As AutoGPTQ packs: along the columns, transposed; zero points less one."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        size = group_size if group_size > 0 else columns
        codes = _codes(rng, rows, columns, bits)
        shape = (rows, -(-columns // size))
        scales = _scales(rng, shape, spread / _spread_of(bits))
        zeros = _zeros(rng, shape, bits, is_symmetric=is_symmetric)
        tensors = [
            Tensor(".qweight", "I32", _words(codes, bits).T),
            Tensor(".qzeros", "I32", _words(zeros.T - np.uint8(1), bits)),
            Tensor(".scales", "F16", scales.T),
            Tensor(".g_idx", "I32", np.arange(columns) // size),
        ]
        return Drawn(tensors, lambda: _values(codes, zeros, scales, size))

    config = {"bits": bits, "group_size": group_size, "sym": is_symmetric, "desc_act": False}
    return Format({"quant_method": "gptq", **config}, draw)


def awq(group_size: int) -> Format:
    """As AutoAWQ's "gemm" packs: along the rows, in an order of its own."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes = _codes(rng, rows, columns, 4)
        shape = (rows, -(-columns // group_size))
        scales = _scales(rng, shape, spread / _spread_of(4))
        zeros = _zeros(rng, shape, 4, is_symmetric=False)
        tensors = [
            Tensor(".qweight", "I32", _awq_words(codes)),
            Tensor(".qzeros", "I32", _awq_words(zeros)),
            Tensor(".scales", "F16", scales.T),
        ]
        return Drawn(tensors, lambda: _values(codes, zeros, scales, group_size))

    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    return Format(config | {"group_size": group_size}, draw)


def _awq_words(codes: Array) -> Array:
    eights = codes.T.reshape(codes.shape[1], -1, 8)[:, :, _AWQ_ROWS]
    return _words(eights.reshape(codes.shape[1], -1), 4)


def _compressed(weights: dict[str, Any], stored_as: str, inputs: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(bits: int, group_size: int, *, is_symmetric: bool) -> Format:
    """pack-quantized of compressed-tensors: W4A16 and W8A16."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        size = group_size or columns
        codes = _codes(rng, rows, columns, bits)
        shape = (rows, -(-columns // size))
        scales = in_bfloat16(_scales(rng, shape, spread / _spread_of(bits)))
        zeros = _zeros(rng, shape, bits, is_symmetric=is_symmetric)
        tensors = [
            Tensor(".weight_packed", "I32", _words(codes, bits)),
            Tensor(".weight_scale", "BF16", bfloat16(scales)),
            Tensor(".weight_shape", "I64", np.array([rows, columns])),
        ]
        if not is_symmetric:
            tensors.append(Tensor(".weight_zero_point", "I32", _words(zeros.T, bits).T))
        return Drawn(tensors, lambda: _values(codes, zeros, scales, size))

    strategy = {"strategy": "group", "group_size": group_size} if group_size else {}
    weights = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": is_symmetric}
    return Format(_compressed(weights | strategy, "pack-quantized", None), draw)


def w8a8() -> Format:
    """int-quantized of compressed-tensors, activations in 8 bits by token."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes = np.maximum(_codes(rng, rows, columns, 8).view(np.int8), np.int8(-127))
        scales = in_bfloat16(_scales(rng, (rows, 1), spread / _spread_of(8)))
        tensors = [
            Tensor(".weight", "I8", codes),
            Tensor(".weight_scale", "BF16", bfloat16(scales)),
        ]
        return Drawn(tensors, lambda: codes * scales)

    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    inputs = whole | {"strategy": "token", "dynamic": True}
    return Format(_compressed(whole | {"strategy": "channel"}, "int-quantized", inputs), draw)


def _floats(rng: np.random.Generator, rows: int, columns: int) -> tuple[Array, F32]:
    """Codes of float8_e4m3fn up to 1.875 [N, K], and what each of the 256 codes is."""
    bits = np.frombuffer(rng.bytes(rows * columns), np.uint8).reshape(rows, columns)
    sign, least = bits & np.uint8(0x80), bits & np.uint8(0x3F)
    book = np.full(256, np.nan, np.float32)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        number = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        book[code] = -number if code & 0x80 else number
    return sign | least, book


_FLOAT_SPREAD = 0.55  # of these codes' numbers


def fp8(block: int) -> Format:
    """As DeepSeek-V3 has it: float8_e4m3fn, a scale for each square block."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes, book = _floats(rng, rows, columns)
        shape = (-(-rows // block), -(-columns // block))
        scales = _scales(rng, shape, spread / _FLOAT_SPREAD)
        tensors = [
            Tensor(".weight", "F8_E4M3", codes),
            Tensor(".weight_scale_inv", "F32", scales),
        ]
        each = np.repeat(scales, block, 0)[:rows]
        return Drawn(tensors, lambda: book[codes] * _repeated(each, block, columns))

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return Format(config | {"weight_block_size": [block, block]}, draw)


def floats(strategy: str, block: int = 128) -> Format:
    """float-quantized of compressed-tensors: a scale for each "tensor", "channel" or "block"."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes, book = _floats(rng, rows, columns)
        height, width = {"tensor": (rows, columns), "channel": (1, columns)}.get(
            strategy, (block, block)
        )
        shape = (-(-rows // height), -(-columns // width))
        scales = in_bfloat16(_scales(rng, shape, spread / _FLOAT_SPREAD))
        stored = bfloat16(scales).reshape(1) if strategy == "tensor" else bfloat16(scales)
        tensors = [
            Tensor(".weight", "F8_E4M3", codes),
            Tensor(".weight_scale", "BF16", stored),
        ]
        each = np.repeat(scales, height, 0)[:rows]
        return Drawn(tensors, lambda: book[codes] * _repeated(each, width, columns))

    blocks = {"block_structure": [block, block]} if strategy == "block" else {}
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    return Format(_compressed(weights | blocks, "float-quantized", None), draw)


def nf4() -> Format:
    """bitsandbytes, double quantized: scales of 64 numbers are codes with scales of 256 of them."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes = _codes(rng, rows, columns, 4)
        num_blocks = codes.size // 64
        inner = np.frombuffer(rng.bytes(num_blocks), np.uint8)
        outer = _scales(rng, (1, -(-num_blocks // 256)), spread)[0]
        numbers, book = np.linspace(-1, 1, 256, dtype=np.float32), np.array(_NF4, np.float32)
        offset = np.float32(2 * spread)
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns],
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset),
        }  # fmt: skip
        flat = codes.reshape(-1)
        tensors = [
            Tensor(".weight", "U8", (flat[0::2] << np.uint8(4) | flat[1::2]).reshape(-1, 1)),
            Tensor(".weight.absmax", "U8", inner),
            Tensor(".weight.quant_map", "F32", book),
            Tensor(".weight.nested_absmax", "F32", outer),
            Tensor(".weight.nested_quant_map", "F32", numbers),
            Tensor(
                ".weight.quant_state.bitsandbytes__nf4",
                "U8",
                np.frombuffer(json.dumps(state).encode(), np.uint8),
            ),
        ]
        absmax = numbers[inner] * np.repeat(outer, 256)[:num_blocks] + offset
        return Drawn(tensors, lambda: book[codes] * np.repeat(absmax, 64).reshape(codes.shape))

    return Format({"quant_method": "bitsandbytes", **_BITS, "bnb_4bit_quant_type": "nf4"}, draw)


_BITS = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_use_double_quant": True}


def rows_of_int8() -> Format:
    """bitsandbytes' LLM.int8(): the largest magnitude of each row."""

    def draw(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Drawn:
        codes = np.maximum(_codes(rng, rows, columns, 8).view(np.int8), np.int8(-127))
        largest = _scales(rng, (rows, 1), spread * 127 / _spread_of(8))
        tensors = [Tensor(".weight", "I8", codes), Tensor(".SCB", "F32", largest[:, 0])]
        return Drawn(tensors, lambda: codes * (largest / np.float32(127)))

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return Format(config, draw)


def all_formats() -> Iterator[tuple[str, Format]]:
    """By the names that people have for them."""
    for bits in (4, 8):
        for is_symmetric in (True, False):
            kind = "sym" if is_symmetric else "asym"
            for group_size in (32, 128, -1):
                size = group_size if group_size > 0 else "row"
                yield (
                    f"GPTQ {bits} bits {kind} {size}",
                    gptq(bits, group_size, is_symmetric=is_symmetric),
                )
            size = 128 if bits == 4 else 0
            yield f"W{bits}A16 {kind}", packed(bits, size, is_symmetric=is_symmetric)
    yield "AWQ", awq(128)
    yield "W8A8", w8a8()
    for strategy in ("tensor", "channel", "block"):
        yield f"fp8 {strategy}", floats(strategy)
    yield "fp8 DeepSeek", fp8(128)
    yield "nf4", nf4()
    yield "bitsandbytes int8", rows_of_int8()
