"""Files of other tools: what each of their figures becomes under our names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.cli.results import FORMATS, command
from penstock.errors import ConfigError
from penstock.measure import metrics
from penstock.measure.results.importing import import_files
from penstock.measure.results.readers import READERS
from penstock.measure.run import Run
from penstock.measure.verify import verify

# By hand, after the documented shapes of the tools' files.
VLLM: dict[str, Any] = {
    "date": "20261101-120000",
    "backend": "openai-chat",
    "model_id": "org/model",
    "tokenizer_id": "org/model",
    "num_prompts": 3,
    "request_rate": 4.0,
    "burstiness": 1.0,
    "max_concurrency": 2,
    "duration": 2.5,
    "completed": 2,
    "failed": 1,
    "request_throughput": 0.8,
    "request_goodput": None,
    "output_throughput": 3.6,
    "input_lens": [5, 6, 7],
    "output_lens": [5, 4, 0],
    "ttfts": [0.25, 0.5, 0.0],
    "itls": [[0.1, 0.1, 0.2], [0.5], []],
    "latencies": [0.65, 1.0, 0.0],
    "start_times": [1000.0, 1000.5, 1001.0],
    "queue_times": [0.0, 0.125, 0.0],
    "generated_texts": ["one two", "three", ""],
    "errors": ["", "", "ClientConnectorError: refused"],
    "mean_ttft_ms": 375.0,
    "p99_tpot_ms": 166.7,
}

GUIDELLM: dict[str, Any] = {
    "args": {"target": "http://127.0.0.1:8000", "model": "org/model", "random_seed": 42},
    "benchmarks": [
        {
            "type_": "generative_benchmark",
            "config": {"strategy": {"type_": "constant", "rate": 2.0}},
            "metrics": {
                "request_totals": {"successful": 1, "errored": 1, "incomplete": 1, "total": 4},
                "time_to_first_token_ms": {
                    "successful": {"mean": 200.0, "median": 200.0, "pdf": [1, 2, 3]},
                    "errored": None,
                },
            },
            "requests": {
                "successful": [
                    {
                        "request_id": "a",
                        "output": "hello",
                        "info": {
                            "status": "completed",
                            "timings": {
                                "targeted_start": 99.9,
                                "request_start": 100.0,
                                "first_token_iteration": 100.2,
                                "first_output_token_iteration": 100.4,
                                "last_token_iteration": 101.0,
                                "request_end": 101.1,
                                "token_iterations": 3,
                            },
                        },
                        "input_metrics": {"text_tokens": 11, "cached_tokens": 8},
                        "output_metrics": {"text_tokens": 9, "total_tokens": 9},
                        "prompt_tokens": 11,
                        "output_tokens": 9,
                    }
                ],
                "incomplete": [
                    {"request_id": "b", "info": {"timings": {"request_start": 100.5}}},
                ],
                "errored": [
                    {
                        "request_id": "c",
                        "info": {"error": "500", "timings": {"request_start": 100.6}},
                    }
                ],
            },
        }
    ],
}

AIPERF: list[dict[str, Any]] = [
    {
        "metadata": {
            "x_request_id": "r1",
            "conversation_id": "c1",
            "turn_index": 0,
            "credit_issued_ns": 1_000_000_000_000_000_000,
            "request_start_ns": 1_000_000_000_020_000_000,
            "request_end_ns": 1_000_000_000_320_000_000,
            "benchmark_phase": "profiling",
            "was_cancelled": False,
        },
        "metrics": {
            "input_sequence_length": {"value": 550, "unit": "tokens"},
            "output_sequence_length": {"value": 9, "unit": "tokens"},
            "reasoning_token_count": {"value": 4, "unit": "tokens"},
            "time_to_first_token": {"value": 100.0, "unit": "ms"},
            "time_to_first_output_token": {"value": 150.0, "unit": "ms"},
            "request_latency": {"value": 300.0, "unit": "ms"},
            "inter_token_latency": {"value": 25.0, "unit": "ms"},
            "inter_chunk_latency": {"value": [50.0, 50.0, 100.0], "unit": "ms"},
        },
        "error": None,
    },
    {
        "metadata": {
            "request_start_ns": 1_000_000_000_500_000_000,
            "request_end_ns": 1_000_000_000_600_000_000,
            "benchmark_phase": "profiling",
        },
        "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
        "error": {"code": 429, "type": "TooManyRequests", "message": "slow down"},
    },
    {
        "metadata": {
            "request_start_ns": 1_000_000_000_700_000_000,
            "request_end_ns": 1_000_000_000_800_000_000,
            "was_cancelled": True,
        },
        "metrics": {},
        "error": {"code": 499, "type": "RequestCancellationError", "message": "cancelled"},
    },
]
AIPERF_FIGURES: dict[str, Any] = {
    "schema_version": "1.0",
    "aiperf_version": "0.13",
    "request_latency": {"unit": "ms", "avg": 300.0, "p99": 300.0},
    "inter_token_latency": {"unit": "ms", "avg": 25.0},
    "input_config": {"endpoint": {"model_names": ["org/model"], "url": "http://h"}},
    "start_time": "2026-11-01T12:00:00",
}

LM_RESULTS: dict[str, Any] = {
    "results": {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match,flexible": 1.0}
    },
    "versions": {"gsm8k": 3.0},
    "n-shot": {"gsm8k": 5},
    "configs": {"gsm8k": {}},
    "model_source": "local-completions",
    "model_name": "org/model",
    "date": 1767225600.0,
}
LM_SAMPLES = [
    {
        "doc_id": doc,
        "doc": {"question": "?"},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": "prompt"}},
        "resps": [[f"it is {doc}"]],
        "filtered_resps": ["4"],
        "filter": name,
        "metrics": ["exact_match", "bleu"],
        "doc_hash": f"d{doc}",
        "prompt_hash": f"p{doc}",
        "target_hash": "t",
        "exact_match": float(name == "flexible" or doc == 0),
        "bleu": ["a", "b"],
    }
    for name in ("strict", "flexible")
    for doc in (0, 1)
]


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(json.dumps(content, indent=2))
        return path

    return write


def test_vllm(put: Callable[[str, Any], Path]) -> None:
    path = put("vllm.json", VLLM)
    run = Run(import_files([path]))
    one, two, failed = run.requests
    assert metrics.ttft_s(one) == pytest.approx(0.25)
    assert metrics.e2e_s(one) == pytest.approx(0.65)
    assert metrics.tpot_s(one) == pytest.approx(0.4 / 4), "their TPOT: (latency - ttft) / (n - 1)"
    assert metrics.chunk_gaps_s(one) == pytest.approx([0.1, 0.1, 0.2]), "their ITL"
    assert metrics.queue_s(two) == pytest.approx(0.125)
    assert metrics.e2e_from_due_s(two) == pytest.approx(1.125)
    assert two.t_sent_ns == 500_000_000
    assert (two.n_in, two.n_out, two.output) == (6, 4, "three")
    assert failed.error_class == "server"
    assert "refused" in str(failed.error)
    assert failed.t_done_ns is None
    assert run.header.arms[0].model == "org/model"
    assert run.header.settings["source"]["all"]["p99_tpot_ms"] == 166.7
    assert "ttfts" not in run.header.settings["source"]["all"]
    assert run.header.settings["source_settings"]["all"]["max_concurrency"] == 2
    figures = run.figures()
    assert figures is not None
    (group,) = figures.figures["groups"]
    assert group["num_ok"] == 2
    assert group["errors"] == {"server": 1}
    assert group["output_tokens_per_s"] == pytest.approx(9 / 1.5)
    assert verify(run.path).files == {str(path): "unchanged"}


def test_vllm_without_rows_or_times(put: Callable[[str, Any], Path]) -> None:
    rows = ["input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times"]
    rows += ["queue_times", "generated_texts", "errors"]
    sums = {name: value for name, value in VLLM.items() if name not in rows}
    run = Run(import_files([put("sums.json", sums)]))
    assert not run.requests
    assert "--save-detailed" in run.header.settings["notes"][0]
    assert verify(run.path).ok
    old = {name: value for name, value in VLLM.items() if name not in rows[4:7]}
    run = Run(import_files([put("old.json", old)]))
    assert metrics.e2e_s(run.requests[0]) == pytest.approx(0.65), "to the last chunk"
    figures = run.figures()
    assert figures is not None
    assert figures.figures["groups"][0]["output_tokens_per_s"] is None, "nobody knows how long"


def test_vllm_appended_results_are_stages(put: Callable[[str, Any], Path], tmp_path: Path) -> None:
    path = tmp_path / "appended.json"
    path.write_text(json.dumps(VLLM) + "\n" + json.dumps(VLLM | {"max_concurrency": 8}) + "\n")
    run = Run(import_files([path]))
    stages = {row.stage for row in run.requests}
    assert stages == {"rate=4.0,concurrency=2", "rate=4.0,concurrency=8"}


def test_guidellm(put: Callable[[str, Any], Path]) -> None:
    run = Run(import_files([put("benchmarks.json", GUIDELLM)]))
    good, cut, failed = run.requests
    assert good.stage == "constant rate=2"
    assert metrics.queue_s(good) == pytest.approx(0.1)
    assert metrics.ttft_s(good) == pytest.approx(0.2)
    assert metrics.ttft_visible_s(good) == pytest.approx(0.4)
    assert metrics.tpot_s(good) == pytest.approx(0.1), "their inter_token_latency_ms"
    assert metrics.e2e_s(good) == pytest.approx(1.1)
    assert (good.n_in, good.n_cached, good.n_out, good.n_chunks) == (11, 8, 9, 3)
    assert cut.error_class == "cut"
    assert (failed.error_class, failed.error) == ("server", "500")
    source = run.header.settings["source"]["constant rate=2"]
    assert source["time_to_first_token_ms"] == {"mean": 200.0, "median": 200.0}
    assert any("holds 3 of 4 requests" in note for note in run.header.settings["notes"])
    assert run.header.arms[0].model == "org/model"


def test_guidellm_before_0_4(put: Callable[[str, Any], Path]) -> None:
    old = json.loads(json.dumps(GUIDELLM))
    old["benchmarks"][0]["requests"]["successful"] = [
        {
            "request_id": "a",
            "prompt_tokens": 3,
            "output_tokens": 5,
            "start_time": 100.0,
            "first_token_time": 100.5,
            "last_token_time": 101.3,
            "end_time": 101.5,
        }
    ]
    row = Run(import_files([put("benchmarks.json", old)])).requests[0]
    assert metrics.ttft_s(row) == pytest.approx(0.5)
    assert metrics.tpot_s(row) == pytest.approx(0.2)
    assert metrics.e2e_s(row) == pytest.approx(1.5)


def test_aiperf(put: Callable[[str, Any], Path]) -> None:
    files = [put("profile_export.jsonl", AIPERF), put("profile_export_aiperf.json", AIPERF_FIGURES)]
    run = Run(import_files(files))
    good, refused, cut = run.requests
    assert metrics.queue_s(good) == pytest.approx(0.02)
    assert metrics.ttft_s(good) == pytest.approx(0.1)
    assert metrics.ttft_visible_s(good) == pytest.approx(0.15)
    assert metrics.e2e_s(good) == pytest.approx(0.3)
    assert metrics.tpot_s(good) == pytest.approx(0.025), "their inter_token_latency"
    assert metrics.chunk_gaps_s(good) == pytest.approx([0.05, 0.05, 0.1])
    assert (good.n_in, good.n_out, good.n_reasoning, good.prompt_id) == (550, 9, 4, "c1")
    assert (refused.error_class, refused.http_status, refused.error) == (
        "http_429",
        429,
        "slow down",
    )
    assert cut.error_class == "cut"
    assert {row.model for row in run.requests} == {"org/model"}, "as the figures' file says"
    own = run.header.settings["source"]["profile_export_aiperf.json"]
    assert own["inter_token_latency"] == {"unit": "ms", "avg": 25.0}
    assert len(run.header.hashes) == 2


def test_lm_eval(put: Callable[[str, Any], Path], tmp_path: Path) -> None:
    put("samples_gsm8k_2026-11-01T12-00-00.123456.jsonl", LM_SAMPLES)
    put("results_2026-11-01T12-00-00.123456.json", LM_RESULTS)
    run = Run(import_files([tmp_path]))
    first, second = run.requests
    assert first.scores == {"exact_match,strict": 1.0, "exact_match,flexible": 1.0}
    assert second.scores == {"exact_match,strict": 0.0, "exact_match,flexible": 1.0}
    assert (first.task, first.prompt_id, first.prompt_hash) == ("gsm8k", "gsm8k/d0", "p0")
    assert second.output == "it is 1"
    assert {row.model for row in run.requests} == {"org/model"}
    figures = run.figures()
    assert figures is not None
    (group,) = figures.figures["groups"]
    theirs = LM_RESULTS["results"]["gsm8k"]
    for name, part in group["scores"]["gsm8k"].items():
        assert part == {"n": 2, "mean": theirs[name]}
    assert any("bleu is a figure of the whole corpus" in note for note in figures.figures["notes"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", {"a": 1}, "is of no tool that is known"),
        ("x.json", [], "is of no tool that is known"),
        ("x.json", "text", "is of no tool that is known"),
        ("vllm.json", VLLM | {"ttfts": [1.0]}, "different lengths"),
        ("aiperf.jsonl", [{"metadata": {"request_start_ns": 1}, "metrics": {"x": 3}}], None),
        ("g.json", {"benchmarks": [{"metrics": {}, "requests": {"successful": [5]}}]}, None),
    ],
)
def test_odd_files(
    put: Callable[[str, Any], Path], name: str, content: Any, message: str | None
) -> None:
    path = put(name, content)
    if message is None:
        assert len(Run(import_files([path])).requests) == 1
    else:
        with pytest.raises(ConfigError, match=message):
            import_files([path])


def test_refusals(put: Callable[[str, Any], Path], tmp_path: Path) -> None:
    vllm, guide = put("vllm.json", VLLM), put("benchmarks.json", GUIDELLM)
    with pytest.raises(ConfigError, match="several tools: guidellm, vllm-bench"):
        import_files([vllm, guide])
    with pytest.raises(ConfigError, match="does not look like a file of `aiperf`"):
        import_files([vllm], form="aiperf")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ConfigError, match=r"Line `2` of .* is no JSON"):
        import_files([broken])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no file of a known tool"):
        import_files([tmp_path / "empty"])


def test_command(put: Callable[[str, Any], Path]) -> None:
    assert set(FORMATS) == set(READERS)
    path = put("vllm.json", VLLM)
    done = CliRunner().invoke(command, ["import", str(path), "--json"])
    told = json.loads(done.stdout)
    assert told["problems"] == []
    assert told["figures"]["num_requests"] == 3
    assert Path(told["run"]).is_dir()
    done = CliRunner().invoke(command, ["show", Path(told["run"]).name])
    assert done.exit_code == 0, done.output
    assert "time to first token, p50" in done.output
    done = CliRunner().invoke(command, ["import", str(path)])
    assert "time to first token, p50" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("report: ")


@pytest.mark.parametrize("name", ["lepton_13b", "bedrock_70b", "anyscale_7b", "perplexity_70b"])
def test_published_quantiles_of_llmperf(data_dir: Path, name: str) -> None:
    """Real samples of 2023: our quantiles are the published ones; errors are rows."""
    folder = data_dir / "table-llmperf"
    run = Run(import_files([folder / "individual" / f"{name}.json"]))
    published = json.loads((folder / "summary" / f"{name}.json").read_bytes())
    figures = run.figures()
    assert figures is not None
    (group,) = figures.figures["groups"]
    assert group["num_ok"] == published["results_num_completed_requests"]
    assert sum(group["errors"].values()) == published["results_number_errors"]
    for ours, theirs in (("ttft_s", "ttft_s"), ("e2e_s", "end_to_end_latency_s")):
        for mark in ("p50", "p90", "p95", "p99"):
            expected = published[f"results_{theirs}_quantiles_{mark}"]
            assert group[ours][mark] == pytest.approx(expected, abs=2e-9)
        assert group[ours]["mean"] == pytest.approx(published[f"results_{theirs}_mean"], abs=2e-9)
