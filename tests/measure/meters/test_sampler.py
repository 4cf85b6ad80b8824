"""The thread that reads: fake counters, real processes, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from penstock.measure.meters.describe import describe
from penstock.measure.meters.energy import energy
from penstock.measure.meters.figures import memory_figures, meter_cost, meter_figures
from penstock.measure.meters.nvml import GpuReading
from penstock.measure.meters.sampler import Meters, Sampler, measure_idle
from penstock.measure.meters.series import phases
from penstock.measure.records import Mark, Sample
from penstock.measure.run import Run, Writer, new_header


class FakeGpus:
    """Two GPUs, of which the second tells its power only; the first is used by this process."""

    def __init__(self) -> None:
        self.names = ["NVIDIA L4", "NVIDIA X"]
        self.joules = 1000.0
        self.process_bytes = {os.getpid(): 300, 1: 9999}

    def read(self) -> list[GpuReading]:
        first = GpuReading(
            energy_mj=round(self.joules * 1000),
            power_w=70.0,
            used_bytes=20_000,
            utilization=0.5,
            process_bytes=self.process_bytes,
        )
        return [first, GpuReading(power_w=100.0, used_bytes=1)]


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_header("bench", settings={}, arms=[]), tmp_path / "run")


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    zone = tmp_path / "powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0")
    (zone / "energy_uj").write_text("10")
    (zone / "max_energy_range_uj").write_text("1000000000")
    return zone / "energy_uj"


def samples(writer: Writer, source: str, arm: str = "") -> list[Sample]:
    writer.close()
    return [
        record
        for record in Run(writer.path).records
        if isinstance(record, Sample) and (record.source, record.arm) == (source, arm)
    ]


def test_everything_is_read_and_becomes_figures(writer: Writer, counter: Path) -> None:
    gpus = FakeGpus()
    meters = Meters(powercap=counter.parent.parent, gpus=gpus)
    with Sampler(writer, {"a": os.getpid(), "far": None}, interval_s=0, meters=meters) as sampler:
        with sampler.phase("load", arm="a"):
            counter.write_text("50000010")
            gpus.joules += 30
            time.sleep(0.05)
        with sampler.phase("decode", arm="a"):
            counter.write_text("70000010")
            gpus.joules += 2
            time.sleep(0.05)
    writer.close()
    records = Run(writer.path).records
    load, decode = phases(records)
    assert (load.name, decode.name, load.arm) == ("load", "decode", "a")

    def by_part(begin_ns: int, end_ns: int) -> dict[str, float | None]:
        found = energy(records, "a", begin_ns, end_ns, {})
        return {part.component: part.joules_gross for part in found.parts}

    # Nearly all of what a phase took lies between its readings, which are at its ends.
    whole = by_part(load.begin_ns, decode.end_ns)
    assert whole["cpu"] == pytest.approx(70, rel=0.3)
    assert whole["gpu0"] == pytest.approx(32, rel=0.3)
    last = [record for record in records if isinstance(record, Sample)]
    assert [one for one in last if one.source == "rapl"][-1].values == {"package-0": 70.0}
    assert [one for one in last if one.source == "nvml" and not one.arm][-1].values == {
        "gpu0_j": 32.0,
        "gpu0_power_w": 70.0,
        "gpu0_used_bytes": 20_000,
        "gpu0_utilization": 0.5,
        "gpu1_power_w": 100.0,
        "gpu1_used_bytes": 1,
    }
    found = memory_figures(records, "a")
    assert found["peak_gpu_bytes"] == 300
    assert found["gpu_bytes_of"] == "processes of the arm"
    assert isinstance(found["peak_rss_bytes"], float)
    assert found["peak_rss_bytes"] > 2**20
    assert memory_figures(records, "far")["peak_rss_bytes"] is None
    assert meter_figures(records, {}, begin_ns=0, end_ns=decode.end_ns)["meter_cost"] is not None


def test_a_driver_that_names_other_pids_says_nothing_of_the_arm(writer: Writer) -> None:
    gpus = FakeGpus()
    gpus.process_bytes = {1: 9999}
    with Sampler(writer, {"a": os.getpid()}, interval_s=0, meters=Meters(gpus=gpus)):
        pass
    assert samples(writer, "nvml", "a") == []


def test_the_thread_reads_at_its_interval_and_ends(writer: Writer) -> None:
    num_threads = threading.active_count()
    meters = Meters(find_gpus=False)
    with Sampler(writer, {"a": os.getpid()}, interval_s=0.02, meters=meters):
        time.sleep(0.5)
    assert threading.active_count() == num_threads
    found = samples(writer, "proc", "a")
    assert 5 < len(found) <= 28
    assert sum("pss_bytes" in one.values for one in found) < len(found) / 2
    assert "pss_bytes" in found[-1].values


def test_what_reading_costs_is_measured(writer: Writer) -> None:
    # A process of its own: to read the pages of this one, which has run many tests, costs more.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with Sampler(writer, {"a": other.pid}, interval_s=0.05, meters=Meters(find_gpus=False)):
            time.sleep(0.3)
        other.communicate()
    writer.close()
    cost = meter_cost(Run(writer.path).records)
    assert cost is not None
    assert cost["reads"] > 2
    # At the default interval of 1 s this is the share of a core.
    assert 0 < cost["cpu_s"] / cost["reads"] < 0.01


@pytest.mark.anyio
async def test_idle_is_a_phase(writer: Writer, counter: Path) -> None:
    meters = Meters(powercap=counter.parent.parent, find_gpus=False)
    async with Sampler(writer, interval_s=0, meters=meters) as sampler:
        await measure_idle(sampler, 0.05)
    writer.close()
    records = Run(writer.path).records
    (idle,) = phases(records)
    assert idle.name == "idle"
    assert idle.duration_s >= 0.05
    assert [one.name for one in records if isinstance(one, Mark)] == ["idle.begin", "idle.end"]


def test_cpu_time_goes_on_over_a_restart(writer: Writer, tmp_path: Path) -> None:
    def put(pid: int, ticks: int) -> None:
        directory = tmp_path / "proc" / str(pid)
        directory.mkdir(parents=True, exist_ok=True)
        zeros = " ".join(["0"] * 10)
        (directory / "stat").write_text(f"{pid} (x) S {zeros} {ticks} 0 0 0 20 0 1 0 1")
        (directory / "statm").write_text("1 1 1")

    hz = os.sysconf("SC_CLK_TCK")
    meters = Meters(proc=tmp_path / "proc", find_gpus=False)
    sampler = Sampler(writer, {"a": 5}, interval_s=0, meters=meters)
    for pid, seconds in ((5, 10), (5, 12), (5, 11), (6, 1), (6, 4)):
        put(pid, seconds * hz)
        sampler.add("a", pid)
        sampler.read()
    sampler.remove("a")
    sampler.read()
    found = [one.values["cpu_s"] for one in samples(writer, "proc", "a")]
    assert found == [10, 12, 12, 13, 16, 16]


def test_what_there_is_is_told_with_reasons(tmp_path: Path, counter: Path) -> None:
    bare = describe(meters=Meters(proc=tmp_path, powercap=tmp_path, find_gpus=False))
    assert bare[0].startswith("RAPL: not readable: ")
    assert "no GPU is measured" in bare[1]
    assert "does not tell" in bare[2]
    settings = {
        "power": {
            "cpu": {"absent": "no table"},
            "gpus": [{"name": "NVIDIA X", "explanation": "70 W"}],
        },
        "carbon": {"explanation": "56 g/kWh"},
    }
    meters = Meters(powercap=counter.parent.parent, gpus=FakeGpus())
    assert [line for line in describe(settings, meters) if "GiB" not in line] == [
        "RAPL: package-0",
        "NVML: NVIDIA L4 (energy counter), NVIDIA X (power, integrated)",
        "CPU power without RAPL: absent: no table",
        "GPU power without NVML: NVIDIA X: 70 W",
        "CO2: 56 g/kWh",
    ]
