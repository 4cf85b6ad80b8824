"""That the rates are measured on what a model is made of. How fast it is decides nothing."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from penstock.native import rates
from penstock.native.pool import Pool
from penstock.native.rates import Curve, Geometry, Product
from penstock.quantization.codes import CodeForm
from penstock.quantization.schemes import Format, coded

SHAPES = [Product(48, 64), Product(32, 48), Product(40, 32, is_gated=True), Product(32, 40)]
FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    Format("int8"),
    Format("int4", 32),
    coded(CodeForm("uint4", 32, "float16", has_minima=True)),
    coded(CodeForm("e4m3", 32)),
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at it is a second later: every run takes one second, and there are three."""
    ticks = itertools.count()
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = Curve((2, 10), (1.0, 3.0))
    assert [curve.at(rows) for rows in (1, 2, 6, 10, 20)] == [1.0, 1.0, 2.0, 3.0, 6.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
def test_products_run_in_every_format(form: Format, dtype: str, pool: Pool) -> None:
    found = rates.products(pool, form, SHAPES, (1, 8, 64), dtype=dtype, activation_bits=8)
    num_parameters = 48 * 64 + 32 * 48 + 2 * 40 * 32 + 32 * 40
    assert found.rows == (1, 8, 64)
    assert found.seconds == pytest.approx([1 / num_parameters] * 3)


def test_few_rows_meet_all_matrices_and_many_the_first(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "BLOCK_BYTES", 1)
    found = rates.products(
        pool, Format("float32"), SHAPES, (32, 33), dtype="float32", activation_bits=16
    )
    assert found.seconds == pytest.approx([1 / 8448, 1 / (48 * 64)])
    monkeypatch.setattr(rates, "STREAM_BYTES", 1)
    found = rates.products(
        pool, Format("float32"), SHAPES, (1,), dtype="float32", activation_bits=16
    )
    assert found.seconds == pytest.approx([1 / (48 * 64)])


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "geometry", [Geometry(4, 2, 16, 16), Geometry(4, 1, 40, 32, is_latent=True)]
)
def test_attention_of_requests_and_of_a_prompt(
    geometry: Geometry, kv_dtype: str, pool: Pool
) -> None:
    def seconds(**sizes: int) -> float:
        return rates.attention(
            pool, geometry, dtype="bfloat16", kv_dtype=kv_dtype, num_layers=3, **sizes
        )

    assert seconds(context_len=50, num_requests=3) == pytest.approx(1 / 3)  # of three layers
    assert seconds(context_len=50, num_requests=1, num_new=50) == pytest.approx(1.0)
    assert seconds(context_len=50, num_requests=2, num_new=7) == pytest.approx(1.0)


def test_no_more_layers_than_the_caches_hold(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "KV_BYTES", 20_000)  # one layer: 2 x 2 vectors x 16 x 2 x 64
    found = rates.attention(
        pool,
        Geometry(4, 2, 16, 16),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        context_len=64,
        num_layers=50,
        num_requests=1,
    )
    assert found == pytest.approx(1 / 3)


def test_the_rest(pool: Pool) -> None:
    assert rates.row_ops(pool, 48, (1, 5), dtype="bfloat16").seconds == pytest.approx([1 / 24] * 2)
    assert rates.sampling(pool, 67, (1, 8)).seconds == (1.0, 1.0)


def test_the_median_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 9.0, 9.0, 10.0, 10.0, 12.0, 12.0])  # rounds of 9, 1 and 2 seconds
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    runs: list[None] = []
    assert rates._seconds(lambda: runs.append(None)) == 2.0
    assert len(runs) == 4  # the first warms up
