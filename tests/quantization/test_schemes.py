"""What a format takes in memory is what the library takes."""

from __future__ import annotations

import ctypes

import pytest

from penstock.native import library as native
from penstock.native.weights import padded_rows, weight_of
from penstock.quantization.codes import Code, CodeForm
from penstock.quantization.schemes import NATIVE_NAMES, Format, coded, packed_bytes, scheme

FORMATS = {
    form
    for name in NATIVE_NAMES
    for dtype in ("float32", "bfloat16")
    for form in scheme(name, dtype)[:2]
}
CODES: tuple[Code, ...] = ("int4", "nf4", "int8", "e4m3")
CODED = [
    coded(CodeForm(code, group_size, scales, has_minima))
    for code in CODES
    for group_size in (0, 16, 32, 64, 96, 128, 256, 1024)
    for scales in ("float32", "float16", "int8")
    for has_minima in (False, True)
    if scales != "int8" or group_size in {16, 32, 64, 128, 256}
]
SHAPES = [(1, 1), (16, 64), (17, 65), (100, 191), (1536, 576), (49152, 576), (33, 4097)]


@pytest.mark.parametrize("form", [*sorted(FORMATS), *CODED], ids=str)
def test_packed_bytes(form: Format) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    for num_rows, num_columns in SHAPES:
        weight = weight_of(form, num_rows, num_columns)
        native.load().call("penstock_weight_layout", ctypes.byref(weight))
        scale_bytes = 4 * padded_rows(num_rows) if form.dtype.startswith("int") else 0
        assert packed_bytes(form, num_rows, num_columns) == weight.data_bytes + scale_bytes


def test_bits_a_weight() -> None:
    bits = {
        name: packed_bytes(scheme(name, "bfloat16").linear, 2048, 8192) * 8 / (2048 * 8192)
        for name in NATIVE_NAMES
    }
    assert bits["none"] == 16
    assert 8 < bits["int8"] < 8.01
    assert 4.12 < bits["int4"] < 4.13
    assert bits["int4"] == bits["int4-g128"] == bits["int4-a16"]


def test_schemes_differ() -> None:
    assert len({scheme(name, "bfloat16") for name in NATIVE_NAMES}) == len(NATIVE_NAMES)
    assert scheme("none", "float32") != scheme("none", "bfloat16")


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (CodeForm("int4", 32, "float16"), 4.5),  # Q4_0
        (CodeForm("uint4", 32, "int8", has_minima=True), 4.75),  # Q4_K
        (CodeForm("int8", 16, "int8"), 8.625),  # Q6_K
        (CodeForm("int8", 32, "float16"), 8.5),  # Q8_0
        (CodeForm("uint4", 128, has_minima=True), 4.5),  # GPTQ, AWQ
        (CodeForm("nf4", 64), 4.5),
        (CodeForm("fp4", 32), 5),  # MXFP4
        (CodeForm("e4m3", 128), 8.25),  # fp8 in blocks
    ],
)
def test_bits_a_coded_weight(form: CodeForm, bits: float) -> None:
    assert packed_bytes(coded(form), 2048, 8192) * 8 == bits * 2048 * 8192
