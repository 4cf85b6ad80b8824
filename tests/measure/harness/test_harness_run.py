"""Whole evaluations: rows, marks, and figures that are made of the rows again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.model import LM
from lm_eval.models.api_models import JsonChatStr

from penstock.errors import ConfigError, EngineError
from penstock.measure.quality.harness import run, tasks
from penstock.measure.quality.harness.access import Access
from penstock.measure.quality.harness.rows import (
    Metric,
    metric_of,
    result_of,
    results_of,
    rows_of,
)
from penstock.measure.records import Record, Request

TASKS = ["arc_easy", "truthfulqa_mc1", "truthfulqa_mc2", "lambada_openai", "gsm8k"]


def test_rows_give_the_harness_own_numbers(access: Access, sink: Any, data_dir: Path) -> None:
    plan = run.prepare(
        TASKS, limit=3, num_fewshot=1, gen_kwargs={"max_gen_toks": 32}, sources=[data_dir]
    )
    rows = run.run_harness(access, plan, writer=sink, arm="a", block=2)
    assert rows == sink.rows
    assert len(rows) == 3 * len(TASKS)
    printed = sink.marks["harness"][0]["results"]
    again = results_of(rows, plan.metrics)
    for name in TASKS:
        assert again[name].keys() == {key for key in printed[name] if "," in key} - {
            key for key in printed[name] if "_stderr" in key
        }
        for metric, value in again[name].items():
            assert value == pytest.approx(printed[name][metric], rel=1e-9), (name, metric)
    assert {(row.arm, row.block, row.ok) for row in rows} == {("a", 2, True)}
    assert len({row.prompt_id for row in rows}) == len(rows)
    for row in rows:
        assert msgspec.json.decode(msgspec.json.encode(row), type=Record) == row
    sample = next(row for row in rows if row.task == "gsm8k")
    assert set(sample.scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert set(sample.details["filtered"]) == {"strict-match", "flexible-extract"}
    assert sample.output
    json.dumps(plan.settings())


def test_a_plan_asks_the_same_again(sink: Any, data_dir: Path) -> None:
    """Examples are drawn anew for each run, from the same seed."""
    plan = run.prepare(["gsm8k"], limit=3, num_fewshot=2, sources=[data_dir])
    first, second = (run.run_harness(fake(), plan, writer=sink) for _ in range(2))
    assert [row.prompt_hash for row in first] == [row.prompt_hash for row in second]
    assert len({row.prompt_hash for row in first}) == 3


def test_only_chosen_documents(access: Access, sink: Any, data_dir: Path) -> None:
    plan = run.prepare(["arc_easy"], samples={"arc_easy": [5, 2]}, sources=[data_dir])
    assert plan.facts()["arc_easy"].num_items == 2
    rows = run.run_harness(access, plan, writer=sink)
    assert [row.details["doc_id"] for row in rows] == [5, 2]


def test_perplexity_of_pages(access: Access, sink: Any, data_dir: Path) -> None:
    plan = run.prepare(["wikitext2_unk"], limit=1, sources=[data_dir])
    facts = plan.facts()["wikitext2_unk"]
    assert "not comparable" in facts.data_source
    rows = run.run_harness(access, plan, writer=sink)
    printed = sink.marks["harness"][0]["results"]["wikitext2_unk"]
    again = results_of(rows, plan.metrics)["wikitext2_unk"]
    assert set(again) == {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"}
    for metric, value in again.items():
        assert value == pytest.approx(printed[metric], rel=1e-9)
    assert rows[0].details["num_words"] > 100


def test_aggregations() -> None:
    """Against lm-eval's own functions."""
    from lm_eval.api import metrics

    pairs = [(-10.0, 4), (-3.0, 1), (-40.0, 9)]
    rows = [
        Request(
            scores={"loglikelihood_per_word,none": value / n, "loglikelihood,none": value},
            details={"num_words": n},
        )
        for value, n in pairs
    ]
    weighted = {"score": "loglikelihood_per_word,none", "weight": "num_words"}
    for how, value in (
        ("weighted_perplexity", metrics.weighted_perplexity(pairs)),
        ("bits_per_byte", metrics.bits_per_byte(pairs)),
    ):
        metric = msgspec.convert({**weighted, "how": how}, Metric)
        assert result_of(rows, metric) == pytest.approx(value)
    metric = Metric(score="loglikelihood,none", how="perplexity")
    assert result_of(rows, metric) == pytest.approx(metrics.perplexity([v for v, _ in pairs]))
    assert result_of(rows, Metric(score="loglikelihood,none", how="other")) is None


def test_a_score_that_is_no_finite_number_leaves_the_run_readable() -> None:
    sample = {
        "doc_id": 0,
        "doc_hash": "h",
        "target": "",
        "target_hash": "t",
        "prompt_hash": "p",
        "resps": [[(-1.0, True)]],
        "arguments": [("a", "b")],
        "filtered_resps": [(-1.0, True)],
        "filter": "none",
        "metrics": ["acc", "mc2"],
        "acc": 1.0,
        "mc2": float("nan"),
    }
    (row,) = rows_of("t", [sample], {"mc2,none": metric_of("mc2", "none", "mean", True)})
    assert row.scores == {"acc,none": 1.0}
    assert row.details["not_finite"] == {"mc2,none": "nan"}
    assert msgspec.json.decode(msgspec.json.encode(row), type=Record).scores == row.scores


def _sample(*arguments: Any) -> dict[str, Any]:
    scored = isinstance(arguments[0][-1], str) and len(arguments[0]) > 1
    return {
        "doc_id": 0,
        "doc_hash": "h",
        "target": 0,
        "target_hash": "t",
        "prompt_hash": "p",
        "resps": [[(-1.0, True)] if scored else ["x"] for _ in arguments],
        "arguments": list(arguments),
        "filtered_resps": [],
        "filter": "none",
        "metrics": [],
    }


