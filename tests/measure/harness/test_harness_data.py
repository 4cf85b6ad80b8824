"""Local data in the hub's schemas: counts, fields, mirrors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from penstock.errors import ConfigError
from penstock.measure.quality.harness import run, tasks
from penstock.measure.quality.harness.datasets import FORMS, Found, Splits, find


def splits_of(data_dir: Path, path: str, config: str = "") -> Splits:
    """The local form, without pyarrow."""
    form = FORMS[path]
    return form.read(data_dir / form.folder, config)


def test_counts(data_dir: Path) -> None:
    gsm8k = splits_of(data_dir, "openai/gsm8k", "main")
    assert {name: len(rows) for name, rows in gsm8k.items()} == {"train": 7473, "test": 1319}
    for config, num_test, num_dev in (("ARC-Challenge", 1172, 299), ("ARC-Easy", 2376, 570)):
        arc = splits_of(data_dir, "allenai/ai2_arc", config)
        assert (len(arc["test"]), len(arc["validation"])) == (num_test, num_dev)
    assert len(splits_of(data_dir, "truthfulqa/truthful_qa", "generation")["validation"]) == 817
    assert len(splits_of(data_dir, "google/IFEval")["train"]) == 541
    assert len(splits_of(data_dir, "EleutherAI/lambada_openai")["test"]) == 5153
    pages = splits_of(data_dir, "penstock/wikitext2_unk")
    assert {name: len(rows) for name, rows in pages.items()} == {"validation": 60, "test": 62}


def test_mmlu_has_57_subjects_and_14042_questions(data_dir: Path) -> None:
    index = tasks._index(tasks.FOLDERS["mmlu"])
    configs = {
        entry.cfg["dataset_name"]
        for entry in index.values()
        if entry.cfg and str(entry.name).startswith("mmlu_") and "dataset_name" in entry.cfg
    }
    assert len(configs) == 57
    num_test = 0
    for config in configs:
        splits = splits_of(data_dir, "cais/mmlu", config)
        assert len(splits["dev"]) == 5
        num_test += len(splits["test"])
        assert all(len(row["choices"]) == 4 and 0 <= row["answer"] <= 3 for row in splits["test"])
    assert num_test == 14042


def test_schemas(data_dir: Path) -> None:
    """Fields that lm-eval's prompts read, with values checked by eye."""
    arc = splits_of(data_dir, "allenai/ai2_arc", "ARC-Easy")["test"][0]
    assert arc["id"] == "Mercury_417466"
    assert arc["choices"]["label"] == ["A", "B", "C", "D"]
    assert arc["choices"]["text"][0].startswith("Sunlight is the source")
    assert arc["answerKey"] == "A"
    question = splits_of(data_dir, "cais/mmlu", "anatomy")["test"][0]
    assert question["question"].startswith("A lesion causing compression of the facial nerve")
    assert question["choices"][0] == "paralysis of the facial muscles."
    assert question["answer"] == 0
    first, second = splits_of(data_dir, "google/IFEval")["train"][:2]
    assert first["key"] == 1000
    assert first["kwargs"][1]["num_highlights"] == 3
    assert first["kwargs"][0].keys() == second["kwargs"][0].keys()
    assert not any(first["kwargs"][0].values())
    page = splits_of(data_dir, "penstock/wikitext2_unk")["test"][0]["page"]
    assert page.split("\n")[1] == " = Robert <unk> = "
    assert "= = Career = =" in page


