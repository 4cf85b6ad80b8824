"""What the machine says of itself, and what a container takes away from it."""

from __future__ import annotations

from pathlib import Path

from penstock import hardware


def test_the_machine_has_a_name_and_cores() -> None:
    assert hardware.cpu_name()
    assert hardware.num_usable_cores() > 0
    assert set(hardware.cpu_features()) <= set(hardware.CPU_FEATURES)


def test_available_memory_is_a_fact() -> None:
    assert 2**24 < hardware.available_memory_bytes() < 2**50


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
