"""Translation (FLORES-200), summaries (CNN/DailyMail) and open questions (MT-Bench) as tasks."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from penstock.errors import ConfigError
from penstock.measure.load.target import Ask
from penstock.measure.quality.graders import Grader, NonEmpty
from penstock.measure.quality.jsonl import read_jsonl, read_lines
from penstock.measure.quality.own import GradedTask
from penstock.measure.quality.tasks import Item
from penstock.measure.quality.text_graders import Chrf, Rouge

LANGUAGES = {
    "eng_Latn": "English",
    "deu_Latn": "German",
    "fra_Latn": "French",
    "spa_Latn": "Spanish",
    "zho_Hans": "Simplified Chinese",
    "rus_Cyrl": "Russian",
    "jpn_Jpan": "Japanese",
    "arb_Arab": "Arabic",
    "hin_Deva": "Hindi",
    "por_Latn": "Portuguese",
    "kor_Hang": "Korean",
    "swh_Latn": "Swahili",
}
# BLEU's words: sacrebleu's own for Chinese, characters where words are not apart by spaces.
TOKENIZERS = {"zho_Hans": "zh", "jpn_Jpan": "char", "kor_Hang": "char"}


def flores(name: str, data_dir: Path) -> GradedTask:
    """`flores:eng_Latn-deu_Latn` (`flores:deu_Latn` is from English): the 1,012 of devtest.

    Items of one article are one group. Raises ConfigError for another language or no data.
    """
    source, _, target = name.removeprefix("flores:").rpartition("-")
    source = source or "eng_Latn"
    for code in (source, target):
        if code not in LANGUAGES:
            raise ConfigError(
                f"`{name}` names the language `{code}`.", hint=f"known: {', '.join(LANGUAGES)}"
            )
    directory = data_dir / "eval-flores200"
    texts, references = (
        read_lines(directory / "devtest" / f"{code}.devtest") for code in (source, target)
    )
    table = csv.DictReader(read_lines(directory / "metadata_devtest.tsv"), delimiter="\t")
    articles = [row.get("URL") or "" for row in table]
    if not len(texts) == len(references) == len(articles):
        raise ConfigError(
            f"`{directory}` is damaged: its files differ in how many lines they have."
        )
    request = (
        f"Translate this sentence from {LANGUAGES[source]} into {LANGUAGES[target]}. "
        "Answer with the translation only.\n\n"
    )
    grader = Chrf(tokenizer=TOKENIZERS.get(target, "13a"))
    items = [
        _item(str(number), request + text, reference, max_tokens=256, group=article)
        for number, (text, reference, article) in enumerate(
            zip(texts, references, articles, strict=True)
        )
    ]
    return _task(name, items, grader, "FLORES-200 devtest")


def cnndm(data_dir: Path) -> GradedTask:
    """`cnndm`: 200 articles of CNN/DailyMail with their highlights, one on each line."""
    path = data_dir / "eval-cnndm-sample" / "cnn_dailymail_tldr_summary.jsonl"
    grader = Rouge()
    items = [
        _item(str(number), line["prompt"], _highlights(line), max_tokens=256)
        for number, line in enumerate(read_jsonl(path, "prompt", "completion"))
    ]
    return _task("cnndm", items, grader, "CNN/DailyMail 3.0.0, P3's prompt `tldr_summary`")


def _highlights(line: dict[str, str]) -> str:
    return re.sub(r"\s+\n", "\n", line["completion"].removesuffix("<|endoftext|>")).strip()


def mt_bench(data_dir: Path) -> GradedTask:
    """`mt-bench`: the first turns of its 80 questions, by category, for a judge.

    Without one there is only whether something was answered.
    """
    path = data_dir / "prompts-mt-bench" / "mt_bench_question.jsonl"
    grader = NonEmpty()
    items = []
    for line in read_jsonl(path, "question_id", "turns", "category"):
        name = str(line["question_id"])
        messages = [{"role": "user", "content": line["turns"][0]}]
        ask = Ask(prompt_id=name, messages=messages, max_tokens=1024)
        items.append(Item(id=name, ask=ask, reference=[], category=line["category"]))
    return _task("mt-bench", items, grader, "MT-Bench, first turns")


def _item(name: str, text: str, reference: str, *, max_tokens: int, group: str = "") -> Item:
    ask = Ask(prompt_id=name, messages=[{"role": "user", "content": text}], max_tokens=max_tokens)
    return Item(
        id=name,
        ask=ask,
        reference=[reference],
        group=group,
        details={"references": [reference]},
    )


def _task(name: str, items: list[Item], grader: Grader, source: str) -> GradedTask:
    return GradedTask(
        name=name, all_items=items, graders={item.id: grader for item in items}, source=source
    )
