"""ggml's block formats against the reference of the `gguf` package: every bit of every number."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.gguf.types import BY_NAME
from penstock.quantization import ggml
from penstock.quantization.codes import CodedTensor, CodeForm, StoredTensor

FORMS = {
    "Q4_0": CodeForm("int4", 32, "float16"),
    "Q4_1": CodeForm("uint4", 32, "float16", True),
    "Q5_0": CodeForm("int8", 32, "float16"),
    "Q5_1": CodeForm("uint8", 32, "float16", True),
    "Q8_0": CodeForm("int8", 32, "float16"),
    "Q2_K": CodeForm("uint4", 16, "int8", True),
    "Q3_K": CodeForm("int4", 16, "int8"),
    "Q4_K": CodeForm("uint4", 32, "int8", True),
    "Q5_K": CodeForm("uint8", 32, "int8", True),
    "Q6_K": CodeForm("int8", 16, "int8"),
    "MXFP4": CodeForm("fp4", 32, "float32"),
}
HALVES = {  # bytes of the float16 numbers in a block
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
ODD_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]
NUM_COLUMNS = 512

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")


def random_rows(type_name: str, num_rows: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of random bytes: [n, bytes of a row]."""
    generator = np.random.default_rng(seed)
    shape = (num_rows, BY_NAME[type_name].row_bytes(NUM_COLUMNS))
    return generator.integers(0, 256, shape, np.uint8)


def tensor(type_name: str, rows: NDArray[np.uint8]) -> CodedTensor:
    return ggml.coded("a.weight", type_name, (len(rows), NUM_COLUMNS), rows.reshape(-1))


