"""Rated power by name, and what is assumed where nothing is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.meters import power_table
from penstock.measure.meters.power_model import power_model, topology

# What Linux says of real machines, and watts and name in the published table.
REAL = [
    ("Intel(R) Xeon(R) CPU E5-2699 v3 @ 2.30GHz", "Intel Xeon E5-2699 v3", 145),
    ("12th Gen Intel(R) Core(TM) i7-12700K", "Intel Core i7-12700K", 190),
    ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763", 280),
    ("AMD Ryzen 7 5800H with Radeon Graphics", "AMD Ryzen 7 5800H", 45),
    ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "Intel Xeon Platinum 8370C", 205),
    ("INTEL(R) XEON(R) PLATINUM 8480+", "Intel Xeon Platinum 8480+", 350),
    ("Apple M1", "Apple M1", 10),
    ("Intel(R) Core(TM)2 Duo CPU     E8400  @ 3.00GHz", "Intel Core 2 Duo E8400", 65),
    ("AMD Ryzen Threadripper PRO 3995WX 64-Cores", "AMD Ryzen Threadripper PRO 3995WX", 280),
    ("AMD FX(tm)-8350 Eight-Core Processor", "AMD FX-8350", 125),
    ("Intel(R) Core(TM) Ultra 7 155H", "Intel Core Ultra 7 155H", 28),
    ("Intel(R) N100", "Intel N100", 6),
]
# Virtual machines and cloud editions that are no model of the table, however near one looks.
UNKNOWN = [
    ("AMD EPYC", "names no model"),
    ("Intel(R) Xeon(R) CPU @ 2.20GHz", "names no model"),
    ("AMD EPYC 9R14", "has no"),
    ("Intel(R) Xeon(R) Platinum 8488C", "has no"),
    ("QEMU Virtual CPU version 2.5+", "has no"),
    ("Intel(R) Celeron(R) 1000A", "27.29.5"),  # a slip in the published table
]
BARE = """processor : 0
model name\t: Made Up 1000 4-Core Processor
physical id\t: {0}
flags\t\t: fpu avx2{1}

processor : 1
model name\t: Made Up 1000 4-Core Processor
physical id\t: {2}
flags\t\t: fpu avx2{1}
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "table-power-carbon"
    folder.mkdir()
    cpus = "Name,TDP\nMade Up 1000,80.0\nTwo 5,10\nTwo  5,11\nSame 6,65.0\nSame 6 Processor,65\n"
    (folder / "cpu_power.csv").write_text(cpus)
    (folder / "gpus.csv").write_text("name,type,tdp_watts\nT4,gpu,70\n")
    return tmp_path


def cpuinfo(tmp_path: Path, packages: tuple[int, int] = (0, 0), flags: str = "") -> Path:
    file = tmp_path / "cpuinfo"
    file.write_text(BARE.format(packages[0], flags, packages[1]))
    return file


@pytest.mark.parametrize(("name", "entry", "watts"), REAL)
def test_real_names_are_found(data_dir: Path, name: str, entry: str, watts: float) -> None:
    found = power_table.cpu(name, power_table.directory(data_dir))
    assert (found.entry, found.watts) == (entry, watts)
    assert entry in found.explanation
    assert "cpu_power.csv (sha256 91f2d2c2b14b)" in found.source


@pytest.mark.parametrize(("name", "told"), UNKNOWN)
def test_near_names_are_not_taken(data_dir: Path, name: str, told: str) -> None:
    found = power_table.cpu(name, power_table.directory(data_dir))
    assert found.watts is None
    assert told in found.explanation


def test_gpus_are_found_by_what_nvml_calls_them(data_dir: Path) -> None:
    folder = power_table.directory(data_dir)
    names = {"Tesla T4": 70, "NVIDIA A100-SXM4-80GB": 400, "NVIDIA GeForce RTX 3090": 350}
    assert {name: power_table.gpu(name, folder).watts for name in names} == names
    assert power_table.gpu("NVIDIA H200", folder).watts is None


def test_entries_that_disagree_are_all_told(tables: Path) -> None:
    folder = power_table.directory(tables)
    found = power_table.cpu("Two 5", folder)
    assert found.watts is None
    assert "10 W" in found.explanation
    assert "11 W" in found.explanation
    assert power_table.cpu("same 6", folder).watts == 65
    assert "--tables" in power_table.cpu("Two 5", None).explanation


def test_a_table_without_its_columns_is_refused(tables: Path) -> None:
    (tables / "table-power-carbon/cpu_power.csv").write_text("A,B\n1,2\n")
    with pytest.raises(ConfigError, match="no columns `Name` and `TDP`"):
        power_table.cpu("Made Up 1000", power_table.directory(tables))


def test_rated_power_is_of_every_package(tables: Path, tmp_path: Path) -> None:
    one = power_model(tables=tables, cpuinfo=cpuinfo(tmp_path))["cpu"]
    assert (one["busy_w"], one["idle_w"], one["num_cpus"]) == (80, None, 2)
    assert "`Made Up 1000` with 80 W" in one["explanation"]
    assert power_model(tables=tables, cpuinfo=cpuinfo(tmp_path, (0, 1)))["cpu"]["busy_w"] == 160


def test_a_virtual_machine_has_an_unknown_share(tables: Path, tmp_path: Path) -> None:
    file = cpuinfo(tmp_path, flags=" hypervisor")
    found = topology(file)
    assert found is not None
    assert found.is_virtual
    assert found.num_cpus == 2
    assert "--chip-threads" in power_model(tables=tables, cpuinfo=file)["cpu"]["absent"]
    part = power_model(tables=tables, cpuinfo=file, chip_threads=16)["cpu"]
    assert part["busy_w"] == pytest.approx(10), "2 of 16 threads of 80 W"
    with pytest.raises(ConfigError, match="`--chip-threads` is `1`"):
        power_model(tables=tables, cpuinfo=file, chip_threads=1)


def test_the_users_figures_precede_the_table(tables: Path, tmp_path: Path) -> None:
    file = cpuinfo(tmp_path, flags=" hypervisor")
    found = power_model(
        tables=tables, cpuinfo=file, cpu_watts=30, idle_watts=4, gpu_watts=50, gpu_names=["T4"]
    )
    assert (found["cpu"]["busy_w"], found["cpu"]["idle_w"]) == (30, 4)
    assert found["cpu"]["explanation"].startswith("modelled from the user's figure: 30 W")
    assert found["gpus"][0]["busy_w"] == 50
    assert "user" in found["gpus"][0]["explanation"]
    table = power_model(tables=tables, cpuinfo=file, gpu_names=["Tesla T4", "X"])["gpus"]
    assert table[0]["busy_w"] == 70
    assert "absent" in table[1]


def test_idle_power_needs_busy_power(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--idle-watts` is `5`, without `--cpu-watts`"):
        power_model(idle_watts=5, cpuinfo=cpuinfo(tmp_path))
    with pytest.raises(ConfigError, match="more than `4`"):
        power_model(idle_watts=5, cpu_watts=4, cpuinfo=cpuinfo(tmp_path))


def test_no_table_and_no_figure_is_absent(tmp_path: Path) -> None:
    assert "--cpu-watts" in power_model(cpuinfo=cpuinfo(tmp_path))["cpu"]["absent"]
    assert "absent" in power_model(cpuinfo=tmp_path / "nowhere")["cpu"]
