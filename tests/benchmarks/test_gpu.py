"""The GPU benchmarks: their arithmetic, their driver, and each of them once at toy size."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import (
    engine,
    formats,
    kernels,
    lengths,
    machine,
    peers,
    prefix,
    processes,
    report,
    roofline,
    shapes,
    steps,
    trace,
)
from benchmarks.gpu import record as records
from benchmarks.gpu.device import Device, ceilings
from benchmarks.gpu.engines import decode, prompts
from benchmarks.gpu.engines import engine as make_engine
from benchmarks.gpu.workers import worker

LLAMA_1B = shapes.spec("llama-3.2-1b")
LLAMA_8B = shapes.spec("llama-3.1-8b")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> records.Options:
    """The options of a toy run: the references compute, results go to a temporary directory."""
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    options = records.Options()
    options.model, options.toy, options.results = "llama-3.2-1b", True, tmp_path
    return options


def written(directory: Path, name: str) -> dict[str, Any]:
    """A results file, whose figures hold together."""
    document: dict[str, Any] = json.loads((directory / f"gpu-{name}.json").read_text())
    assert document["finished"]
    assert document["toy"]
    for figure in figures_in(document["figures"]):
        samples = sorted(figure["samples"])
        assert len(samples) == figure["n"] > 0
        assert (samples[0], samples[-1]) == (figure["min"], figure["max"])
        assert all(math.isfinite(one) and one >= 0 for one in samples)
    return document


def figures_in(value: Any) -> list[dict[str, Any]]:
    """All figures at any depth; none of them an error."""
    if not isinstance(value, dict):
        return []
    assert "error" not in value, value["error"]
    found = [value] if "samples" in value else []
    return found + [figure for inner in value.values() for figure in figures_in(inner)]


def is_gone_soon(pid: int) -> bool:
    """Whether a process that was killed is gone, or waits for its parent to notice."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


class TestRoofline:
    """Against numbers computed by hand from the published shapes."""

    def test_llama_1b_reads_its_weights_once(self) -> None:
        # A block: qkv 3072 x 2048, output 2048 x 2048, gate, up and down 3 x 8192 x 2048.
        block = 3072 * 2048 + 2048 * 2048 + 3 * 8192 * 2048
        assert roofline.block_parameters(LLAMA_1B) == 16 * block == 973_078_528
        assert roofline.head_parameters(LLAMA_1B) == 128256 * 2048 == 262_668_288
        norms = (2 * 16 + 1) * 2048
        assert roofline.weight_bytes(LLAMA_1B) == 2 * (973_078_528 + 262_668_288 + norms)
        assert roofline.weight_bytes(LLAMA_1B) == pytest.approx(2.4716e9, rel=1e-4)

    def test_the_embedding_of_an_untied_model_is_not_read(self) -> None:
        params = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096) + 128256 * 4096
        assert roofline.weight_bytes(LLAMA_8B) == 2 * (params + 65 * 4096)
        assert LLAMA_8B.num_parameters == params + 128256 * 4096 + 65 * 4096 == 8_030_261_248

    def test_decode_reads_keys_and_values_of_every_request(self) -> None:
        # 16 layers, keys and values of 8 heads of 64 numbers of 2 bytes: 32 KiB a token.
        without = roofline.decode_bytes(LLAMA_1B, batch=4, context=0)
        assert roofline.decode_bytes(LLAMA_1B, batch=4, context=100) - without == 4 * 100 * 32768
        fp8 = roofline.decode_bytes(LLAMA_1B, batch=1, context=10, kv_dtype="fp8")
        assert fp8 - without == 10 * 16 * 2 * 8 * (64 + 4)

    def test_quantized_weights_are_smaller_by_what_they_say(self) -> None:
        full = roofline.weight_bytes(LLAMA_8B)
        assert roofline.weight_bytes(LLAMA_8B, "int8-a16") / full == pytest.approx(0.5, rel=0.01)
        # 4 bits and a byte for 32 of them: 4.25 of 16.
        assert roofline.weight_bytes(LLAMA_8B, "int4-a16") / full == pytest.approx(0.2656, rel=0.01)

    def test_decode_operations(self) -> None:
        linear = 2 * (973_078_528 + 262_668_288)
        attention = 4 * 16 * 32 * 64 * 1000  # two products, two operations each
        assert roofline.decode_flops(LLAMA_1B, batch=3, context=1000) == 3 * (linear + attention)

    def test_prefill_operations_are_a_sum_over_tokens(self) -> None:
        num_tokens = 5
        linear = 2 * 973_078_528 * num_tokens + 2 * 262_668_288
        attention = sum(4 * 16 * 32 * 64 * seen for seen in range(1, num_tokens + 1))
        assert roofline.prefill_flops(LLAMA_1B, num_tokens) == linear + attention

    def test_a_figure_is_its_bytes_over_its_time(self, toy: records.Options) -> None:
        spec, sizes = shapes.spec("toy"), engine.TOY
        with make_engine("toy", max_num_seqs=3, max_model_len=256, num_blocks=64) as core:
            found = engine.decode_figure(core, spec, engine.Rates(1e9, 1e12), 3, sizes)
        # The prompts, the first token of each, a window to warm up, half of what was measured;
        # requests that prefilled first were ahead of the last.
        least = sizes.context + 1 + sizes.window + sizes.num_windows * sizes.window / 2
        assert least <= found["context"] < least + 3
        num_bytes = roofline.decode_bytes(spec, batch=3, context=found["context"])
        step_s = 3 / found["median"]
        assert found["fraction_of_copy_bandwidth"] == pytest.approx(num_bytes / step_s / 1e9)


