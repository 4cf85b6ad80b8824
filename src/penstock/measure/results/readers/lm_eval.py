"""lm-evaluation-harness: `results_*.json` (figures) and `samples_<task>_*.jsonl` (answers).

Read after lm-eval 0.4.13. A document is one row, with the scores of all its filters by the names of
the results (`acc,none`). There are no times. Metrics of a whole corpus have no score a document.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from typing import Any, Final

from penstock.measure.records import Arm, Request
from penstock.measure.results.readers.common import Imported, listing, mapping, number, text

NAME: Final = "lm-eval"
NAMES: Final = {
    "<metric>,<filter>": "score of that name; its mean over documents",
    "perplexity,<filter>": "exp(-mean) of the score `loglikelihood,<filter>`",
    "<metric>_stderr,<filter>": "no counterpart: neither paired nor clustered",
    "doc_hash": "prompt_id, behind the task's name: what runs are paired on",
}
# What a document's value is, where the name is of the figure that is made of all of them.
_SCORES: Final = {"perplexity": "loglikelihood"}
_TASK: Final = re.compile(r"samples_(.+)_\d{4}-\d{2}-\d{2}T[\d.:-]+\.jsonl$")


def recognises(document: Any, file_name: str) -> bool:
    """Whether this is one of the tool's files."""
    if isinstance(document, list):
        return bool(document) and all(
            {"doc_id", "filtered_resps"} <= mapping(row).keys() for row in document[:3]
        )
    known = mapping(document)
    return "results" in known and ("configs" in known or "versions" in known)


def read(document: Any, file_name: str) -> Imported:
    """One of the tool's files as records, or as figures."""
    if not isinstance(document, list):
        return _figures(document, file_name)
    match = _TASK.search(file_name)
    task = match[1] if match else file_name.rpartition(".")[0]
    rows: dict[Any, Request] = {}
    skipped: set[str] = set()
    seen: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for sample in document:
        if sample["doc_id"] not in rows:
            rows[sample["doc_id"]] = _request(sample, task, len(rows), seen)
        row = rows[sample["doc_id"]]
        for name in listing(sample.get("metrics")):
            value = sample.get(name)
            if value is None or isinstance(value, list | dict):
                skipped.add(str(name))
            elif isinstance(value, float) and not math.isfinite(value):
                unknown[str(name)] += 1  # as the tool writes what it could not compute
            else:
                score = float(value) if isinstance(value, bool) else number(value, str(name))
                assert score is not None
                row.scores[f"{_SCORES.get(name, name)},{sample.get('filter', 'none')}"] = score
    return Imported(
        arm=Arm(name=NAME, target=file_name),
        requests=list(rows.values()),
        notes=[
            f"{task}: {name} is a figure of the whole corpus, no score of a document."
            for name in sorted(skipped)
        ]
        + [f"{task}: {num} values of {name} are no numbers." for name, num in unknown.items()],
        has_timeline=False,
    )


def _figures(document: dict[str, Any], file_name: str) -> Imported:
    model = text(document.get("model_name"))
    kept = ("versions", "n-shot", "n-samples", "config", "task_hashes", "chat_template_sha")
    return Imported(
        arm=Arm(
            name=model or NAME,
            target=file_name,
            model=model,
            engine=text(document.get("model_source")),
        ),
        source={"results": document["results"], "groups": document.get("groups") or {}},
        settings={name: document[name] for name in kept if document.get(name)},
        date=str(document.get("date") or ""),
    )


def _request(sample: dict[str, Any], task: str, index: int, seen: Counter[str]) -> Request:
    output = _answer(sample.get("resps"))
    document = text(sample.get("doc_hash")) or str(sample["doc_id"])
    seen[document] += 1
    if seen[document] > 1:  # some sets hold a document twice: as in rows of `penstock eval`
        document += f"#{seen[document]}"
    return Request(
        index=index,
        task=task,
        prompt_id=f"{task}/{document}",
        prompt_hash=text(sample.get("prompt_hash")),
        output=output,
        output_hash=hashlib.sha256(output.encode("utf-8", "surrogatepass")).hexdigest()
        if output is not None
        else None,
        details={"doc_id": sample["doc_id"], "target": sample.get("target")},
    )


def _answer(responses: Any) -> str | None:
    """The first generated text; None for likelihoods."""
    first = listing(listing(responses)[0]) if listing(responses) else []
    return first[0] if first and isinstance(first[0], str) else None
