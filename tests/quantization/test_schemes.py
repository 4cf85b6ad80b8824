"""What a format takes in memory is what the library takes."""

from __future__ import annotations

import ctypes

import pytest

from penstock.native import library as native
from penstock.native.structs import DTYPES, Weight
from penstock.native.weights import padded_rows
from penstock.quantization.schemes import NATIVE_NAMES, Format, packed_bytes, scheme

FORMATS = {
    form
    for name in NATIVE_NAMES
    for dtype in ("float32", "bfloat16")
    for form in scheme(name, dtype)[:2]
}
SHAPES = [(1, 1), (16, 64), (17, 65), (100, 191), (1536, 576), (49152, 576), (33, 4097)]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_packed_bytes(form: Format) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    for num_rows, num_columns in SHAPES:
        weight = Weight(
            format=DTYPES[form.dtype],
            group_size=form.group_size,
            num_rows=num_rows,
            num_columns=num_columns,
        )
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
