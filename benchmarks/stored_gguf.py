"""GGUF files of random blocks, with the types that llama.cpp gives to the matrices of a mix.

Owns the choice of types and the drawing of blocks; keys and names are those of the other engines'
comparison (`benchmarks.peers.workers.llamacpp`). What blocks stand for is decoded by the `gguf`
package's reference. Invariant: a file that exists is whole.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

import gguf
from benchmarks.peers.shapes import WEIGHT_STD, Shape
from benchmarks.peers.workers.llamacpp import NAMES, add_keys
from benchmarks.stored import Tensor, plain_file

F32 = NDArray[np.float32]
PLAIN = {"F32": np.float32, "F16": np.float16}
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "MXFP4",
)  # fmt: skip
# What llama.cpp takes where rows are no multiple of 256 numbers.
_INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class _Block(NamedTuple):
    """Where the float16 numbers of a block are, and what makes its values center at 0."""

    scale: int
    minimum: int | None = None
    ratio: float = 0.0  # of the minimum to the scale


# With integer scales and minima as likely as any, `ratio` is the mean of the codes.
_BLOCKS = {
    "Q8_0": _Block(0), "Q4_0": _Block(0), "Q5_0": _Block(0),
    "Q4_1": _Block(0, 2, -7.5), "Q5_1": _Block(0, 2, -15.5),
    "Q2_K": _Block(80, 82, 1.5), "Q3_K": _Block(108), "Q4_K": _Block(0, 2, 7.5),
    "Q5_K": _Block(0, 2, 15.5), "Q6_K": _Block(208),
}  # fmt: skip


def type_of(mix: str, name: str, num_columns: int) -> str:
    """ggml's type of a matrix in a file of that kind: one type for all, or "Q4_K_M".

    `name` is llama.cpp's. Q4_K_M is Q4_K, and Q6_K where errors cost most: here in all values' and
    down maps, which in llama.cpp are half of them.
    """
    if mix == "Q4_K_M":
        is_dear = any(part in name for part in ("attn_v", "ffn_down", "token_embd"))
        mix = "Q6_K" if is_dear else "Q4_K"
    return _INSTEAD[mix] if num_columns % 256 and mix in _INSTEAD else mix


def write(
    shape: Shape, mix: str, target: Path, spread: float = WEIGHT_STD, plain: Path | None = None
) -> Path:
    """A GGUF file, written if it is not there.

    Args:
        spread: standard deviation of the weights.
        plain: takes the same numbers as an unquantized checkpoint in float32; a `tokenizer.json`
            that is there becomes the file's vocabulary.
    """
    if target.exists():
        return target
    config = shape.config()
    twin = None if plain is None else plain_file(plain, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama", use_temp_file=True)
    add_keys(writer, config, target.parent / "tokenizer.json")
    for name, dimensions in shape.tensors():
        stem, prefix = name.removesuffix(".weight"), ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        full_name = f"{prefix}{NAMES[stem]}.weight"
        if len(dimensions) == 1:
            values = np.ones(dimensions, np.float32)
            writer.add_tensor(full_name, values)
        else:
            kind = type_of(mix, full_name, dimensions[1])
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            data = _drawn(rng, kind, (dimensions[0], dimensions[1]), spread)
            writer.add_tensor(full_name, data, raw_dtype=GGMLQuantizationType[kind])
            if twin is None:
                continue
            values = dequantize(data, GGMLQuantizationType[kind]).reshape(dimensions)
            heads = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads}
            if num_heads := heads.get(NAMES[stem]):  # a head's halves are in turns there
                pairs = values.reshape(num_heads, -1, 2, dimensions[1])
                values = pairs.swapaxes(1, 2).reshape(dimensions)
        if twin is not None:
            twin.add(Tensor(name, "F32", values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if twin is not None:
        twin.close()
    return Path(shutil.move(unfinished, target))


def _drawn(
    rng: np.random.Generator, kind: str, dimensions: tuple[int, int], spread: float
) -> NDArray[Any]:
    """Random blocks of a type, [rows, bytes or numbers of a row]."""
    if kind in {"F32", "F16", "BF16"}:
        numbers = rng.standard_normal(dimensions, np.float32) * np.float32(spread)
        if kind == "BF16":
            return (numbers.view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8)
        return numbers.astype(PLAIN[kind])
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    num_blocks = dimensions[0] * dimensions[1] // block_size
    blocks = np.frombuffer(rng.bytes(num_blocks * block_bytes), np.uint8).reshape(num_blocks, -1)
    blocks = blocks.copy()
    factors = rng.uniform(0.5, 1.5, num_blocks).astype(np.float32)
    if kind == "MXFP4":  # a power of two, and numbers of e2m1 whose spread is 3
        blocks[:, 0] = rng.integers(-1, 2, num_blocks) + int(np.round(np.log2(spread / 3))) + 127
        return blocks.reshape(dimensions[0], -1)
    # Of some blocks with a scale of 1: what must it be?
    _set_scales(blocks, kind, np.ones(num_blocks, np.float32))
    unit = dequantize(blocks[:64].reshape(1, -1), GGMLQuantizationType[kind]).std()
    _set_scales(blocks, kind, factors * np.float32(spread / unit))
    return blocks.reshape(dimensions[0], -1)


def _set_scales(blocks: NDArray[np.uint8], kind: str, scales: F32) -> None:
    places = _BLOCKS[kind]
    for place, ratio in ((places.scale, 1.0), (places.minimum, places.ratio)):
        if place is not None:
            halves = (scales * np.float32(ratio)).astype("<f2")
            blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