def test_truthfulqa_targets(data_dir: Path) -> None:
    rows = splits_of(data_dir, "truthfulqa/truthful_qa", "multiple_choice")["validation"]
    first = rows[0]
    assert first["mc1_targets"]["choices"][0] == (
        "The watermelon seeds pass through your digestive system"
    )
    assert sum(first["mc2_targets"]["labels"]) == 5
    assert len(first["mc2_targets"]["choices"]) == 12
    for row in rows:
        for name in ("mc1_targets", "mc2_targets"):
            choices, labels = row[name]["choices"], row[name]["labels"]
            right = choices[: sum(labels)]
            wrong = choices[sum(labels) :]
            assert len(right) == len(set(right))
            assert len(wrong) == len(set(wrong))
            assert len(choices) == len(labels)
            assert labels == sorted(labels, reverse=True)  # right ones first
            assert 0 < sum(labels) < len(labels)
        assert sum(row["mc1_targets"]["labels"]) == 1


def test_prompts_are_those_of_the_published_tasks(data_dir: Path) -> None:
    """lm-eval's own templates, examples and options over our data."""
    plan = run.prepare(
        ["arc_easy", "mmlu_anatomy", "gsm8k"], limit=1, num_fewshot=1, sources=[data_dir]
    )
    prompts = {}
    for name, task in plan.tasks.items():
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompts[name] = [instance.args for instance in task.instances]
    assert [args[1] for args in prompts["mmlu_anatomy"]] == [" A", " B", " C", " D"]
    text = prompts["mmlu_anatomy"][0][0]
    assert text.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )
    assert text.count("Answer:") == 2
    assert text.endswith(
        "D. paralysis of the facial muscles, loss of taste, lacrimation and "
        "decreased salivation.\nAnswer:"
    )
    assert prompts["arc_easy"][0][0].endswith("foundation of most food webs?\nAnswer:")
    assert prompts["gsm8k"][0][0].count("Question: ") == 2
    assert prompts["gsm8k"][0][1]["until"] == ["Question:", "</s>", "<|im_end|>"]
    facts = plan.facts()
    assert facts["gsm8k"].main_score == "exact_match,strict-match"
    assert facts["mmlu_anatomy"].random_baseline == 0.25
    assert "`train` is absent" in facts["arc_easy"].data_source


def write_mirror(directory: Path, path: str, config: str, splits: dict[str, list[Any]]) -> None:
    folder = directory / path / config
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


ARC_ROW = {
    "id": "1",
    "question": "Which is a colour?",
    "choices": {"text": ["red", "ten"], "label": ["A", "B"]},
    "answerKey": "A",
}


def test_mirrors_of_three_kinds(tmp_path: Path) -> None:
    """One file per split, or what `save_to_disk` writes."""
    import datasets

    write_mirror(tmp_path, "allenai/ai2_arc", "ARC-Easy", {"test": [ARC_ROW]})
    both = datasets.DatasetDict({"test": datasets.Dataset.from_list([ARC_ROW] * 2)})
    both.save_to_disk(str(tmp_path / "allenai/ai2_arc/ARC-Challenge"))
    parquet = tmp_path / "EleutherAI/lambada_openai/default"
    parquet.mkdir(parents=True)
    datasets.Dataset.from_list([{"text": "a b"}] * 3).to_parquet(str(parquet / "test.parquet"))
    for path, config, num_rows in (
        ("allenai/ai2_arc", "ARC-Easy", 1),
        ("allenai/ai2_arc", "ARC-Challenge", 2),
        ("EleutherAI/lambada_openai", "default", 3),
    ):
        found = find(path, config, [tmp_path])
        assert found is not None
        assert len(found.splits["test"]) == num_rows
    assert find("Rowan/hellaswag", None, [tmp_path]) is None


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`hellaswag` needs the data set `Rowan/hellaswag`") as e:
        run.prepare(["hellaswag"], sources=[tmp_path])
    assert str(tmp_path) in str(e.value)
    assert "DIR/Rowan/hellaswag" in str(e.value)


def test_a_missing_split_of_examples(tmp_path: Path) -> None:
    write_mirror(tmp_path, "allenai/ai2_arc", "ARC-Challenge", {"test": [ARC_ROW]})
    assert run.prepare(["arc_challenge"], sources=[tmp_path]).facts()["arc_challenge"].num_items
    with pytest.raises(ConfigError, match="draws `25` examples from the split `train`"):
        run.prepare(["openllm"], sources=[tmp_path])