class TestLengths:
    def test_drawn_lengths_are_distributed_as_the_trace(self) -> None:
        drawn = lengths.drawn(20_000, seed=1)
        inputs, outputs = (sorted(column) for column in zip(*drawn, strict=True))
        assert sum(inputs) / 20_000 == pytest.approx(1154.7, rel=0.03)
        assert sum(outputs) / 20_000 == pytest.approx(211.1, rel=0.03)
        assert inputs[10_000] == pytest.approx(1020, rel=0.03)
        assert outputs[10_000] == pytest.approx(129, rel=0.05)
        assert (inputs[0] >= 2, inputs[-1] <= 14050, outputs[0] >= 7) == (True, True, True)
        assert drawn[:9] == lengths.drawn(9, seed=1) != lengths.drawn(9, seed=2)

    def test_quantiles_are_those_of_the_trace(self, data_dir: Path) -> None:
        import numpy as np

        taken = lengths.take(19_366, data_dir / lengths.TRACE)
        real = np.array(taken.requests)
        for column, values in enumerate((lengths._PROMPTS, lengths._ANSWERS)):
            found = np.quantile(real[:, column], lengths._AT)
            assert np.abs(found - np.array(values)).max() < 1

    def test_a_file_is_read_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "lengths.csv"
        file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\na,374,44\nb,396,109\nc,9,1\n")
        taken = lengths.take(2, file)
        assert taken.requests == [(374, 44), (396, 109)]
        assert taken.num_tokens == 374 + 44 + 396 + 109
        assert "lengths.csv" in taken.source
        with pytest.raises(ValueError, match="3 requests"):
            lengths.take(4, file)

    def test_without_a_trace_they_are_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PENSTOCK_DATA", "/nonexistent")
        assert "drawn" in lengths.take(3).source


