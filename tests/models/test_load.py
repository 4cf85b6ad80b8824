"""Which backends a machine has for a model, and that nobody imports torch to say that none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.models.llama_specs import SMALL as SPEC
from tests.models.llama_specs import changed

from penstock.errors import ConfigError
from penstock.models import load
from penstock.models.load import Backends, device_problem


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "has_nvidia_device", lambda: False)
    for name in ("PENSTOCK_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_gpu_the_reason_names_what_to_try() -> None:
    backends = Backends(SPEC)
    assert backends.problem("triton") == "there is no NVIDIA GPU"
    told = str(backends.remedy("triton"))
    assert "`PENSTOCK_KERNELS=reference` together with `--backend triton`" in told
    assert backends.num_gpus == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("PENSTOCK_KERNELS", "reference"), ("TRITON_INTERPRET", "1"), ("TRITON_INTERPRET", "true")],
)
def test_the_environment_lets_it_run_on_the_cpu(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert device_problem(SPEC) is None
    backends = Backends(SPEC)
    assert backends.problem("triton") is None
    assert backends.remedy("triton") is None
    assert (backends.num_gpus, backends.fp8_problem()) == (0, None)


@pytest.mark.parametrize(("value", "is_yes"), [("1", 1), ("true", 1), ("0", 0), ("maybe", 0)])
def test_triton_says_what_asks_for_its_interpreter(value: str, is_yes: int) -> None:
    """In a process of its own, because it is said once."""
    code = (
        "from penstock.models import load\n"
        "from penstock.cli.doctor import usual_model\n"
        "load.has_nvidia_device = lambda: False\n"
        "print(load.device_problem(usual_model()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"TRITON_INTERPRET": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout == "None\n") == is_yes, done.stdout


def test_a_wrong_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "cutlass")
    for ask in (lambda: device_problem(SPEC), lambda: Backends(SPEC).problem("triton")):
        with pytest.raises(ConfigError, match="`PENSTOCK_KERNELS` is `cutlass`") as error:
            ask()
        assert "unset `PENSTOCK_KERNELS`" in str(error.value.hint)


def test_heads_that_no_kernel_has_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    assert "`512`" in str(device_problem(changed(SPEC, head_dim=512)))


def test_what_ranks_cannot_share_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    odd = changed(SPEC, num_heads=9, num_kv_heads=3, intermediate_size=90)
    assert "cannot be shared by `2` ranks" in str(Backends(odd, 2).problem("triton"))
    assert Backends(odd, 2).remedy("triton") == "use `--tensor-parallel-size` of `1`, `3` or `9`"
    assert Backends(odd, 3).problem("triton") is None
    alone = changed(odd, intermediate_size=91)
    assert Backends(alone, 2).remedy("triton") == "use `--tensor-parallel-size` of `1`"


def test_a_device_that_torch_cannot_use_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU where torch is built for CPUs."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is built with CUDA")
    monkeypatch.setattr(load, "has_nvidia_device", lambda: True)
    backends = Backends(SPEC)
    assert backends.problem("triton") == f"torch {torch.__version__} is built without CUDA"
    assert backends.num_gpus == 0


@pytest.mark.parametrize(
    ("raises", "told"),
    [
        ("ModuleNotFoundError(name='torch')", "torch is not installed; pip install"),
        ("OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_the_reason(
    raises: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(f"raise {raises}")
    code = (
        "from penstock.models import load\n"
        "from penstock.cli.doctor import usual_model\n"
        "load.has_nvidia_device = lambda: True\n"
        "backends = load.Backends(usual_model())\n"
        "print(backends.num_gpus, backends.problem('triton'))\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0 ")
    assert told in done.stdout


def test_nobody_imports_torch_to_find_no_gpu() -> None:
    code = (
        "import sys\n"
        "from penstock.models import load\n"
        "from penstock.cli.doctor import usual_model\n"
        "load.has_nvidia_device = lambda: False\n"
        "backends = load.Backends(usual_model())\n"
        "assert backends.num_gpus == 0\n"
        "assert backends.problem('triton')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={}, check=False).returncode == 0
