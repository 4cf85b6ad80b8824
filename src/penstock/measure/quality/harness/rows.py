"""Samples of lm-evaluation-harness as rows, and its results computed again from the rows.

One row is one document with the scores of all metrics and filters, named as lm-eval names them
(`exact_match,strict-match`). A mean, weighted where lm-eval weights, gives every figure; metrics
that lm-eval aggregates in another way keep their raw values in the row and are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from penstock.measure.quality.questions import shortened
from penstock.measure.records import Request

NOT_FINITE = "not_finite"  # in a row's details: scores that are infinite, or no numbers
How = Literal["mean", "flat_mean", "perplexity", "weighted_perplexity", "bits_per_byte", "other"]


class Metric(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """How one metric of a task is made of the rows.

    `score` is the name of the score in a row, `weight` of its weight in the row's details. `how`
    is lm-eval's aggregation: the perplexities are functions of a mean log-likelihood.
    """

    score: str
    how: How
    weight: str | None = None
    higher_is_better: bool = True


def metric_of(name: str, filter_name: str, how: How, higher_is_better: bool) -> Metric:
    """The metric `name` behind a filter."""
    score, weight = name, None
    if how == "perplexity":
        score = "loglikelihood"
    elif how in ("weighted_perplexity", "bits_per_byte"):
        unit = "word" if name.startswith("word") else "byte"
        score, weight = f"loglikelihood_per_{unit}", f"num_{unit}s"
    elif how == "flat_mean":
        weight = f"num_{name}"
    return Metric(
        score=f"{score},{filter_name}",
        how=how,
        weight=weight,
        higher_is_better=higher_is_better or how in _PERPLEXITIES,
    )


_PERPLEXITIES = ("perplexity", "weighted_perplexity", "bits_per_byte")


def rows_of(
    task: str, samples: Iterable[Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> list[Request]:
    """The rows of a task's samples, one for each document, in their order.

    Args:
        samples: as lm-eval logs them, one for each document and filter.
        metrics: by `metric,filter`.
    """
    rows: dict[int, Request] = {}
    seen: dict[str, int] = {}
    for sample in samples:
        row = rows.get(sample["doc_id"])
        if row is None:
            row = rows[sample["doc_id"]] = _row(task, sample, seen)
        row.details["filtered"][sample["filter"]] = _plain(sample["filtered_resps"])
        for name in sample["metrics"]:
            full = f"{name},{sample['filter']}"
            _put(row, full, sample[name], metrics.get(full))
    return list(rows.values())


def _row(task: str, sample: Mapping[str, Any], seen: dict[str, int]) -> Request:
    doc_hash = sample["doc_hash"]
    seen[doc_hash] = seen.get(doc_hash, 0) + 1  # some sets hold a document twice
    suffix = f"#{seen[doc_hash]}" if seen[doc_hash] > 1 else ""
    output, details = _answer(sample)
    details |= {
        "question": _question(sample["arguments"]),
        "doc_id": sample["doc_id"],
        "doc_hash": doc_hash,
        "target": _plain(sample["target"]),
        "target_hash": sample["target_hash"],
        "filtered": {},
    }
    return Request(
        task=task,
        prompt_id=f"{task}/{doc_hash}{suffix}",
        prompt_hash=sample["prompt_hash"],
        output=output,
        output_hash=None if output is None else hashlib.sha256(output.encode()).hexdigest(),
        details=details,
    )


def _question(arguments: Sequence[Sequence[Any]]) -> str:
    """The prompt, and the choices where several continuations were scored."""
    prompts = [shortened(_text(one[0])) for one in arguments]
    choices = [_text(one[1]) for one in arguments if len(one) > 1 and isinstance(one[1], str)]
    if len(choices) < 2:
        return prompts[0]
    if len(set(prompts)) > 1:  # Winogrande: what differs stands before the text
        choices = [a + b for a, b in zip(prompts, choices, strict=True)]
        return shortened("\n".join(f"{n}: {choice}" for n, choice in enumerate(choices)))
    listed = "\n".join(f"{n}:{choice}" for n, choice in enumerate(choices))
    return prompts[0] + shortened(f"\n\n[choices]\n{listed}")


def _text(prompt: Any) -> str:
    """A prompt is a text, or of the chat route the JSON of its messages."""
    return prompt if isinstance(prompt, str) else str(getattr(prompt, "prompt", prompt))


def _answer(sample: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """What the model said: its text, or the continuation that it found likeliest; None: nothing."""
    first = sample["resps"][0][0]
    if isinstance(first, str):
        return first, {}
    if not isinstance(first, (list, tuple)):
        return None, {"loglikelihoods": [first]}  # of a whole text
    scored = [list(resps[0]) for resps in sample["resps"]]
    details = {"loglikelihoods": scored, "num_choices": len(scored)}
    if len(scored) == 1 and not scored[0][1]:
        return None, details  # a single continuation, and greedy decoding writes another
    best = max(range(len(scored)), key=lambda index: scored[index][0])
    return str(sample["arguments"][best][1]), details


def _put(row: Request, full: str, value: Any, metric: Metric | None) -> None:
    """Keep the value of one metric: as a score where it is a number, else among the details."""
    score: float | None = None
    if metric is not None and metric.how == "flat_mean":
        assert metric.weight is not None
        row.details[metric.weight] = len(value)
        score = sum(map(float, value)) / len(value)
    elif metric is not None and metric.weight is not None:
        loglikelihood, num_units = value
        row.details[metric.weight] = num_units
        score = float(loglikelihood) / num_units
    elif isinstance(value, (bool, int, float)) or hasattr(value, "item"):
        score = float(value)
    else:
        row.details.setdefault("values", {})[full] = _plain(value)
    if score is not None and math.isfinite(score):
        row.scores[full if metric is None else metric.score] = score
    elif score is not None:  # JSON has no such number
        row.details.setdefault(NOT_FINITE, {})[full] = str(score)


def results_of(
    rows: Iterable[Request], metrics: Mapping[str, Mapping[str, Metric]]
) -> dict[str, dict[str, float]]:
    """Each task's results by `metric,filter`, from the rows alone.

    Args:
        metrics: by task, then by `metric,filter`.
    """
    by_task: dict[str, list[Request]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    return {
        task: {
            name: value
            for name, metric in metrics.get(task, {}).items()
            if (value := result_of(mine, metric)) is not None
        }
        for task, mine in by_task.items()
    }


def result_of(rows: Sequence[Request], metric: Metric) -> float | None:
    """One metric over rows; None where lm-eval's own aggregation would be needed."""
    found = [row for row in rows if metric.score in row.scores]
    if metric.how == "other" or not found:
        return None
    weights = [1 if metric.weight is None else row.details[metric.weight] for row in found]
    parts = (row.scores[metric.score] * w for row, w in zip(found, weights, strict=True))
    mean = math.fsum(parts) / math.fsum(weights)
    if metric.how in ("perplexity", "weighted_perplexity"):
        return math.exp(-mean) if mean > -700 else math.inf
    return -mean / math.log(2) if metric.how == "bits_per_byte" else mean


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON has not is told as text."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))