class TestRecord:
    def test_what_was_measured_stays_when_it_breaks_off(self, toy: records.Options) -> None:
        def breaks_off() -> None:
            with records.Record("broken", toy) as record:
                record.add("speed", records.figure([3.0, 1.0, 2.0], "tokens/s", batch=4))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            breaks_off()
        document = json.loads((toy.results / "gpu-broken.json").read_text())
        assert not document["finished"]
        assert document["figures"]["speed"] == {
            "unit": "tokens/s",
            "median": 2.0,
            "min": 1.0,
            "max": 3.0,
            "n": 3,
            "samples": [3.0, 1.0, 2.0],
            "batch": 4,
        }

    def test_a_figure_that_fails_is_a_row_and_no_end(self, toy: records.Options) -> None:
        with records.Record("failing", toy) as record:
            with record.attempt("first"):
                raise ValueError("it cannot\nbe")
            with record.attempt("second") as add:
                add(records.figure([1.0], "s"))
        assert record.num_failed == 1
        figures = json.loads(record.path.read_text())["figures"]
        assert figures["first"] == {"error": "ValueError: it cannot be"}
        assert figures["second"]["median"] == 1.0

    def test_toy_results_go_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PENSTOCK_KERNELS", raising=False)
        made = records.parser("")
        assert records.parse(made, []).results == records.RESULTS
        assert records.parse(made, ["--toy"]).results == records.TOY_RESULTS


class TestToy:
    """Each benchmark from end to end, on the CPU."""

    def test_ceilings(self) -> None:
        found = ceilings(Device(toy=True))
        assert found["copy_gb_s"]["median"] > 0
        assert found["matmul_tflop_s"]["n"] == 3

    def test_engine(self, toy: records.Options) -> None:
        assert engine.measure(toy, engine.TOY) == 0
        figures = written(toy.results, "engine-toy")["figures"]
        batches = [f"decode-{batch}" for batch in engine.TOY.batches]
        assert {*batches, "prefill-40", "overhead-2", "startup", "ceilings"} <= set(figures)
        assert figures["overhead-2"]["step_us"]["n"] == engine.TOY.num_steps
        assert sum(figures["startup"]["phases"].values()) == figures["startup"]["median"] > 0
        planned = figures["memory"]["planned"]
        assert planned["kv_bytes"] == 64 * planned["block_bytes"] > 0

    def test_kernels(self, toy: records.Options) -> None:
        assert kernels.measure(toy, kernels.TOY) == 0
        figures = written(toy.results, "kernels")["figures"]
        assert {"attention decode, 2 x 20, int8", "product int8-a16, gate and up, 2"} <= set(
            figures
        )
        down = figures["product bfloat16, down, 1"]
        assert down["bytes"] == 2 * (32 * 64 + 64 + 32)
        assert down["flops"] == 2 * 32 * 64
        norm = figures["norm, 2"]
        assert norm["bytes"] == 2 * 4 * shapes.spec("toy").hidden_size * 2
        seconds = norm["median"] / 1e6
        assert norm["gb_s"] == pytest.approx(norm["bytes"] / seconds / 1e9)

    def test_trace(self, toy: records.Options) -> None:
        assert trace.measure(toy, trace.TOY) == 0
        found = written(toy.results, "trace-toy")["figures"]["throughput"]
        assert found["total"]["n"] == trace.TOY.num_runs
        assert found["total"]["median"] > found["output"]["median"]

    def test_prefix(self, toy: records.Options) -> None:
        assert prefix.measure(toy, prefix.TOY) == 0
        figures = written(toy.results, "prefix-toy")["figures"]
        assert figures["shared-0%"]["hit_rate"] == 0
        assert figures["shared-90%"]["hit_rate"] > 0.4

    @pytest.mark.parametrize("kind", formats.FORMATS)
    def test_formats(self, toy: records.Options, kind: str) -> None:
        assert formats.measure(toy, kind, formats.TOY[kind]) == 0
        figures = written(toy.results, f"formats-{kind}-toy")["figures"]
        assert set(figures) == {"ceilings", *formats.FORMATS[kind]}

    def test_a_request_that_ends_early_is_an_error(self, toy: records.Options) -> None:
        with make_engine("toy", max_num_seqs=2, max_model_len=24, num_blocks=64) as core:
            work = prompts(random.Random(0), 2, 20, core.info.vocab_size)
            with pytest.raises(RuntimeError, match="tokens in 4 steps"):
                decode(core, work, num_windows=2, window=4)
            assert not core.has_work

    def test_the_host_is_not_charged_for_the_device(self, toy: records.Options) -> None:
        device = Device(toy=True)
        with make_engine("toy", max_num_seqs=2, max_model_len=256, num_blocks=64) as core:
            runner = core._runner
            found = steps.overhead(core, device, num_running=2, prompt_len=8, num_steps=3)
            assert core._runner is runner
        assert found["host_us"]["median"] < found["step_us"]["median"]


