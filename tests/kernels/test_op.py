"""Who computes: the kernel or its reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock.errors import ConfigError
from penstock.kernels import op
from penstock.kernels.op import Op, Sample, forced, mode


def _name(x: int) -> str:
    """What it computes."""
    return f"kernel {x}"


def reference(x: int) -> str:
    return f"reference {x}"


def samples(device: torch.device) -> Iterator[Sample]:
    yield "one", (1,), {}, 0.0


def test_an_op_is_its_kernel_or_its_reference() -> None:
    named = Op(_name, reference, samples)
    assert (named.name, named.__doc__) == ("name", "What it computes.")
    with forced("triton"):
        assert named(1) == "kernel 1"
        with forced("reference"):
            assert named(x=2) == "reference 2"
        assert named(3) == "kernel 3"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    assert mode() == "reference"
    monkeypatch.setenv("PENSTOCK_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="`cuda`; it must be `triton` or `reference`"):
        mode()


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is settled once a process, asked anew."""
    for settled in (op.triton_problem, op._resolved):
        settled.cache_clear()
    yield
    for settled in (op.triton_problem, op._resolved):
        settled.cache_clear()


NO_GPU = "there is no GPU that torch can use"


@pytest.mark.parametrize(
    ("has_gpu", "interpreted", "triton", "problem"),
    [
        (True, False, "installed", None),
        (False, True, "installed", None),
        (False, False, "installed", NO_GPU),
        (True, False, None, "Triton is not installed"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_triton_computes_where_it_can(
    has_gpu: bool,
    interpreted: bool,
    triton: str | None,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(op, "INTERPRETED", interpreted)
    monkeypatch.setattr(op, "triton", triton)
    monkeypatch.delenv("PENSTOCK_KERNELS", raising=False)
    assert op.triton_problem() == problem
    assert mode() == ("triton" if problem is None else "reference")
    monkeypatch.setenv("PENSTOCK_KERNELS", "triton")
    if problem is None:
        assert mode() == "triton"
    else:
        with pytest.raises(ConfigError, match=problem):
            mode()
