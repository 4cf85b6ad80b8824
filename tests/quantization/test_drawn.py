"""Random codes are such that their format can hold them, and of the spread that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.quantization.codes import CodeForm
from penstock.quantization.drawn import drawn

FORMS = [
    CodeForm("int4", 32, "float16"),
    CodeForm("uint4", 32, "float16", has_minima=True),
    CodeForm("uint4", 128, has_minima=True),
    CodeForm("uint4", 16, "int8", has_minima=True),
    CodeForm("int4", 16, "int8"),
    CodeForm("uint8", 32, "int8", has_minima=True),
    CodeForm("int8", 16, "int8"),
    CodeForm("int8", 32, "float16"),
    CodeForm("uint8", 32, "float16", has_minima=True),
    CodeForm("int8", 0),
    CodeForm("fp4", 32),
    CodeForm("nf4", 64),
    CodeForm("e4m3", 128),
    CodeForm("e5m2", 0),
]


@pytest.mark.parametrize("form", FORMS)
def test_codes(form: CodeForm) -> None:
    matrix = drawn("a.weight", form, (40, 512), (3, 5), 0.02)
    rows = matrix.rows(0, 40)
    assert rows.codes.max() < 2**form.bits
    if form.scales == "int8":
        limit = 256 if form.has_minima else 128
        assert np.array_equal(rows.scales, np.round(rows.scales))
        assert 0 < rows.scales.min() <= rows.scales.max() < limit
    if form.scales == "float16":
        for part in (rows.scales, rows.minima):
            if part is not None:
                assert np.array_equal(part.astype(np.float16).astype(np.float32), part)
    values = matrix.values()
    assert 0.01 < values.std() < 0.04
    assert abs(values.mean()) < 0.01
    assert np.array_equal(matrix.values(7, 21), values[7:21])
    again = drawn("b.weight", form, (40, 512), (3, 5), 0.02)
    other = drawn("a.weight", form, (40, 512), (4, 5), 0.02)
    assert np.array_equal(again.values(), values)
    assert not np.array_equal(other.values(), values)
