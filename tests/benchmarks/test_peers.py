"""The pure parts of the comparison with other engines, and its conversation with a fake worker."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import report
from benchmarks.peers.ceiling import Machine, ceilings, machine
from benchmarks.peers.cells import Cell, Figure, cells
from benchmarks.peers.client import Worker, WorkerFailed
from benchmarks.peers.environments import RECIPES, variables
from benchmarks.peers.protocol import Engine, Options, Segments, converse, draw, num_equal
from benchmarks.peers.rounds import Samples, Slot, measure
from benchmarks.peers.shapes import SHAPES, Shape, write_checkpoint

from penstock.models.files import read_config
from penstock.models.spec import ModelSpec

LLAMA = SHAPES["llama-3.2-1b"]
TINY = Shape(
    name="tiny",
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=64,
    max_len=64,
    rope_theta=10000.0,
    quantization_group=16,
)


def options(directory: Path) -> Options:
    return Options(
        checkpoint="",
        directory=str(directory),
        precision="bf16",
        group=32,
        num_threads=1,
        max_len=64,
        max_num_seqs=4,
        max_batched_tokens=64,
        kv_bytes=1 << 20,
        vocab_size=50,
        extra={},
    )


class TestShapes:
    def test_parameters_are_those_of_the_tensors(self) -> None:
        for shape in SHAPES.values():
            num_weights = sum(a * b for a, b in matrices(shape))
            assert num_weights == shape.linear_parameters + shape.head_parameters

    def test_llama_has_its_published_size(self) -> None:
        assert LLAMA.linear_parameters + LLAMA.head_parameters == pytest.approx(1235.8e6, rel=1e-3)

    def test_groups_divide_every_row(self) -> None:
        for shape in SHAPES.values():
            assert all(size % shape.quantization_group == 0 for _, size in matrices(shape))

    def test_a_checkpoint_can_be_read(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        directory = write_checkpoint(TINY, tmp_path)
        spec = ModelSpec.from_hf(read_config(directory))
        assert (spec.num_layers, spec.vocab_size, spec.dtype) == (2, 64, "bfloat16")
        tensors = load_file(directory / "model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(
            TINY.tensors()
        )
        assert tensors["model.norm.weight"].float().unique().tolist() == [1.0]
        assert tensors["model.embed_tokens.weight"].float().std().item() == pytest.approx(
            0.02, rel=0.1
        )

    def test_a_checkpoint_is_written_once(self, tmp_path: Path) -> None:
        path = write_checkpoint(TINY, tmp_path) / "model.safetensors"
        before = path.stat().st_mtime_ns
        write_checkpoint(TINY, tmp_path)
        assert path.stat().st_mtime_ns == before


def matrices(shape: Shape) -> list[tuple[int, int]]:
    return [(size[0], size[1]) for _, size in shape.tensors() if len(size) == 2]


class TestStatistics:
    def test_a_ratio_is_of_rounds_and_not_of_medians(self) -> None:
        ours, theirs = {0: 10.0, 1: 20.0, 2: 90.0}, {0: 5.0, 1: 10.0, 2: 30.0}
        assert report.ratio(ours, theirs, more_is_better=True) == 2.0

    def test_a_ratio_above_one_is_better_for_seconds_too(self) -> None:
        assert report.ratio({0: 1.0}, {0: 3.0}, more_is_better=False) == 3.0

    def test_a_round_that_only_one_has_is_left_out(self) -> None:
        assert report.ratio({0: 4.0, 1: 100.0}, {0: 2.0}, more_is_better=True) == 2.0

    def test_without_common_rounds_the_medians_are_compared(self) -> None:
        assert report.ratio({1: 4.0}, {0: 2.0}, more_is_better=True) == 2.0

    def test_the_best_peer_is_not_penstock(self) -> None:
        values = {"penstock": {0: 9.0}, "slow": {0: 1.0}, "fast": {0: 5.0, 1: 6.0}}
        assert report.best_peer(values, more_is_better=True) == "fast"
        assert report.best_peer(values, more_is_better=False) == "slow"
        assert report.best_peer({"penstock": {0: 9.0}}, more_is_better=True) is None

    def test_rows_hold_figures_or_reasons(self) -> None:
        cell = Cell({"speed": Figure("speed", "tok/s")}, None)
        samples = Samples()
        for round_, (ours, theirs) in enumerate([(8.0, 4.0), (6.0, 4.0), (7.0, 2.0)]):
            samples.add("speed", "penstock", round_, ours)
            samples.add("speed", "peer", round_, theirs)
        samples.fail("cell", "broken", "it broke")
        samples.fail("startup", "absent", "not installed")
        engines = ("penstock", "peer", "broken", "absent", "without this precision")
        found = report.rows("m", "bf16", {"cell": cell}, engines, samples, {"speed": 10.0})
        ours, theirs, broken, absent = found
        assert ours["median"] == 7.0
        assert (ours["min"], ours["max"], ours["samples"]) == (6.0, 8.0, [8.0, 6.0, 7.0])
        assert ours["ratio_to_best_peer"] == 2.0
        assert ours["fraction_of_ceiling"] == pytest.approx(0.7)
        assert theirs["ratio_to_best_peer"] == 1.0
        assert (broken["error"], absent["error"]) == ("it broke", "not installed")

    def test_a_later_run_replaces_what_it_measured(self, tmp_path: Path) -> None:
        def row(cell: str, value: float) -> report.Row:
            return {"model": "m", "precision": "bf16", "cell": cell, "median": value}

        path = tmp_path / "peers.json"
        runs, first = report.merged({"time": "1"}, [row("a", 1.0), row("b", 1.0)], path)
        path.write_text(json.dumps({"figures": {"runs": runs, "rows": first}}))
        runs, both = report.merged({"time": "2"}, [row("b", 2.0)], path)
        assert runs == [{"time": "1"}, {"time": "2"}]
        assert both == [row("a", 1.0) | {"run": "1"}, row("b", 2.0) | {"run": "2"}]
        assert report.merged({"time": "3"}, first, path)[0] == [{"time": "3"}]

    def test_a_table_tells_all_or_who_is_best(self) -> None:
        head = {"model": "m", "figure": "speed", "unit": "tok/s", "best_peer": "peer"}
        peer = head | {"precision": "bf16", "engine": "peer", "median": 4.0}
        ours = head | {"precision": "bf16", "engine": "penstock", "median": 8.0}
        ours |= {"ratio_to_best_peer": 2.0, "fraction_of_ceiling": 0.8}
        failed = head | {"precision": "int4", "engine": "penstock", "error": "no"}
        other = peer | {"precision": "int8"}
        text = report.table([ours, peer, other, failed], {"speed": "Speed"})
        assert (
            "| m | Speed | 8 tok/s, 80% of ceiling; 2.00x peer (4) | peer 4 tok/s | failed |"
            in (text)
        )

    def test_a_plot_is_drawn(self, tmp_path: Path) -> None:
        row = {
            "figure": "speed",
            "precision": "bf16",
            "engine": "peer",
            "unit": "s",
            "ceiling": 1.0,
        }
        row |= {"median": 2.0, "min": 1.0, "max": 3.0}
        report.plot("m", [row], {"speed": "Speed"}, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class TestCeiling:
    def test_a_machine_is_the_best_of_its_measurements(self) -> None:
        slow = {"read_gb_s": 20.0, "fp32_gflops": 400.0, "bf16_amx_gflops": 3000.0}
        fast = {"read_gb_s": 30.0, "fp32_gflops": 300.0, "int8_amx_gops": 100.0}
        assert machine([slow, fast]) == Machine(30.0, 3000.0, 3000.0)

    def test_llama_on_the_machine_of_the_field_notes(self) -> None:
        """Against the arithmetic that was done by hand there."""
        at = Machine(read_gb_s=32.0, bf16_gflops=6300.0, int8_gops=12500.0)
        batches = {"batch-16": (16, 256, 128)}
        bf16, int8, int4 = (
            ceilings(LLAMA, precision, at, batches) for precision in ("bf16", "int8", "int4")
        )
        assert bf16["decode-128"] == pytest.approx(12.9, rel=0.02)
        assert int8["decode-128"] == pytest.approx(25.9, rel=0.02)
        # There with 4.5 bits a weight; our own format takes fewer.
        assert int4["decode-128"] == pytest.approx(46.0 * 4.5 / 4.125, rel=0.02)
        assert bf16["prefill-1024"] == pytest.approx(3130, rel=0.02)
        assert bf16["prefill-2048"] == pytest.approx(3030, rel=0.02)
        assert int8["prefill-1024"] == pytest.approx(6010, rel=0.02)
        assert bf16["batch-16"] == pytest.approx(173, rel=0.03)

    def test_every_figure_of_a_model_that_is_timed_has_one(self) -> None:
        chosen = cells(quick=False)
        batches = {name: cell.batch for name, cell in chosen.items() if cell.batch is not None}
        found = ceilings(LLAMA, "bf16", Machine(30.0, 400.0, 800.0), batches)
        timed = {name for cell in chosen.values() if cell.measure for name in cell.figures}
        assert timed == found.keys()


class TestCells:
    @pytest.mark.parametrize("name", [n for n, c in cells(quick=False).items() if c.measure])
    def test_what_is_sent_and_what_comes_of_it(self, name: str) -> None:
        sent: list[Segments] = []

        def generate(prompts: list[Segments], num_tokens: int) -> list[list[float]]:
            sent.extend(prompts)
            return [[2.0 + 0.5 * n for n in range(num_tokens)] for _ in prompts]

        cell = cells(quick=False)[name]
        assert cell.measure is not None
        first = cell.measure(generate, "0")
        assert first.keys() == cell.figures.keys()
        num_sent = len(sent)
        cell.measure(generate, "1")
        again = [prompt for prompt in sent[num_sent:] if prompt in sent[:num_sent]]
        assert bool(again) == name.startswith("decode")
        expected = {"decode-128": 2.0, "prefill-1024": 512.0, "batch-16": 16 * 128 / 65.5}
        assert first.get(name) == pytest.approx(expected.get(name, first.get(name)))

    def test_a_shared_prefix_is_shared_and_the_rest_is_not(self) -> None:
        left = draw([("shared", 20), ("own 1", 10)], 1000)
        right = draw([("shared", 20), ("own 2", 10)], 1000)
        assert num_equal(left, right) == 20
        assert num_equal(left, left[:5]) == 5
        assert num_equal([], left) == 0


class FakeEngine(Engine):
    packages = ("pytest", "no-such-package")

    def load(self, options: Options) -> None:
        self.is_loaded = True

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        if num_tokens == 13:
            raise RuntimeError("unlucky")
        return [[0.0] * (num_tokens if num_tokens != 7 else 6) for _ in prompts]


class TestProtocol:
    def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        replies = io.StringIO()
        converse(FakeEngine(), io.StringIO("\n".join(map(json.dumps, requests))), replies)
        return [json.loads(line) for line in replies.getvalue().splitlines()]

    def test_versions_are_told(self, tmp_path: Path) -> None:
        raw = {name: getattr(options(tmp_path), name) for name in Options.__slots__}
        (reply,) = self.ask({"op": "load", "options": raw})
        versions = reply["result"]["versions"]
        assert versions == {"pytest": pytest.__version__, "no-such-package": "not installed"}

    def test_errors_are_answers(self) -> None:
        unlucky, short, unknown, good = self.ask(
            {"op": "generate", "prompts": [[]], "num_tokens": 13},
            {"op": "generate", "prompts": [[]], "num_tokens": 7},
            {"op": "nonsense"},
            {"op": "generate", "prompts": [[], []], "num_tokens": 2},
        )
        assert unlucky == {"error": "RuntimeError: unlucky"}
        assert "asked for 7 tokens, got [6]" in short["error"]
        assert "nonsense" in unknown["error"]
        assert [len(times) for times in good["result"]] == [2, 2]


SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "die":
        sys.exit("last words")
    if request["op"] == "sleep":
        time.sleep(60)
    reply = {"error": "no"} if request["op"] == "fail" else {"result": request}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker([sys.executable, "-c", SCRIPT], dict(os.environ), tmp_path / "log") as started:
        yield started


def is_paused(worker: Worker) -> bool:
    """Whether it is stopped soon: a signal takes a moment to arrive."""
    status = Path(f"/proc/{worker.pid}/stat")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if status.read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.001)
    return False


class TestWorker:
    def test_it_answers_and_is_paused_between(self, worker: Worker) -> None:
        assert worker.call("echo", limit_s=30, value=1) == {"op": "echo", "value": 1}
        assert is_paused(worker)
        assert worker.call("echo", limit_s=30, value=2)["value"] == 2

    def test_an_error_is_not_the_end(self, worker: Worker) -> None:
        with pytest.raises(WorkerFailed, match="no"):
            worker.call("fail", limit_s=30)
        assert worker.alive
        assert is_paused(worker)
        worker.call("echo", limit_s=30)

    def test_its_end_is_told_with_its_last_words(self, worker: Worker) -> None:
        with pytest.raises(WorkerFailed, match="ended with 1: last words"):
            worker.call("die", limit_s=30)
        assert not worker.alive
        with pytest.raises(WorkerFailed, match="ended"):
            worker.call("echo", limit_s=30)

    def test_it_is_not_waited_for_forever(self, worker: Worker) -> None:
        with pytest.raises(WorkerFailed, match="no answer within"):
            worker.call("sleep", limit_s=0.2)
        assert not worker.alive

    def test_its_memory_is_seen(self, worker: Worker) -> None:
        worker.call("echo", limit_s=30)
        assert worker.peak_rss_bytes() > 1 << 20


class FakeSlot(Slot):
    """An engine that answers at once, and fails where it is told to."""

    def __init__(self, engine: str, log: list[str], failing: str = "") -> None:
        self.engine = engine
        self.versions = {}
        self.log = log
        self.failing = failing

    def prepare(self) -> None:
        if self.failing == "prepare":
            raise WorkerFailed("cannot prepare")

    def start(self) -> float:
        self.log.append(f"start {self.engine}")
        return 30.0 if self.engine == "slow" else 1.0

    def generate(self, prompts: list[Segments], num_tokens: int) -> list[list[float]]:
        self.log.append(self.engine)
        if self.failing == "generate":
            raise WorkerFailed("cannot generate")
        return [[1.0] * num_tokens for _ in prompts]

    def peak_rss_bytes(self) -> int:
        return 1 << 30

    def close(self) -> None:
        self.log.append(f"close {self.engine}")


class TestRounds:
    def run(self, *slots: FakeSlot, patience_s: float = 60.0) -> Samples:
        known = cells(quick=True)
        chosen = {name: known[name] for name in ("startup", "prefill-1024", "rss")}
        return measure(list(slots), chosen, 3, patience_s)

    def test_engines_take_turns_forth_and_back(self) -> None:
        log: list[str] = []
        samples = self.run(FakeSlot("a", log), FakeSlot("b", log))
        assert [entry for entry in log if " " not in entry] == ["a", "b", "b", "a", "a", "b"]
        assert samples.values["prefill-1024"]["a"] == {0: 1024.0, 1: 1024.0, 2: 1024.0}
        assert samples.values["rss"] == {"a": {0: 1.0}, "b": {0: 1.0}}
        assert log[-2:] == ["close a", "close b"]

    def test_who_starts_slowly_starts_once(self) -> None:
        log: list[str] = []
        samples = self.run(FakeSlot("slow", log), FakeSlot("a", log))
        assert log.count("start slow") == 1
        assert log.count("start a") == 3
        assert samples.values["startup"]["slow"] == {0: 30.0}
        assert len(samples.values["prefill-1024"]["slow"]) == 3

    def test_a_failure_is_a_reason_and_the_others_go_on(self) -> None:
        log: list[str] = []
        samples = self.run(
            FakeSlot("a", log, "generate"), FakeSlot("b", log), FakeSlot("c", log, "prepare")
        )
        assert samples.failures["prefill-1024"] == {"a": "cannot generate"}
        assert samples.failures["startup"] == {"c": "cannot prepare"}
        assert log.count("a") == 1, "it is not asked again in this cell"
        assert "c" not in log
        assert len(samples.values["prefill-1024"]["b"]) == 3
        assert "a" in samples.values["rss"], "the next cell is tried"

    def test_patience_ends_after_a_sample(self) -> None:
        log: list[str] = []
        samples = self.run(FakeSlot("a", log), patience_s=0.0)
        assert samples.values["prefill-1024"]["a"] == {0: 1024.0}


class TestEnvironments:
    @pytest.mark.parametrize("engine", RECIPES)
    def test_every_placeholder_is_filled(self, engine: str, tmp_path: Path) -> None:
        told = variables(engine, tmp_path / "bin" / "python", [0, 3])
        own = {name: told[name] for name in RECIPES[engine].variables}
        assert not [value for value in own.values() if value in RECIPES[engine].variables.values()
                    and "{" in value]  # fmt: skip
        assert told["OMP_NUM_THREADS"] == "2"
        assert "LD_PRELOAD" not in told or Path(told["LD_PRELOAD"]).exists()

    def test_threads_are_bound_to_the_cores(self, tmp_path: Path) -> None:
        told = variables("llamacpp", tmp_path / "bin" / "python", [0, 3])
        assert told["OMP_PLACES"] == "{0},{3}"