@pytest.mark.parametrize(
    ("sample", "question"),
    [
        (_sample(("Q: 1 + 1?", {"until": []})), "Q: 1 + 1?"),
        (_sample(("Q:", " yes"), ("Q:", " no")), "Q:\n\n[choices]\n0: yes\n1: no"),
        (_sample(("The cat", " sat"), ("The dog", " sat")), "0: The cat sat\n1: The dog sat"),
        (_sample(("The capital is", " Paris")), "The capital is"),
        (_sample((JsonChatStr('[{"role":"user"}]'), {})), '[{"role":"user"}]'),
    ],
)
def test_a_row_holds_its_question(sample: dict[str, Any], question: str) -> None:
    (row,) = rows_of("t", [sample], {})
    assert row.details["question"] == question


def test_instructions_of_ifeval_are_counted_one_by_one() -> None:
    samples = [
        {
            "doc_id": number,
            "doc_hash": str(number),
            "prompt_hash": "p",
            "target": 0,
            "target_hash": "t",
            "filter": "none",
            "filtered_resps": ["text"],
            "resps": [["text"]],
            "arguments": [("prompt", {})],
            "metrics": ["inst_level_strict_acc"],
            "inst_level_strict_acc": followed,
        }
        for number, followed in enumerate([[True, False, False], [True]])
    ]
    metric = metric_of("inst_level_strict_acc", "none", "flat_mean", True)
    rows = rows_of("ifeval", samples, {"inst_level_strict_acc,none": metric})
    assert [row.scores["inst_level_strict_acc,none"] for row in rows] == [1 / 3, 1]
    assert result_of(rows, metric) == 2 / 4


class Parrot(LM):  # type: ignore[misc]
    """Answers x to everything, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        if self.error is not None:
            raise self.error
        return ["x" for _ in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def fake(lm: Any = None, **facts: Any) -> Access:
    return Access(lm=lm or Parrot(), name="parrot", context_len=512, facts=facts, max_stops=4)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own: a document that is there twice, five stop strings."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "own.jsonl"
    docs = [{"q": "a", "a": "x"}, {"q": "b", "a": "y"}, {"q": "a", "a": "x"}]
    data.write_text("\n".join(map(json.dumps, docs)))
    config = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n", "1", "2", "3", "4"], "max_gen_toks": 8},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
        ],
    }
    (folder / "own.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own_plan(own: Path, monkeypatch: pytest.MonkeyPatch) -> run.Plan:
    # lm-eval's own 13,000 files take seconds to scan, and are not needed here.
    monkeypatch.setattr(tasks, "_index", lambda folders: {})
    return run.prepare(["own"], include_path=own, sources=[])


def test_a_task_of_ones_own(own_plan: run.Plan, sink: Any) -> None:
    rows = run.run_harness(fake(), own_plan, writer=sink)
    assert [row.scores["exact_match,none"] for row in rows] == [1, 0, 1]
    # The document that is there twice is two rows, which pair with two rows of another model.
    assert rows[2].prompt_id == rows[0].prompt_id + "#2"
    assert rows[0].output_hash == rows[1].output_hash
    # Corpus metrics keep what they are made of; their figure is lm-eval's own.
    assert rows[0].details["values"]["bleu,none"] == ["x", "x"]
    assert results_of(rows, own_plan.metrics) == {"own": {"exact_match,none": 2 / 3}}
    assert "bleu,none" in sink.marks["harness"][0]["results"]["own"]
    assert sink.problems == ["lm-eval: Of the `5` stop strings of `own` only `4` are sent."]


def test_what_fails_is_one_sentence(own_plan: run.Plan, sink: Any) -> None:
    with pytest.raises(EngineError, match="stopped on `parrot`: ValueError: no luck"):
        run.run_harness(fake(Parrot(ValueError("no luck.\nmore"))), own_plan, writer=sink)
    assert not sink.rows
    with pytest.raises(ConfigError, match="has no chat template"):
        run.run_harness(fake(access="chat"), own_plan, writer=sink)


def test_too_long_answers_are_refused_before_anything_is_asked(
    own: Path, sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_index", lambda folders: {})
    plan = run.prepare(["own"], include_path=own, sources=[], gen_kwargs={"max_gen_toks": 511})
    with pytest.raises(ConfigError, match="wants up to `511` tokens of answer"):
        run.run_harness(fake(Parrot(AssertionError())), plan, writer=sink)


def test_grading_with_signals_needs_the_main_thread(
    own_plan: run.Plan, sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of MATH: math_verify sets an alarm."""
    graded = eval("lambda doc, results: {'exact_match': 1}", {"signal": object()})
    monkeypatch.setattr(own_plan.tasks["own"].config, "process_results", graded)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run.run_harness, fake(), own_plan, writer=sink)
        with pytest.raises(ConfigError, match="in the main thread only"):
            future.result()
    assert len(run.run_harness(fake(), own_plan, writer=sink)) == 3


def test_scores_of_texts_need_a_route_that_has_them(sink: Any, data_dir: Path) -> None:
    plan = run.prepare(["arc_easy"], limit=1, chat=True, sources=[data_dir])
    access = Access(
        lm=Parrot(), name="p", context_len=512, facts={"access": "chat"}, has_loglikelihood=False
    )
    with pytest.raises(ConfigError, match="`arc_easy` scores given texts"):
        run.run_harness(access, plan, writer=sink)


def test_random_numbers_of_the_caller_are_left_alone(data_dir: Path) -> None:
    import random

    random.seed(5)
    state = random.getstate()
    run.prepare(["arc_easy"], limit=1, sources=[data_dir])
    assert random.getstate() == state
