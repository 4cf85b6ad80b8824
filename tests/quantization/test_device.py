"""Quantized matrices on a device: their numbers, their bytes, and what they multiply to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.helpers_live import LiveBytes

from penstock.errors import EngineError
from penstock.kernels import fp8_matmul, int_matmul, quantize_fp8, split_k
from penstock.kernels.chip import HOPPER
from penstock.kernels.jit import triton
from penstock.kernels.op import forced
from penstock.native import library
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization import device as quantization
from penstock.quantization.device import DeviceWeight, make_weight
from penstock.quantization.schemes import DEVICE_NAMES, Format, device_bytes, scheme
from penstock.quantization.unpack import unpack

FORMATS = {str(form): form for name in DEVICE_NAMES for form in scheme(name, "float32")[:2]}
INTEGERS = {name: form for name, form in FORMATS.items() if form.dtype.startswith("int")}
# Of the weights of a normal distribution: the root mean square error, as a share of theirs.
WEIGHT_ERRORS = {
    ("float32", 0): 0.0,
    ("int8", 0): 0.01,
    ("int4", 32): 0.11,
    ("int4", 128): 0.13,
    ("fp8", 0): 0.03,
    ("fp8", 128): 0.03,
}

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def numbers(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of different magnitude; one of zeros, one of nearly nothing."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((num_rows, num_columns), np.float32)
    values *= np.exp2(rng.integers(-8, 4, (num_rows, 1))).astype(np.float32)
    if num_rows > 3:
        values[1] = 0
        values[3] *= np.float32(1e-42)
    return torch.from_numpy(values)


def filled(
    form: Format,
    values: torch.Tensor,
    device: torch.device,
    cuts: Sequence[int] = (),
    order: Callable[[list[int]], list[int]] = list,
) -> DeviceWeight:
    """A weight that took its rows in runs that end at `cuts`."""
    weight = make_weight(form, *values.shape, torch.float32, device)
    ends = [*cuts, len(values)]
    for index in order(list(range(len(ends)))):
        first = ends[index - 1] if index else 0
        weight.fill(first, values[first : ends[index]].to(device))
    weight.finish()
    return weight


def rows_of(weight: DeviceWeight) -> torch.Tensor:
    ids = torch.arange(weight.num_rows)
    device = weight.rows(torch.zeros(1, dtype=torch.int64)).device
    return weight.rows(ids.to(device)).cpu()


@pytest.mark.parametrize("form", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (33, 128), (20, 576)])
def test_integers_are_those_of_the_native_library(form: Format, shape: tuple[int, int]) -> None:
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    values = numbers(*shape)
    packed = PackedWeight(Pool(library.load(), 1), form, *shape, Arena())
    packed.pack(values.numpy().view(np.uint8).reshape(-1), "float32", len(values), Placement())
    expected = unpack(form, packed.data, packed.scales, *shape)
    found = rows_of(filled(form, values, torch.device("cpu")))
    assert np.array_equal(found.numpy(), expected)


@every_format
def test_error_of_weights(form: Format, device: torch.device) -> None:
    values = torch.from_numpy(np.random.default_rng(1).standard_normal((256, 256), np.float32))
    rows = rows_of(filled(form, values, device))
    assert torch.equal(rows, rows_of(filled(form, values, torch.device("cpu"))))
    error = (rows - values).double()
    relative = float(error.square().mean().sqrt() / values.double().square().mean().sqrt())
    bound = WEIGHT_ERRORS[form.dtype, form.group_size]
    assert bound / 2 <= relative <= bound


@every_format
@pytest.mark.parametrize(
    ("cuts", "order"),
    [((5, 127, 261), list), ((128, 256), list), ((100, 200, 261), lambda ids: ids[::-1])],
)
def test_parts_come_in_any_order(
    form: Format, cuts: Sequence[int], order: Callable[[list[int]], list[int]]
) -> None:
    values = numbers(300, 140)
    device = torch.device("cpu")
    whole = rows_of(filled(form, values, device))
    assert torch.equal(rows_of(filled(form, values, device, cuts, order)), whole)


@every_format
def test_rows_that_are_not_filled_are_zeros(form: Format) -> None:
    values = numbers(200, 130)
    weight = make_weight(form, 270, 130, torch.float32, "cpu")
    weight.fill(10, values[:150])
    weight.finish()
    rows = rows_of(weight)
    assert not rows[:10].any()
    assert not rows[160:].any()
    same_blocks = torch.cat([torch.zeros(10, 130), values[:150], torch.zeros(110, 130)])
    assert torch.equal(rows, rows_of(filled(form, same_blocks, torch.device("cpu"))))
    y = weight(torch.ones(1, 130))
    assert not y[:, :10].any()
    assert not y[:, 160:].any()


@every_format
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (129, 384)])
def test_bytes(form: Format, shape: tuple[int, int]) -> None:
    weight = make_weight(form, *shape, torch.float32, "cpu")
    assert weight.num_bytes == device_bytes(form, *shape)
    half = Format("bfloat16") if form.dtype == "float32" else form
    assert make_weight(half, *shape, torch.bfloat16, "cpu").num_bytes == device_bytes(half, *shape)


def test_bits_a_weight() -> None:
    shape = 4096, 14336
    bits = {
        name: device_bytes(scheme(name, "bfloat16").linear, *shape) * 8 / (shape[0] * shape[1])
        for name in DEVICE_NAMES
    }
    assert bits["none"] == 16
    assert 8 < bits["int8-a16"] < 8.01
    assert 4.25 < bits["int4-a16"] == bits["int4-g128-a16"] < 4.26
    assert 8 < bits["fp8-block"] < bits["fp8"] < 8.01


@every_format
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(form: Format, with_bias: bool, device: torch.device) -> None:
    """Exact but for the activations, which fp8 rounds to 4 bits."""
    weight = filled(form, numbers(20, 200), device, (7,))
    x = numbers(3, 200, seed=2).to(device)
    bias = numbers(1, 20, seed=3)[0].to(device) if with_bias else None
    expected = x.cpu().double() @ rows_of(weight).double().T
    size = x.cpu().double().abs() @ rows_of(weight).double().abs().T
    if bias is not None:
        expected += bias.cpu().double()
        size += bias.cpu().double().abs()
    error = (weight(x, bias).cpu().double() - expected).abs()
    assert (error <= (2**-5 if form.dtype == "fp8" else 1e-6) * size + 1e-44).all()
    if form.dtype == "fp8":
        assert error.any()  # activations are quantized


@every_format
def test_rows_are_the_models_numbers(form: Format) -> None:
    half = Format("bfloat16") if form.dtype == "float32" else form
    values = numbers(150, 130)
    weight = make_weight(half, 150, 130, torch.bfloat16, "cpu")
    weight.fill(0, values)
    weight.finish()
    exact = rows_of(filled(form, values, torch.device("cpu")))
    ids = torch.tensor([149, 0, 0, 3])
    rows = weight.rows(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, exact[ids].bfloat16())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@every_format
def test_what_is_not_finite_is_refused(form: Format, wrong: float) -> None:
    if form.dtype == "float32":
        pytest.skip("is not quantized")
    values = numbers(128, 40)
    values[17, 3] = wrong
    with pytest.raises(EngineError, match="row `17` of the source is not finite"):
        make_weight(form, 128, 40, torch.float32, "cpu").fill(0, values)


class Launches:
    """In place of a kernel: notes what Triton would compile for its launches."""

    def __init__(self, kernel: Any) -> None:
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        self._names = kernel.arg_names
        self._unspecialized = options["do_not_specialize"]
        self.compiled: set[frozenset[tuple[str, Any]]] = set()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **constants: Any) -> None:
        kinds = dict(constants)
        for name, value in zip(self._names, args, strict=False):
            if isinstance(value, int):
                special = value == 1 or value % 16 == 0
                kinds[name] = (special, value == 1) if name not in self._unspecialized else int
            else:
                kinds[name] = None if value is None else value.dtype
        self.compiled.add(frozenset(kinds.items()))


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(28672, 4096), (4096, 14336), (768, 4096), (1024, 1000)], ids=str
)
@pytest.mark.parametrize("name", ["int8", "int4-32", "fp8", "fp8-128"])
def test_a_warm_weight_has_compiled_all_its_products(
    name: str, shape: tuple[int, int], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Llama's 8B model, alone and on eight ranks, and one with odd columns; on Hopper."""
    dtype, _, group_size = name.partition("-")
    product = fp8_matmul if dtype == "fp8" else int_matmul
    launches = [Launches(module._kernel) for module in (product, quantize_fp8)]
    for module, noted in zip((product, quantize_fp8), launches, strict=True):
        monkeypatch.setattr(module, "_kernel", noted)
    monkeypatch.setattr(quantization, "INTERPRETED", False)
    for module in (product, split_k):
        monkeypatch.setattr(module, "chip", lambda device: HOPPER)
    form = Format(dtype, int(group_size or 0))
    weight = make_weight(form, *shape, torch.bfloat16, "meta")
    bias = torch.zeros(shape[0], dtype=torch.bfloat16, device="meta") if with_bias else None
    with forced("triton"):
        weight.warm_up(bias)
        warm = [noted.compiled.copy() for noted in launches]
        assert 4 <= len(warm[0]) <= 5
        assert len(warm[1]) == (dtype == "fp8")
        for num_tokens in (*range(1, 530), *range(530, 4097, 97)):
            x = torch.zeros(num_tokens, shape[1], dtype=torch.bfloat16, device="meta")
            weight(x, bias)
    assert [noted.compiled for noted in launches] == warm


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_nothing_is_computed_where_nothing_is_compiled(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the interpreter, or by references on a GPU as well."""
    monkeypatch.setattr(quantization, "INTERPRETED", mode == "triton")
    weight = make_weight(Format("int8"), 3, 5, torch.float32, "cpu")
    with forced(mode), LiveBytes() as live:
        weight.warm_up()
    assert live.peak == 0
