"""`penstock doctor` on machines that lack something, or have something broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock import hardware
from penstock.cli import doctor
from penstock.kernels import gpu


def run(**environment: str) -> dict[str, Any]:
    """The report of a process of its own, in this environment."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "doctor", "--json"],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("raises", "told"),
    [
        (
            "OSError('libcudart.so.12: cannot open shared object file')",
            "torch is installed and cannot be imported: libcudart.so.12: cannot open shared",
        ),
        ("ModuleNotFoundError(name='torch')", "torch is not installed; pip install"),
    ],
)
def test_a_broken_torch_is_a_line(raises: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"raise {raises}")
    found = run(PYTHONPATH=str(tmp_path), PENSTOCK_KERNELS="reference")
    for line in (found["backends"]["torch"], found["backends"]["triton"]):
        assert line["runs"] is False
        assert told in line["detail"]
    assert set(found["attention on triton"]) == {"triton", "flashinfer"}
    assert all(told in line["detail"] for line in found["attention on triton"].values())


def test_every_backend_says_why() -> None:
    found = run()
    assert {"RAPL", "NVML"} <= set(found["meters"])
    assert all(found["meters"].values())
    assert list(found["backends"]) == ["triton", "native", "torch"]
    assert set(found["attention on triton"]) == {"triton", "flashinfer"}
    for lines in (found["backends"], found["attention on triton"]):
        for line in lines.values():
            assert set(line) == {"runs", "detail"}
            assert type(line["runs"]) is bool
            assert line["detail"]


def test_the_first_import_of_torch_is_timed() -> None:
    told = run(PENSTOCK_KERNELS="reference")["backends"]["torch"]["detail"]
    assert float(told.rpartition("loads in ")[2].rstrip(" s")) > 0.1


def test_a_wrong_word_in_the_environment_stops_all_of_triton() -> None:
    found = run(PENSTOCK_KERNELS="nonsense")
    for line in (found["backends"]["triton"], *found["attention on triton"].values()):
        assert line["runs"] is False
        assert "`nonsense`; it must be `triton` or `reference`; unset" in line["detail"]


def test_triton_can_be_tried_out() -> None:
    found = run(PENSTOCK_KERNELS="reference")
    triton = found["backends"]["triton"]
    assert triton["runs"] is True
    if not found["GPUs"]:
        assert triton["detail"].startswith("on the CPU")
        assert "reference kernels" in triton["detail"]
    attention = found["attention on triton"]["triton"]
    assert attention["runs"] is True
    formats = "float32, bfloat16, float16, int8"
    assert attention["detail"].startswith(f"with a KV cache in {formats}")
    assert found["packages"]["triton"] != ""


def test_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = gpu.Gpu("NVIDIA H200", 141 * 2**30, (9, 0))
    monkeypatch.setattr(hardware, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "570.86.15")
    monkeypatch.setattr(gpu, "gpus", lambda: [h200, h200])
    monkeypatch.setattr(gpu, "problem", lambda: None)
    found = doctor._gpus()
    one = {"name": "NVIDIA H200", "memory_bytes": 141 * 2**30, "compute_capability": "9.0"}
    assert found == [one, one]
    assert [(name, doctor._text(value)) for name, value in doctor._named(found)] == [
        ("cuda:0", "NVIDIA H200, 141.0 GiB, compute capability 9.0"),
        ("cuda:1", "NVIDIA H200, 141.0 GiB, compute capability 9.0"),
    ]
    assert doctor._driver() == "570.86.15"

    monkeypatch.setattr(gpu, "gpus", list)
    assert doctor._gpus() == []
    ((name, _),) = doctor._named([])
    assert name == "none"


@pytest.mark.parametrize(
    ("problems", "told"),
    [
        ({"bfloat16": [], "fp8": []}, "runs with a KV cache in bfloat16, fp8"),
        (
            {"bfloat16": [], "int8": ["b"], "fp8": ["a", "b"], "float32": ["b"]},
            "runs with a KV cache in bfloat16; not in int8, float32: b; not in fp8: a; b",
        ),
        ({"bfloat16": ["a", "b"], "fp8": ["a", "b", "c"]}, "cannot run: a; b"),
    ],
)
def test_formats_of_an_attention_backend(problems: dict[str, list[str]], told: str) -> None:
    assert doctor._text(doctor._formats(problems)._asdict()) == told
