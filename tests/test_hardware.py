"""What the machine says of itself, and what a container takes away from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock import hardware


def test_the_machine_has_a_name_and_cores() -> None:
    assert hardware.cpu_name()
    assert hardware.num_usable_cores() > 0
    assert set(hardware.cpu_features()) <= set(hardware.CPU_FEATURES)


def test_available_memory_is_a_fact() -> None:
    assert 2**24 < hardware.available_memory_bytes() < 2**50


def test_a_quota_limits_the_cores(tmp_path: Path) -> None:
    cores, own = hardware._cgroup_cores, "0::/outer/inner\n"
    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    assert cores(tmp_path, own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert cores(tmp_path, own) is None
    (inner / "cpu.max").write_text("350000 100000\n")
    assert cores(tmp_path, own) == 3
    (tmp_path / "outer/cpu.max").write_text("200000 100000\n")
    assert cores(tmp_path, own) == 2, "the limits of those around it hold as well"
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cores(tmp_path, own) == 1
    assert cores(tmp_path, "") is None


def test_a_container_has_its_quota_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert hardware._cgroup_cores(tmp_path, "0::/\n") == 2
    assert hardware._cgroup_cores(tmp_path, "0::/not/to/be/seen\n") == 2


def test_an_old_cgroup_has_a_quota_too(tmp_path: Path) -> None:
    own = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n3:cpuset:/\n"
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert hardware._cgroup_cores(tmp_path, own) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert hardware._cgroup_cores(tmp_path, own) == 2


def test_a_container_limits_what_is_available(tmp_path: Path) -> None:
    left = hardware._cgroup_left_bytes
    assert left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert left(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert left(tmp_path) == 300
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 3\n")
    assert left(tmp_path) == 450
    (tmp_path / "memory.current").write_text("2000\n")
    assert left(tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nvidia0", True), ("dxg", True), ("nvidiactl", False), ("null", False)],
)
def test_a_gpu_shows_as_a_device(name: str, expected: bool, tmp_path: Path) -> None:
    assert not hardware.has_nvidia_device(tmp_path)
    (tmp_path / name).touch()
    assert hardware.has_nvidia_device(tmp_path) == expected


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_the_driver_has_a_version(kind: str, tmp_path: Path) -> None:
    told = tmp_path / "version"
    assert hardware.nvidia_driver(told) is None
    told.write_text(f"NVRM version: NVIDIA UNIX {kind}  570.86.15  Thu Jan 23 2025\nGCC version:")
    assert hardware.nvidia_driver(told) == "570.86.15"
