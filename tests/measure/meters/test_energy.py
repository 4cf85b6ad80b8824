"""Energy of windows from samples, with numbers that were worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.measure.meters.energy import energy, energy_of, per
from penstock.measure.meters.figures import memory_figures, meter_figures, phase_figures
from penstock.measure.meters.series import phases
from penstock.measure.records import Mark, Record, Sample

S = 1_000_000_000
MODEL: dict[str, Any] = {
    "cpu": {"busy_w": 100.0, "idle_w": None, "num_cpus": 4, "source": "t", "explanation": "TDP"},
    "ram": {"watts_per_gb": 0.5, "source": "a paper"},
    "gpus": [],
}


def samples(
    source: str, name: str, points: list[tuple[float, float]], arm: str = ""
) -> list[Record]:
    return [
        Sample(t_ns=int(t_s * S), arm=arm, source=source, values={name: value})
        for t_s, value in points
    ]


def marked(name: str, begin_s: float, end_s: float, arm: str = "") -> list[Record]:
    return [
        Mark(t_ns=int(begin_s * S), arm=arm, name=f"{name}.begin"),
        Mark(t_ns=int(end_s * S), arm=arm, name=f"{name}.end"),
    ]


# 30 W idle for 10 s, then 80 W for 20 s; memory 5 W all the time.
RAPL = [
    *samples("rapl", "package-0", [(0, 0), (10, 200), (30, 1000)]),
    *samples("rapl", "package-1", [(0, 0), (10, 100), (30, 900)]),
    *samples("rapl", "dram-0", [(0, 0), (10, 50), (30, 150)]),
]


def test_counters_are_measured_and_idle_is_subtracted() -> None:
    found = energy([*RAPL, *marked("idle", 0, 10)], None, 10 * S, 30 * S, {"power": MODEL})
    assert found.label == "measured"
    assert found.source == "rapl"
    cpu, ram = found.parts
    assert cpu.joules_gross == pytest.approx(1600)
    assert cpu.joules_net == pytest.approx(1600 - 30 * 20)
    assert (ram.joules_gross, ram.joules_net) == pytest.approx((100, 0))
    assert found.joules_gross == pytest.approx(1700)
    assert found.joules_net == pytest.approx(1000)
    assert found.duration_s == pytest.approx(20)


def test_a_window_between_readings_is_interpolated() -> None:
    found = energy(RAPL, None, 15 * S, 20 * S, {"power": MODEL})
    assert found.joules_gross == pytest.approx(80 * 5 + 5 * 5)
    assert found.joules_net is None
    assert "no idle phase" in found.explanation


def test_a_window_that_readings_do_not_cover_has_no_energy() -> None:
    found = energy(RAPL, None, 10 * S, 40 * S, {})
    assert found.joules_gross is None
    assert found.label == "absent"
    # Nearly covered: what is missing is at most a twentieth, and not made up.
    found = energy(RAPL, None, int(10.5 * S), int(30.5 * S), {})
    assert found.joules_gross == pytest.approx(85 * 19.5)


def test_nothing_known_is_absent_with_the_reason() -> None:
    settings = {"power": {**MODEL, "cpu": {"absent": "no power of the CPU: give --cpu-watts"}}}
    rows = samples("proc", "rss_bytes", [(0, 2e9), (10, 2e9)], "a")
    found = energy(rows, "a", 0, 10 * S, settings)
    assert found.joules_gross is None
    assert found.joules_net is None
    assert found.label == "absent"
    assert "--cpu-watts" in found.explanation
    assert [part.label for part in found.parts] == ["absent", "modelled"], "what is known is shown"
    assert energy([], None, 0, S, {}).label == "absent"


def test_a_server_elsewhere_does_not_get_the_clients_energy() -> None:
    rows = [*RAPL, *samples("proc", "cpu_s", [(0, 0), (30, 9)], "a")]
    found = energy(rows, "far", 10 * S, 30 * S, {"power": MODEL})
    assert found.joules_gross is None
    assert "--whole-machine" in found.explanation
    here = energy(rows, "far", 10 * S, 30 * S, {"power": {**MODEL, "whole_machine": True}})
    assert here.joules_gross == pytest.approx(1700)


def test_the_model_takes_the_time_of_the_process_tree() -> None:
    rows = [
        *samples("proc", "cpu_s", [(0, 5), (10, 17)], "a"),
        *samples("proc", "cpu_s", [(0, 0), (10, 40)], "b"),
        *samples("proc", "rss_bytes", [(0, 2e9), (10, 4e9)], "a"),
        *samples("machine", "busy_cpu_s", [(0, 0), (10, 20)]),
        *samples("machine", "used_bytes", [(0, 8e9), (10, 8e9)]),
    ]
    found = energy(rows, "a", 0, 10 * S, {"power": MODEL})
    cpu, ram = found.parts
    assert cpu.joules_gross == pytest.approx(100 * 12 / 4), "12 of 40 CPU seconds"
    assert cpu.joules_net is None
    assert "--idle-watts" in cpu.explanation
    assert ram.joules_gross == pytest.approx(3 * 0.5 * 10)
    assert found.label == "modelled"
    assert found.source == "model"
    assert found.joules_gross == pytest.approx(315)
    assert found.joules_net is None
    whole = energy(rows, "c", 0, 10 * S, {"power": {**MODEL, "whole_machine": True}})
    assert whole.joules_gross == pytest.approx(100 * 20 / 4 + 8 * 0.5 * 10)
    assert "whole machine" in whole.explanation


def test_the_users_idle_power_is_subtracted() -> None:
    rows = [
        *samples("proc", "cpu_s", [(0, 0), (10, 20)], "a"),
        *samples("proc", "rss_bytes", [(0, 0), (10, 0)], "a"),
    ]
    model = {**MODEL, "cpu": {**MODEL["cpu"], "busy_w": 120.0, "idle_w": 20.0}}
    found = energy(rows, "a", 0, 10 * S, {"power": model})
    # Half of the CPUs for 10 s: half of 100 W above idle, and idle all the time.
    assert found.joules_net == pytest.approx(500)
    assert found.joules_gross == pytest.approx(700)


def test_measured_and_modelled_are_not_mixed_silently() -> None:
    rows = [
        *samples("rapl", "package-0", [(0, 0), (10, 300)]),
        *samples("proc", "rss_bytes", [(0, 4e9), (10, 4e9)], "a"),
    ]
    found = energy(rows, "a", 0, 10 * S, {"power": MODEL})
    assert found.label == "measured and modelled"
    assert [(part.component, part.label) for part in found.parts] == [
        ("cpu", "measured"),
        ("ram", "modelled"),
    ]
    assert found.joules_gross == pytest.approx(300 + 4 * 0.5 * 10)
    assert "cpu: RAPL" in found.explanation
    assert "ram: a paper" in found.explanation


def test_gpus_count_by_counter_then_power_then_model() -> None:
    model = {
        **MODEL,
        "gpus": [{"name": "x", "absent": "unknown"}] * 2
        + [{"name": "x", "busy_w": 70.0, "explanation": "TDP"}],
    }
    rows = [
        *samples("rapl", "package-0", [(0, 0), (10, 0)]),
        *samples("rapl", "dram-0", [(0, 0), (10, 0)]),
        *samples("nvml", "gpu0_j", [(0, 0), (5, 1000), (10, 3000)]),
        *samples("nvml", "gpu0_power_w", [(0, 1), (10, 1)]),
        *samples("nvml", "gpu1_power_w", [(0, 100), (4, 300), (10, 300)]),
        *samples("nvml", "gpu2_utilization", [(0, 0.5), (10, 0.5)]),
    ]
    found = energy(rows, None, 0, 10 * S, {"power": model})
    assert {part.component: part.joules_gross for part in found.parts} == pytest.approx(
        {"cpu": 0, "ram": 0, "gpu0": 3000, "gpu1": 800 + 1800, "gpu2": 350}
    )
    assert found.label == "measured and modelled"
    assert found.source == "rapl + nvml + model"
    inner = energy(rows, None, 2 * S, 6 * S, {"power": model})
    # Power at 2 s is 200 W: 2 s of a mean of 250 W, 2 s of 300 W.
    assert inner.parts[3].joules_gross == pytest.approx(500 + 600)


def test_blocks_are_summed() -> None:
    rows = [*RAPL, *marked("idle", 0, 10)]
    found = energy_of(rows, None, [(10 * S, 14 * S), (20 * S, 26 * S)], {})
    assert found.joules_gross == pytest.approx(85 * 10)
    assert found.joules_net == pytest.approx(50 * 10)
    assert found.label == "measured"
    assert found.duration_s == pytest.approx(10)
    assert energy_of(rows, None, [(10 * S, 14 * S), (50 * S, 60 * S)], {}).joules_gross is None
    assert energy_of(rows, None, [], {}).joules_gross is None


def test_phases_have_their_energy() -> None:
    rows = [
        *RAPL,
        *marked("idle", 0, 10),
        *samples("proc", "rss_bytes", [(0, 1), (30, 1)], "a"),
        *marked("load", 10, 20, "a"),
        Mark(t_ns=25 * S, arm="a", name="decode.begin"),
    ]
    assert [one.name for one in phases(rows)] == ["idle", "load"], "decode never ended"
    idle, load = phase_figures(rows, {})
    assert idle["energy"]["joules_net"] == pytest.approx(0)
    assert load["energy"]["joules_gross"] == pytest.approx(850)
    assert (load["arm"], load["duration_s"]) == ("a", pytest.approx(10))


def test_memory_of_a_window_is_that_of_the_arm() -> None:
    rows: list[Record] = [
        Sample(
            t_ns=t_s * S,
            arm=arm,
            source="proc",
            values={"rss_bytes": rss, "hwm_bytes": hwm, "cpu_s": t_s / 2, "threads": 3},
        )
        for t_s, arm, rss, hwm in (
            (0, "a", 900, 900),
            (1, "a", 100, 900),
            (2, "b", 999, 999),
            (3, "a", 300, 950),
            (9, "a", 800, 960),
        )
    ]
    rows += samples("nvml", "gpu0_used_bytes", [(1, 5), (2, 70), (9, 90)])
    found = memory_figures(rows, "a", S, 3 * S)
    assert found["peak_rss_bytes"] == 300
    assert found["hwm_bytes"] == 950
    assert found["cpu_s"] == pytest.approx(1.0)
    assert (found["peak_gpu_bytes"], found["gpu_bytes_of"]) == (70, "whole GPUs")
    rows += samples("nvml", "gpu_bytes", [(2, 40)], "a")
    assert memory_figures(rows, "a", S, 3 * S)["peak_gpu_bytes"] == 40
    whole = memory_figures(rows, "a")
    assert whole["peak_rss_bytes"] == 900
    assert whole["cpu_s"] == pytest.approx(4.5)
    absent = memory_figures(rows, "c")
    assert absent["peak_rss_bytes"] is None
    assert absent["peak_gpu_bytes"] is None
    assert absent["why_none"]


def test_a_windows_figures_are_per_what_was_produced_in_it() -> None:
    settings = {
        "power": MODEL,
        "carbon": {"g_per_kwh": 360.0, "explanation": "here"},
        "machine_price": {"usd_per_hour": 1.8, "usd_per_kwh": 0.36},
    }
    found = meter_figures(
        [*RAPL, *marked("idle", 0, 10), *samples("proc", "rss_bytes", [(0, 1), (30, 1)], "a")],
        settings,
        arm="a",
        begin_ns=10 * S,
        end_ns=30 * S,
        num_output_tokens=3400,
        num_success=10,
    )
    assert found["energy"]["joules_per_output_token"] == pytest.approx(0.5)
    assert found["energy"]["joules_per_success"] == pytest.approx(170)
    assert found["energy"]["net_joules_per_success"] == pytest.approx(100)
    assert found["carbon"]["grams"] == pytest.approx(0.17), "1700 J are 0.472 Wh"
    # 20 s of 1.8 USD/h, and 1700 J of 0.36 USD/kWh.
    assert found["machine_cost"]["usd"] == pytest.approx(0.01 + 0.00017)
    assert found["machine_cost"]["usd_per_success"] == pytest.approx(0.001017)
    nothing = meter_figures([], {}, begin_ns=0, end_ns=S)
    assert nothing["energy"]["joules_per_success"] is None
    assert nothing["energy"]["explanation"]
    assert nothing["carbon"]["grams"] is None
    assert nothing["machine_cost"]["usd"] is None


def test_nothing_produced_is_no_division() -> None:
    assert per(10.0, 0) is None
    assert per(None, 5) is None
    assert per(10.0, 4) == 2.5