def expected(type_name: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    return dequantize(rows, GGMLQuantizationType[type_name])


def assert_same_bits(given: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """Not a number is the same as any other such; everything else bit for bit, zeros with signs."""
    assert given.dtype == wanted.dtype == np.float32
    assert given.shape == wanted.shape
    number = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(given), ~number)
    assert np.array_equal(given[number].view(np.uint32), wanted[number].view(np.uint32))


@pytest.mark.parametrize("type_name", FORMS)
def test_random_bytes(type_name: str) -> None:
    rows = random_rows(type_name, 600)
    if type_name == "MXFP4":
        blocks = rows.reshape(-1, 17)
        blocks[blocks[:, 0] == 255, 0] = 254
    wanted = expected(type_name, rows)
    assert_same_bits(tensor(type_name, rows).values(), wanted)
    assert np.isfinite(wanted).mean() > 0.5


@pytest.mark.parametrize("type_name", HALVES)
def test_odd_scales(type_name: str) -> None:
    """Zeros of either sign, the smallest, the largest, infinity and what is no number."""
    rows = random_rows(type_name, 200, seed=1)
    blocks = rows.reshape(-1, BY_NAME[type_name].block_bytes)
    for index, block in enumerate(blocks):
        for place, at in enumerate(HALVES[type_name]):
            odd = ODD_HALVES[(index // len(ODD_HALVES) ** place) % len(ODD_HALVES)]
            block[at : at + 2] = odd & 255, odd >> 8
    wanted = expected(type_name, rows)
    assert np.isnan(wanted).any()
    assert np.isinf(wanted).any()
    assert_same_bits(tensor(type_name, rows).values(), wanted)


def test_every_exponent_of_mxfp4() -> None:
    rows = random_rows("MXFP4", 16, seed=2)
    rows.reshape(-1, 17)[:, 0] = np.arange(256)
    found = tensor("MXFP4", rows).values().reshape(256, 32)
    assert_same_bits(found[:255], expected("MXFP4", rows).reshape(256, 32)[:255])
    assert np.isnan(found[255]).all()  # as the standard has it; ggml has numbers there


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_the_reference_quantizes(type_name: str) -> None:
    numbers = np.random.default_rng(3).standard_normal((24, NUM_COLUMNS), np.float32)
    rows = quantize(numbers, GGMLQuantizationType[type_name])
    values = tensor(type_name, rows).values()
    assert_same_bits(values, expected(type_name, rows))
    assert np.abs(values - numbers).max() < 1


@pytest.mark.parametrize("type_name", FORMS)
def test_parts_of_a_tensor(type_name: str) -> None:
    """Any rows are those of the whole, and only they are read."""
    rows = random_rows(type_name, 40, seed=4)
    whole = tensor(type_name, rows)
    values = whole.values()
    only = rows.copy()
    only[:7] = only[19:] = 0xAA
    part = tensor(type_name, only)
    assert np.array_equal(part.values(7, 19), values[7:19], equal_nan=True)
    assert whole.values(5, 5).shape == (0, NUM_COLUMNS)
    index = np.array([3, 0, 39, 3, 17])
    assert np.array_equal(whole.arranged(index).values(), values[index], equal_nan=True)
    order = np.random.default_rng(5).permutation(40)
    moved = ggml.coded("a.weight", type_name, whole.shape, rows.reshape(-1), order)
    assert np.array_equal(moved.values(), values[order], equal_nan=True)
    assert np.array_equal(moved.values(9, 11), values[order[9:11]], equal_nan=True)


@pytest.mark.parametrize("type_name", FORMS)
def test_form(type_name: str) -> None:
    """Codes, scales and units are what the form says, which memory is planned by."""
    form = FORMS[type_name]
    assert ggml.form_of(type_name) == form
    rows = random_rows(type_name, 3, seed=5)
    found = tensor(type_name, rows)
    assert (found.form, found.num_bytes, found.shape) == (form, rows.size, (3, NUM_COLUMNS))
    read = found.rows(0, 3)
    assert read.codes.dtype == np.uint8
    assert form.bits == 8 or read.codes.max() < 16
    assert read.scales.shape == (3, NUM_COLUMNS // form.group_size)
    assert (read.minima is not None) == form.has_minima
    assert (read.units is not None) == (form.scales == "int8")
    assert (read.minimum_units is not None) == (form.scales == "int8" and form.has_minima)
    for units in (read.units, read.minimum_units):
        assert units is None or units.shape == (3, NUM_COLUMNS // 256)
    if form.scales == "int8":
        for integers in (read.scales, read.minima):
            assert integers is None or np.array_equal(integers, integers.astype(np.int8))
    if form.scales == "float16":
        for numbers in (read.scales, read.minima):
            assert numbers is None or np.array_equal(
                numbers, numbers.astype(np.float16).astype(np.float32), equal_nan=True
            )


@pytest.mark.parametrize("type_name", ["IQ4_NL", "IQ2_XXS", "TQ1_0", "NVFP4", "I32", "Q8_1"])
def test_types_that_are_not_read(type_name: str) -> None:
    assert ggml.form_of(type_name) is None
    with pytest.raises(ModelLoadError, match=f"`a.weight` is of ggml's type `{type_name}`"):
        ggml.coded("a.weight", type_name, (1, 256), np.zeros(0, np.uint8))


def test_stacks_are_no_matrices() -> None:
    with pytest.raises(ModelLoadError, match=r"shape `\(2, 1, 32\)`; only matrices"):
        ggml.coded("a.weight", "Q8_0", (2, 1, 32), np.zeros(68, np.uint8))


def test_plain_tensors() -> None:
    data = np.arange(24, dtype=np.uint8)
    plain = ggml.tensor("a", "F16", (3, 4), data)
    assert isinstance(plain, StoredTensor)
    assert plain[:3] == ("a", "F16", (3, 4))
    assert plain.data is data
    moved = ggml.tensor("a", "F16", (3, 4), data, np.array([2, 0, 1]))
    assert isinstance(moved, StoredTensor)
    assert moved.data.tolist() == [*range(16, 24), *range(16)]
    assert isinstance(ggml.tensor("a", "Q8_0", (1, 32), np.zeros(34, np.uint8)), CodedTensor)