# One document of each set of the group `openllm`, in the hub's schema.
TARGETS = {"choices": ["no", "yes"], "labels": [1, 0]}
OPENLLM: dict[str, dict[str, Any]] = {
    "allenai/ai2_arc": ARC_ROW,
    "Rowan/hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man",
        "ctx_b": "he",
        "endings": ["eats", "runs", "sits", "goes"],
        "label": "1",
    },
    "truthfulqa/truthful_qa": {
        "question": "Do cats fly?",
        "best_answer": "no",
        "correct_answers": ["no"],
        "incorrect_answers": ["yes"],
        "mc1_targets": TARGETS,
        "mc2_targets": TARGETS,
    },
    "cais/mmlu": {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3},
    "allenai/winogrande": {
        "sentence": "The cup is in the box because _ is big.",
        "option1": "cup",
        "option2": "box",
        "answer": "2",
    },
    "openai/gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
}


def test_the_group_of_the_first_leaderboard_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval 0.4.13 gives all subjects of MMLU one name here, and evaluates one of them."""
    import datasets

    def fake(path: str, config: str | None, sources: Any) -> Found:
        rows = datasets.Dataset.from_list([OPENLLM[path]])
        return Found(dict.fromkeys(("train", "validation", "dev", "test"), rows), "a test", "")

    monkeypatch.setattr(tasks, "find", fake)
    loaded = run.prepare(["openllm"], sources=[]).tasks
    subjects = [name for name in loaded if name.startswith("mmlu_")]
    assert len(subjects) == 57
    assert {loaded[name].config.num_fewshot for name in subjects} == {5}
    assert loaded["arc_challenge"].config.num_fewshot == 25
    assert {"truthfulqa_mc2", "hellaswag", "winogrande", "gsm8k"} < set(loaded)


def test_documents_are_prepared_once(tmp_path: Path) -> None:
    """GPQA's preparation shuffles the choices: prompts and scores must see the same."""
    rows = [
        {
            "Question": f"question {number}",
            "Correct Answer": "right",
            **{f"Incorrect Answer {place}": f"wrong {place}" for place in (1, 2, 3)},
        }
        for number in range(30)
    ]
    write_mirror(tmp_path, "Idavidrein/gpqa", "gpqa_main", {"train": rows})
    plans = [run.prepare(["leaderboard_gpqa_main"], sources=[tmp_path]) for _ in range(2)]
    first, again = (plans[0].docs("leaderboard_gpqa_main") for _ in range(2))
    assert first == again
    assert first == plans[1].docs("leaderboard_gpqa_main")  # the seed is lm-eval's
    assert len({doc["answer"] for _, doc in first}) == 4


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory with data sets"):
        run.prepare(["gsm8k"], sources=[tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="both choose documents") as both:
        run.prepare(["gsm8k"], limit=1, samples={"gsm8k": [0]}, sources=[])
    assert both.value.hint == "set one of them"


def test_a_metric_that_would_be_downloaded() -> None:
    with pytest.raises(ConfigError, match="wants the metric `rouge`"):
        tasks._check_metrics("own", {"metric_list": [{"metric": "rouge"}]})
    tasks._check_metrics("own", {"metric_list": [{"metric": "exact_match"}]})
    tasks._check_metrics("own", {"metric_list": [{"metric": "rouge"}], "process_results": print})


def test_damaged_data(tmp_path: Path) -> None:
    folder = tmp_path / "eval-lambada"
    folder.mkdir()
    (folder / "lambada_test.jsonl").write_text("{broken\n")
    with pytest.raises(ConfigError, match="is not `EleutherAI/lambada_openai` as published"):
        run.prepare(["lambada_openai"], sources=[tmp_path])
