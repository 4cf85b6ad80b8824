"""Ticks that a person would choose, and numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.measure.report import units
from penstock.measure.report.axes import Axis, Scale, linear_ticks, log_ticks

SIZES = st.floats(1e-9, 1e12)


@given(low=st.floats(-1e6, 1e6), span=SIZES, num_ticks=st.integers(3, 10))
def test_linear_ticks(low: float, span: float, num_ticks: int) -> None:
    high = low + span
    if not high - low > 1e-6 * max(abs(low), abs(high)):
        return  # closer together than an axis can tell
    ticks, (begin, end) = linear_ticks(low, high, num_ticks=num_ticks)
    step = ticks[1] - ticks[0]
    assert begin <= low + 1e-9 * step
    assert end >= high - 1e-9 * step
    assert 2 <= len(ticks) <= num_ticks + 3
    assert any(
        math.isclose(step, factor * 10.0 ** math.floor(math.log10(step) + 1e-6), rel_tol=1e-6)
        for factor in (1, 2, 5)
    )


@given(low=SIZES, factor=st.floats(1.001, 1e9))
def test_log_ticks(low: float, factor: float) -> None:
    high = low * factor
    ticks, (begin, end) = log_ticks(low, high)
    assert begin <= low * 1.01
    assert end >= high * 0.99
    assert len(ticks) >= 2
    assert ticks == sorted(ticks)
    assert ticks[0] > 0


@pytest.mark.parametrize(
    ("axis", "values", "labels", "title"),
    [
        (Axis("ttft", "s"), [0.0012, 0.0093], ["0", "2", "4", "6", "8", "10"], "ttft (ms)"),
        (Axis("t", "s"), [0, 1700], ["0", "5", "10", "15", "20", "25", "30"], "t (min)"),
        (Axis("rss", "bytes"), [0, 3 * 2**30], ["0.0", "0.5", "1.0", "1.5"], "rss (GiB)"),
        (Axis("share", "%"), [0, 1], ["0", "20", "40", "60", "80", "100"], "share (%)"),
        (Axis("n", log=True), [1, 64], ["1", "2", "5", "10", "20", "50", "100"], "n, log scale"),
        (Axis("n", log=True), [1, 1e8], ["1", "100", "10,000", "1M", "100M"], "n, log scale"),
        (Axis("d", "points"), [-0.02, 0.01], ["−2.0", "−1.5", "−1.0"], "d (points)"),
    ],
)
def test_labels(axis: Axis, values: list[float], labels: list[str], title: str) -> None:
    scale = Scale(axis, values, 0, 600)
    assert [label for _, label in scale.ticks][: len(labels)] == labels
    assert scale.title == title


@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_scale_keeps_order_and_range(values: list[float]) -> None:
    scale = Scale(Axis("x"), values, 10, 500)
    pixels = [scale(value) for value in sorted(values)]
    assert pixels == sorted(pixels)
    assert all(10 <= pixel <= 500 for pixel in pixels)


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (0.0123456, "s", "12.3 ms"),
        (0.000_000_5, "s", "0.500 µs"),
        (1.0, "s", "1.00 s"),
        (599.0, "s", "599 s"),
        (5400.0, "s", "90.0 min"),
        (0.0, "s", "0 s"),
        (-0.25, "s", "−250 ms"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (512, "bytes", "512 B"),
        (12_500.0, "J", "12.5 kJ"),
        (0.123456, "%", "12.3 %"),
        (-0.004, "points", "−0.400 points"),
        (1234567.0, "tokens/s", "1,234,567 tokens/s"),
        (0.000012, "", "1.20e−05"),
        (99.96, "", "100"),
        (9.999, "", "10.0"),
        (7, "", "7"),
        (None, "s", "—"),
        (1.5, "usd", "$1.50"),
        (0.000123, "usd", "$0.000123"),
        (-2000.0, "usd", "−$2,000.00"),
        (2500.0, "g", "2.50 kg"),
        (float("nan"), "", "not a number"),
    ],
)
def test_quantities(value: float | None, unit: str, told: str) -> None:
    assert units.quantity(value, unit) == told


def test_interval_has_one_unit() -> None:
    assert units.interval(0.9, 1.1, "s") == "0.900 to 1.10 s"
    assert units.interval(0.0009, 0.0011, "s") == "0.900 to 1.10 ms"
    assert units.interval(None, 1, "s") == "—"
