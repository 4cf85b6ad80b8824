"""RAPL counters in directories that look like Linux's powercap."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.measure.meters.rapl import Rapl

RANGE_UJ = 262_143_328_850


def put_zone(powercap: Path, directory: str, name: str, uj: int, range_uj: int = RANGE_UJ) -> Path:
    zone = powercap / directory
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(name + "\n")
    (zone / "energy_uj").write_text(f"{uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone / "energy_uj"


def test_packages_and_their_memory_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl").mkdir()
    first = put_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    put_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    memory = put_zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    second = put_zone(tmp_path, "intel-rapl:1", "package-1", 0)
    other = put_zone(tmp_path, "intel-rapl:1:0", "dram", 0)
    put_zone(tmp_path, "intel-rapl:2", "psys", 0)
    same = put_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    rapl = Rapl(tmp_path)
    assert [zone.name for zone in rapl.zones] == ["package-0", "dram-0", "package-1", "dram-1"]
    for file, uj in ((first, 7_500_000), (memory, 1_000_007), (second, 40), (other, 60)):
        file.write_text(str(uj))
    same.write_text("999999999")
    assert rapl.read_j() == pytest.approx(
        {"package-0": 2.5, "dram-0": 1.0, "package-1": 40e-6, "dram-1": 60e-6}
    )
    assert rapl.why == ""


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    file = put_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 3_000_000)
    rapl = Rapl(tmp_path)
    assert rapl.read_j() == {"package-0": 0}
    file.write_text(str(1_000_000))
    assert rapl.read_j()["package-0"] == pytest.approx(4.0)
    file.write_text(str(2_000_000))
    assert rapl.read_j()["package-0"] == pytest.approx(5.0)
    file.write_text(str(500_000))
    assert rapl.read_j()["package-0"] == pytest.approx(5.0 + RANGE_UJ * 1e-6 - 1.5)


def test_a_reading_that_fails_is_made_up_for(tmp_path: Path) -> None:
    file = put_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    rapl = Rapl(tmp_path)
    file.write_text("")
    assert rapl.read_j() == {"package-0": 0}
    file.write_text("3000000")
    assert rapl.read_j() == pytest.approx({"package-0": 3.0})


def test_no_counter_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no counters" in Rapl(tmp_path).why
    put_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read_text = Path.read_text

    def refuse(self: Path, *args: str) -> str:  # root may read everything, whatever its mode
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(self, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    rapl = Rapl(tmp_path)
    assert rapl.zones == []
    assert "root only" in rapl.why
    assert "energy_uj" in rapl.why
