"""Every kernel computes what its reference computes: on a GPU, or through Triton's interpreter.

Compared are the result and every argument, because many operations write into their arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from penstock import kernels
from penstock.kernels import registry
from penstock.kernels.jit import INTERPRETED
from penstock.kernels.op import Op, forced, triton_problem

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
MAX_NEIGHBOURS = 0.02  # of 8-bit numbers that may have been rounded to the other side


@pytest.fixture(autouse=True)
def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run in any order, as on a GPU: which one is the last must not matter."""
    if not INTERPRETED:
        return
    rng = random.Random(0)

    def ordered(*args: int) -> Iterable[int]:
        numbers = range(*args)
        # Of what the interpreter counts, only the loops over the grid.
        is_grid = sys._getframe(1).f_code.co_qualname == "GridExecutor.__call__"
        return rng.sample(numbers, len(numbers)) if is_grid else numbers

    monkeypatch.setattr("triton.runtime.interpreter.range", ordered, raising=False)


def cloned(value: Any) -> Any:
    """A copy that shares nothing, with the strides of the original."""
    if isinstance(value, tuple):  # a named one
        return type(value)(*map(cloned, value))
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def tensors(*values: Any) -> list[torch.Tensor]:
    """The tensors among the values and in tuples among them."""
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, torch.Tensor)]


def steps(value: torch.Tensor) -> torch.Tensor:
    """8-bit numbers, counted in steps of their format from zero."""
    bits = value.view(torch.int8).int()
    if value.dtype == torch.int8:
        return bits
    return torch.where(bits < 0, -(bits & 127), bits)


def assert_equal(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, label: str
) -> None:
    """Within `tolerance` of the expected number and of the mean magnitude; 8 bits: of one step."""
    assert actual.shape == expected.shape, label
    assert actual.dtype == expected.dtype, label
    if not expected.numel():
        return
    if expected.dtype in EIGHT_BIT:
        away = (steps(actual) - steps(expected)).abs()
        assert away.max() <= 1, label
        assert away.float().mean() <= MAX_NEIGHBOURS, label
    elif expected.dtype.is_floating_point:
        expected = expected.double()
        finite = expected[expected.isfinite()]
        scale = float(finite.abs().mean()) if len(finite) else 0.0
        torch.testing.assert_close(
            actual.double(),
            expected,
            rtol=tolerance,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda text: f"{label}: {text}",
        )
    else:
        assert torch.equal(actual, expected), label


def compare(op: Op[Any, Any], device: torch.device) -> int:
    """Run both ways on every sample; the number of samples."""
    cases = list(op.samples(device))
    for label, args, kwargs, tolerance in cases:
        outcomes = []
        for name in ("triton", "reference"):
            own_args = [cloned(value) for value in args]
            own_kwargs = {key: cloned(value) for key, value in kwargs.items()}
            with forced(name):
                result = op(*own_args, **own_kwargs)
            outcomes.append(tensors(result, *own_args, *own_kwargs.values()))
        assert outcomes[1], f"{label}: nothing to compare"
        for place, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
            assert_equal(actual, expected, tolerance, f"{op.name}, {label}, tensor {place}")
    return len(cases)


@pytest.mark.skipif(triton_problem() is not None, reason=f"{triton_problem()}")
@pytest.mark.parametrize("op", registry.load(), ids=lambda op: op.name)
def test_kernel_computes_what_its_reference_does(op: Op[Any, Any], device: torch.device) -> None:
    assert compare(op, device) > 1


def test_every_operation_is_registered() -> None:
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Op) and value.launch.__module__ == module.name:
                found.add(f"{module.name.rpartition('.')[2]}:{name}")
    assert found == set(registry.OPS)


def wrong_result(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return x * 1.01


def wrong_argument(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out[-1] += 1
    return x + 0.0


def wrong_neighbours(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out[:2] += 1
    return x + 0.0


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (wrong_result, torch.float32),
        (wrong_argument, torch.float32),
        (wrong_argument, torch.int64),
        (wrong_neighbours, torch.int8),
    ],
)
def test_a_wrong_kernel_is_noticed(wrong: Any, dtype: torch.dtype, device: torch.device) -> None:
    def reference(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return x + 0.0

    def samples(where: torch.device) -> Any:
        x = torch.ones(10, device=where)
        yield "ones", (x, torch.ones(10, dtype=dtype, device=where)), {}, 1e-3

    assert compare(Op(reference, reference, samples), device) == 1
    with pytest.raises(AssertionError):
        compare(Op(wrong, reference, samples), device)
