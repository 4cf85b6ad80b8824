"""The data of published tasks from local files, in the schema of the hub's data sets.

Two layouts are known in a directory of data: mirrors (`DIR/<hub path>/<config>/`, written by
`save_to_disk`, or one `<split>.parquet`, `.jsonl` or `.json` per split), and the files as their
authors published them (`FORMS`). Prompts, few-shot rules and metrics stay lm-eval's own.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import ConfigError

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]


def gsm8k(directory: Path, config: str) -> Splits:
    """`openai/gsm8k`: question, answer."""
    return {split: _jsonl(directory / f"{split}.jsonl") for split in ("train", "test")}


def mmlu(directory: Path, config: str) -> Splits:
    """`cais/mmlu`: question, subject, choices, answer (0 to 3); no validation split here."""
    splits = {}
    for split in ("dev", "test"):
        rows = _csv(directory / split / f"{config}_{split}.csv")
        splits[split] = [
            {
                "question": row["question"],
                "subject": config,
                "choices": [row[f"choice{number}"] for number in range(4)],
                "answer": int(row["answer"]),
            }
            for row in rows
        ]
    return splits


def arc(directory: Path, config: str) -> Splits:
    """`allenai/ai2_arc`: id, question, choices {text, label}, answerKey; no train split here."""
    return {
        split: [_arc_row(row) for row in _jsonl(directory / f"{config}-{name}.jsonl")]
        for split, name in {"validation": "Dev", "test": "Test"}.items()
    }


def _arc_row(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        "question": row["question"]["stem"],
        "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")},
        "answerKey": row["answerKey"],
    }


def truthfulqa(directory: Path, config: str) -> Splits:
    """`truthfulqa/truthful_qa`, both configs, made of the authors' CSV.

    Right answers come first and in the file's order, as in the hub's set: lm-eval takes choice 0
    of mc1 for the right one. Nothing is shuffled.
    """
    make = _truthfulqa_mc if config == "multiple_choice" else _truthfulqa_generation
    return {"validation": [make(row) for row in _csv(directory / "TruthfulQA.csv")]}


def _truthfulqa_mc(row: Mapping[str, str]) -> dict[str, Any]:
    best = row["Best Answer"].strip()
    right = _answers(row["Correct Answers"], first=best)
    wrong = _answers(row["Incorrect Answers"])
    return {
        "question": row["Question"],
        "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
        "mc2_targets": {
            "choices": [*right, *wrong],
            "labels": [1] * len(right) + [0] * len(wrong),
        },
    }


def _truthfulqa_generation(row: Mapping[str, str]) -> dict[str, Any]:
    best = row["Best Answer"].strip()
    return {
        "type": row["Type"],
        "category": row["Category"],
        "question": row["Question"],
        "best_answer": best,
        "correct_answers": _answers(row["Correct Answers"], first=best),
        "incorrect_answers": _answers(row["Incorrect Answers"]),
        "source": row["Source"],
    }


def _answers(cell: str, first: str | None = None) -> list[str]:
    """The answers of a cell, each once; `first` is added in front if it is not among them."""
    answers = list(dict.fromkeys(part.strip() for part in cell.split(";") if part.strip()))
    return answers if first is None or first in answers else [first, *answers]


def ifeval(directory: Path, config: str) -> Splits:
    """`google/IFEval`: key, prompt, instruction_id_list, kwargs."""
    rows = _jsonl(directory / "input_data.jsonl")
    # One schema for all: the hub's rows hold every argument, most of them null.
    names = sorted({name for row in rows for kwargs in row["kwargs"] for name in kwargs})
    for row in rows:
        row["kwargs"] = [{name: kwargs.get(name) for name in names} for kwargs in row["kwargs"]]
    return {"train": rows}


def lambada(directory: Path, config: str) -> Splits:
    """`EleutherAI/lambada_openai`: text."""
    return {"test": _jsonl(directory / "lambada_test.jsonl")}


def wikitext2_unk(directory: Path, config: str) -> Splits:
    """Pages of WikiText-2 in its tokenised form, rare words replaced by `<unk>`."""
    files = {"validation": "valid.txt", "test": "test.txt"}
    return {
        split: [{"page": page} for page in _pages(_text(directory / name))]
        for split, name in files.items()
    }


def _pages(text: str) -> Iterator[str]:
    """A page begins at a heading of the first level."""
    page: list[str] = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        is_title = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "="
        if is_title and "".join(page).strip():
            yield "".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "".join(page)


class Form(NamedTuple):
    """A data set as its authors published it."""

    folder: str  # within the directory of data
    file: str  # that must be there
    read: Callable[[Path, str], Splits]
    note: str  # how its scores may differ from those on the hub's set; "": not at all


FORMS = {
    "openai/gsm8k": Form("eval-gsm8k", "test.jsonl", gsm8k, ""),
    "cais/mmlu": Form("eval-mmlu", "test", mmlu, ""),
    "allenai/ai2_arc": Form(
        "eval-arc",
        "ARC-Easy-Test.jsonl",
        arc,
        "the split `train` is absent: few-shot examples are drawn from `validation`",
    ),
    "truthfulqa/truthful_qa": Form(
        "eval-truthfulqa",
        "TruthfulQA.csv",
        truthfulqa,
        "choices are made of the columns of TruthfulQA.csv; the hub's set names its own",
    ),
    "google/IFEval": Form("eval-ifeval", "input_data.jsonl", ifeval, ""),
    "wis-k/instruction-following-eval": Form("eval-ifeval", "input_data.jsonl", ifeval, ""),
    "EleutherAI/lambada_openai": Form("eval-lambada", "lambada_test.jsonl", lambada, ""),
    "penstock/wikitext2_unk": Form(
        "text-wikitext2",
        "test.txt",
        wikitext2_unk,
        "tokenised text with `<unk>`: not comparable with perplexities on the raw text",
    ),
}


class Found(NamedTuple):
    """Where a data set was found, and what it holds."""

    splits: dict[str, Any]  # of datasets.Dataset
    source: str
    note: str


def sources_or_default(sources: Sequence[Path] | None) -> tuple[Path, ...]:
    """The given directories, or the one that PENSTOCK_DATA names."""
    if sources is not None:
        for path in sources:
            if not path.is_dir():
                raise ConfigError(f"`{path}` is no directory with data sets.")
        return tuple(sources)
    named = os.environ.get("PENSTOCK_DATA")
    return (Path(named),) if named and Path(named).is_dir() else ()


def find(path: str, config: str | None, sources: Sequence[Path]) -> Found | None:
    """A data set of the hub in local directories, the first that has it; None if none has.

    Raises:
        ConfigError: a file of it is damaged.
    """
    for source in sources:
        mirror = _find_mirror(source / path, config)
        if mirror is not None:
            return Found(_read_mirror(mirror), f"mirror `{mirror.relative_to(source)}`", "")
        form = FORMS.get(path)
        if form is not None and (source / form.folder / form.file).exists():
            try:
                splits = form.read(source / form.folder, config or "")
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"`{source / form.folder}` is not `{path}` as published: {error}."
                ) from None
            return Found(_as_datasets(splits), f"`{form.folder}`", form.note)
    return None


def _find_mirror(folder: Path, config: str | None) -> Path | None:
    candidates = [folder / config] if config else [folder, folder / "default"]
    return next((path for path in candidates if path.is_dir() and _files(path)), None)


def _files(folder: Path) -> list[Path]:
    """What a mirror's folder holds: the mark of `save_to_disk`, or a file per split."""
    marks = [folder / "dataset_dict.json"]
    splits = [path for path in folder.iterdir() if path.suffix in {".parquet", ".jsonl", ".json"}]
    return [path for path in marks if path.is_file()] or sorted(splits)


def _read_mirror(folder: Path) -> dict[str, Any]:
    import datasets

    files = _files(folder)
    if files[0].name == "dataset_dict.json":
        return dict(datasets.load_from_disk(str(folder)))
    splits = {}
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            splits[file.stem] = datasets.Dataset(pyarrow.parquet.read_table(file))
        else:
            splits[file.stem] = datasets.Dataset.from_list(_jsonl(file))
    return splits


def _as_datasets(splits: Splits) -> dict[str, Any]:
    import datasets

    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _jsonl(file: Path) -> Rows:
    """One JSON object a line, or one array of them. Only a line feed ends a line."""
    text = _text(file)
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