class TestPeers:
    def test_who_is_missing_has_a_reason(
        self, toy: records.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Nor are these on a machine that has just a GPU: our own row must not need them.
        refuse = "import sys\nfor name in ('msgspec', 'starlette', 'uvicorn', 'vllm', 'sglang'):\n"
        (tmp_path / "sitecustomize.py").write_text(f"{refuse}    sys.modules[name] = None\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        taken = lengths.Lengths([(5, 3), (9, 2)], "two")
        engines = ("penstock", "vllm", "sglang")
        assert peers.measure(toy, taken, engines, {}, limit_s=60) == 0
        document = json.loads((toy.results / "gpu-peers-toy.json").read_text())
        ours = document["figures"]["penstock"]
        assert set(ours) == {"load", "decode-1", "decode-2", "prefill-32", "trace"}
        assert ours["trace"]["num_requests"] == 2
        for engine_ in ("vllm", "sglang"):
            assert document["figures"][engine_] == {"error": f"{engine_} is not installed"}

    def test_a_step_is_the_difference_of_two_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [0.0]

        class Fake(worker.Engine):
            """Takes 10 s for a prompt and 2 s for every token behind the first."""

            max_requests = 1

            def load(self, job: worker.Job) -> None: ...

            def generate(self, work: worker.Work) -> None:
                clock[0] += 10 + 2 * (max(num_output for _, num_output in work) - 1)

        monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
        job = worker.Job(
            directory="",
            vocab_size=10,
            toy=True,
            batches=(3,),
            context=4,
            num_steps=5,
            prefills=(20,),
            num_rounds=2,
            requests=((6, 2), (7, 9)),
            max_num_seqs=3,
            max_num_batched_tokens=8,
            max_model_len=32,
        )
        found = dict(worker.cells(Fake(), job))
        assert found["decode-3"]["samples"] == pytest.approx([1.5, 1.5])  # 3 tokens in 2 s
        assert found["prefill-20"]["samples"] == [2.0, 2.0]
        assert found["trace"] == {"samples": [8 / 12], "num_requests": 1}


class TestReport:
    def test_what_is_there_is_told_and_the_rest_waits(self, tmp_path: Path) -> None:
        empty = report.text(tmp_path)
        assert "- Llama-3.1-8B, decode, 1 request\n" in empty
        assert "|" not in empty
        assert "has not run" in empty
        gpu = {"device": "GPU", "driver": "1.2", "torch": "2.9", "triton": "3.5"}
        speed = {"median": 321.4, "unit": "tokens/s", "fraction_of_copy_bandwidth": 0.871}
        document = {
            "environment": {"commit": "abc", "gpu": gpu},
            "figures": {"decode-1": speed, "decode-64": {"error": "it broke"}},
        }
        (tmp_path / "gpu-engine-llama-3.1-8b.json").write_text(json.dumps(document))
        line = {"time": "now", "commit": "abc", "device": "GPU", "passed": 3}
        line |= {"failed": 1, "skipped": 0}
        (tmp_path / "gpu-tests.jsonl").write_text("{}\n" + json.dumps(line) + "\n")
        told = report.text(tmp_path)
        row = "| Llama-3.1-8B, decode, 1 request | 321 tokens/s, 87% of the copy bandwidth | 85 % |"
        assert row in told
        assert "- Llama-3.1-8B, decode, 1 request\n" not in told
        assert "- Llama-3.1-8B, decode, 64 requests\n" in told
        assert "GPU, driver 1.2, torch 2.9, Triton 3.5, commit abc" in told
        assert "commit abc, on GPU: 3 passed, 1 failed, 0 skipped" in told

    def test_every_figure_that_is_wanted_is_measured(self) -> None:
        files = {one.name for one in driver.BENCHMARKS}
        assert {wanted.file for wanted in report.WANTED} <= files
        cases = dict(kernels.all_cases(torch.device("cpu"), "llama-3.1-8b", kernels.GPU))
        for wanted in report.WANTED:
            if wanted.file == "kernels":
                assert wanted.path[0] in cases


class TestDriver:
    def test_a_hang_and_a_failure_lose_nothing(self, tmp_path: Path) -> None:
        def fake(name: str, code: str, limit_s: float) -> processes.Ended:
            return processes.run(
                [sys.executable, "-c", code],
                environment={},
                log=tmp_path / f"{name}.log",
                limit_s=limit_s,
                on_line=lines.append,
            )

        lines: list[str] = []
        hang = fake("hang", "import time; print('began', flush=True); time.sleep(60)", 0.5)
        assert hang.problem == "stopped after its 0 s"
        assert hang.seconds < 5
        fails = fake("fails", "raise SystemExit('it is broken')", 20)
        assert fails.problem == "ended with status 1: it is broken"
        assert fake("good", "print('done')", 20).problem is None
        assert lines == ["began", "done"]

    def test_what_a_process_started_ends_with_it(self, tmp_path: Path) -> None:
        code = (
            "import subprocess, sys; "
            "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
        )
        lines: list[str] = []
        ended = processes.run(
            [sys.executable, "-c", code + "; sys.stdout.flush(); import time; time.sleep(60)"],
            environment={},
            log=tmp_path / "log",
            limit_s=0.7,
            on_line=lines.append,
        )
        assert ended.problem is not None
        assert is_gone_soon(int(lines[0]))

    def test_with_no_time_left_none_is_begun(self, tmp_path: Path) -> None:
        todo = [(one, []) for one in driver.BENCHMARKS]
        rows = driver.run_all(todo, {}, tmp_path, budget_s=1.0)
        assert {row["problem"] for row in rows} == {"no time was left"}
        assert [row["name"] for row in rows] == [one.name for one in driver.BENCHMARKS]

    def test_one_that_fails_is_told_and_the_next_one_runs(self, tmp_path: Path) -> None:
        todo = [
            (driver.Benchmark("bad", "there_is_none", (), 20), ["--toy"]),
            (driver.Benchmark("good", "lengths", (), 20), []),
        ]
        root = Path(driver.__file__).parents[2]
        rows = driver.run_all(todo, {"PYTHONPATH": str(root)}, tmp_path, budget_s=60.0)
        assert "No module named benchmarks.gpu.there_is_none" in rows[0]["problem"]
        assert [row["problem"] for row in rows[1:]] == [None]

    def test_options_reach_those_that_take_them(self, toy: records.Options) -> None:
        toy.only, toy.limit = None, 9.0
        toy.lengths, toy.vllm_site, toy.sglang_site = Path("l.csv"), Path("v"), None
        found = {one.module: driver.arguments_of(one, toy) for one in driver.chosen(toy)}
        assert set(found) == {"engine", "kernels", "peers", "trace", "prefix", "formats"}
        assert "--toy" in found["engine"]
        assert "--vllm-site" in found["peers"]
        assert "--lengths" in found["trace"]
        assert "--lengths" not in found["engine"]
        assert "--sglang-site" not in found["peers"]

    def test_the_whole_suite_fits_into_its_budget(self) -> None:
        makefile = (Path(driver.__file__).parents[2] / "Makefile").read_text()
        values = dict(
            line.split(" ?= ") for line in makefile.splitlines() if "_SECONDS ?= " in line
        )
        assert int(values["GPU_TEST_SECONDS"]) + int(values["GPU_BENCH_SECONDS"]) <= 8 * 60 - 10

    def test_without_a_gpu_it_says_so(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(machine, "problem", lambda: "torch finds none")
        assert machine.main() == machine.NO_GPU == 69
        sentence = capsys.readouterr().out.strip()
        assert sentence == "There is no GPU here that torch can use: torch finds none."
        monkeypatch.setattr(machine, "ask", lambda *told: sentence)
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
        assert driver.main() == machine.NO_GPU
        assert sentence in capsys.readouterr().err
