"""Files of other tools: what their own rows say in passing, and is easily taken for something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.measure import metrics
from penstock.measure.quality.harness.rows import metric_of, rows_of
from penstock.measure.records import Request
from penstock.measure.results.importing import import_files
from penstock.measure.results.readers import aiperf, guidellm, lm_eval, vllm_bench
from penstock.measure.run import Run


def test_vllm_failed_without_a_word() -> None:
    """A status whose reason is empty: `errors` has "", and the time to first token is 0."""
    document = {"model_id": "m", "ttfts": [0.25, 0.0], "errors": ["", ""], "output_lens": [1, 0]}
    document |= {"itls": [[], []], "latencies": [0.25, 0.0], "start_times": [1.0, 1.0]}
    good, failed = vllm_bench.read(document, "f.json").requests
    assert (good.error_class, failed.error_class) == (None, "server")
    assert metrics.ttft_s(good) == pytest.approx(0.25)
    assert metrics.ttft_s(failed) is None


VLLM = {
    "model_id": "m",
    "request_throughput": 1.0,
    "completed": 3,
    "ttfts": [0.1, 0.1, 0.11],
    "itls": [[0.1], [0.1], [0.1]],
    "latencies": [0.3, 0.3, 0.3],
    "start_times": [1.0, 2.0, 3.0],
    "input_lens": [5, 5, 5],
    "output_lens": [2, 2, 2],
}
AIPERF = {"metadata": {"request_start_ns": 5, "request_end_ns": 9}, "metrics": {}}
LLMPERF = {"end_to_end_latency_s": 1.0, "ttft_s": 0.5, "number_output_tokens": 3}


def guidellm_row(**timings: Any) -> dict[str, Any]:
    row = {"request_id": "r1", "info": {"timings": timings}, "output_metrics": {"total_tokens": 2}}
    return {"benchmarks": [{"metrics": {}, "requests": {"successful": [row]}}]}


@pytest.mark.parametrize("value", ["x", -5, True, [1], {"a": 1}, float("nan"), 1e999, 10**400])
@pytest.mark.parametrize("name", ["ttfts", "latencies", "output_lens", "input_lens", "itls"])
def test_vllm_what_is_no_number_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    """Anything else would stand in a table as a time of 0, or as a negative one."""
    values = [*VLLM[name][:1], [value] if name == "itls" else value, *VLLM[name][2:]]  # type: ignore[index]
    path = tmp_path / "v.json"
    path.write_text(json.dumps(VLLM | {name: values}))
    with pytest.raises(ConfigError, match=f"`{name}` is `"):
        import_files([path], directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([LLMPERF | {"ttft_s": "0.5"}], "`ttft_s` is `0.5`, which is no number"),
        ([LLMPERF | {"end_to_end_latency_s": -1}], "`-1`, and no time is negative"),
        ([LLMPERF | {"number_output_tokens": 2.5}], "`2.5`, which counts nothing"),
        (
            [AIPERF | {"metrics": {"request_latency": {"value": -1, "unit": "ms"}}}],
            "`request_latency` is `-1`",
        ),
        (
            [AIPERF | {"metadata": {"request_start_ns": "5", "request_end_ns": 9}}],
            "`request_start_ns` is `5`, which is no number",
        ),
        ([AIPERF | {"metadata": {"request_start_ns": 5, "request_end_ns": 3}}], "a `e2e_s` of `-2"),
        (guidellm_row(request_start=100.0, request_end=99.0), "request `r1` has a `e2e_s` of `-1`"),
        (guidellm_row(request_start=100.0, request_end="soon"), "`timings` is `soon`"),
        (
            [{"doc_id": 0, "filtered_resps": [], "metrics": ["acc"], "acc": "high"}],
            "`acc` is `high`, which is no number",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_every_reader(
    tmp_path: Path, document: Any, message: str
) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        import_files([path])
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_null_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps(VLLM | {"latencies": [0.3, None, 0.3], "input_lens": [5, None, 5]}))
    row = Run(import_files([path], directory=tmp_path / "run")).requests[1]
    assert row.n_in is None
    assert row.t_done_ns == row.t_last_ns


def test_lm_eval_scores_that_are_no_numbers_are_told() -> None:
    sample = {"doc_id": 0, "filtered_resps": [], "metrics": ["acc"], "acc": float("nan")}
    made = lm_eval.read([sample, sample | {"doc_id": 1, "acc": 1.0}], "samples_t.jsonl")
    assert [row.scores for row in made.requests] == [{}, {"acc,none": 1.0}]
    assert made.notes == ["samples_t: 1 values of acc are no numbers."]


def test_a_file_counts_once(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(VLLM))
    for files in ([tmp_path / "a.json"] * 2, [tmp_path / "a.json", tmp_path / "b.json"]):
        with pytest.raises(ConfigError, match="are the same file"):
            import_files(files)


def test_aiperf_moments_keep_their_nanoseconds() -> None:
    start = 1_790_000_000_123_456_789
    about = {"request_start_ns": start, "request_end_ns": start + 1}
    (row,) = aiperf.read([{"metadata": about, "metrics": {}}], "f.jsonl").requests
    assert (row.t_sent_ns, row.t_done_ns) == (0, 1)


def test_vllm_does_not_know_when_text_came() -> None:
    """Its first chunk is any chunk, also one with a role or reasoning."""
    document = {"model_id": "m", "ttfts": [0.25], "itls": [[]], "errors": [""]}
    (row,) = vllm_bench.read(document, "f.json").requests
    assert metrics.ttft_s(row) == pytest.approx(0.25)
    assert metrics.ttft_visible_s(row) is None


@pytest.mark.parametrize(
    ("strategy", "queue_s"),
    [("constant", 0.1), ("poisson", 0.1), ("concurrent", None), ("throughput", None)],
)
def test_guidellm_has_due_times_where_there_is_a_schedule(
    strategy: str, queue_s: float | None
) -> None:
    times = {"targeted_start": 99.9, "request_start": 100.0, "request_end": 101.0}
    run = {
        "config": {"strategy": {"type_": strategy, "rate": 2.0, "streams": 4}},
        "metrics": {},
        "requests": {"successful": [{"request_id": "a", "info": {"timings": times}}]},
    }
    (row,) = guidellm.read({"benchmarks": [run]}, "f.json").requests
    assert metrics.e2e_s(row) == pytest.approx(1.0)
    assert metrics.queue_s(row) == (None if queue_s is None else pytest.approx(queue_s))


def test_guidellm_counts_reasoning() -> None:
    told = {"text_tokens": 5, "total_tokens": 9}
    run = {
        "metrics": {},
        "requests": {"successful": [{"output_metrics": told, "info": {"timings": {}}}]},
    }
    (row,) = guidellm.read({"benchmarks": [run]}, "f.json").requests
    assert row.n_out == 9


def test_aiperf_warm_up_and_cancellation() -> None:
    about = {"request_start_ns": 1, "request_end_ns": 5}
    rows = [
        {"metadata": about | {"benchmark_phase": "warmup"}, "metrics": {}},
        {"metadata": about | {"was_cancelled": True}, "metrics": {}},
    ]
    warm, cut = aiperf.read(rows, "f.jsonl").requests
    assert (warm.phase, cut.phase) == ("warmup", "steady")
    assert (warm.error_class, cut.error_class) == (None, "cut")


def test_aiperf_requests_are_read_once(tmp_path: Path) -> None:
    """Its directory has them as records, raw, and in slices of time."""
    about = {"metadata": {"request_start_ns": 1, "request_end_ns": 5}}
    raw = about | {"start_perf_ns": 1, "payload": {}, "responses": []}
    figures = {"request_latency": {"unit": "ms", "avg": 1.0}, "aiperf_version": "0.13"}
    for name, content in {
        "profile_export.jsonl": about | {"metrics": {}},
        "profile_export_raw.jsonl": raw,
        "profile_export_aiperf.json": figures,
        "profile_export_aiperf_timeslices.json": {"timeslices": []},
    }.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    run = Run(import_files([tmp_path]))
    assert len(run.requests) == 1
    assert sorted(Path(name).name for name in run.header.hashes) == [
        "profile_export.jsonl",
        "profile_export_aiperf.json",
    ]
    with pytest.raises(ConfigError, match="of no tool that is known"):
        import_files([tmp_path / "profile_export_raw.jsonl"])


def test_lm_eval_rows_pair_with_ours() -> None:
    """A document that is twice in a set, and a perplexity, which is a likelihood in each row."""
    samples: list[dict[str, Any]] = [
        {
            **dict.fromkeys(("target", "target_hash"), "t"),
            "doc_id": number,
            "doc_hash": "same",
            "prompt_hash": "p",
            "arguments": [["a", "b"]],
            "resps": [[[-1.5, True]]],
            "filtered_resps": [[-1.5, True]],
            "filter": "none",
            "metrics": ["perplexity", "acc"],
            "perplexity": -1.5,
            "acc": 1.0,
        }
        for number in range(2)
    ]
    known = {
        "perplexity,none": metric_of("perplexity", "none", "perplexity", False),
        "acc,none": metric_of("acc", "none", "mean", True),
    }
    name = "samples_lambada_2026-11-01T12-00-00.123456.jsonl"
    theirs = lm_eval.read(json.loads(json.dumps(samples)), name).requests
    ours = rows_of("lambada", samples, known)

    def told(row: Request) -> tuple[str, str, dict[str, float]]:
        return row.prompt_id, row.prompt_hash, row.scores

    assert [told(row) for row in theirs] == [told(row) for row in ours]
    assert [row.prompt_id for row in theirs] == ["lambada/same", "lambada/same#2"]
    assert theirs[0].scores == {"loglikelihood,none": -1.5, "acc,none": 1.0}
