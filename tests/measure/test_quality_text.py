"""Text metrics give the values that their authors publish, and texts become tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.load.target import Reply
from penstock.measure.quality import suites, text_metrics
from penstock.measure.quality.grading import make

# The example of sacrebleu's README.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_are_those_of_sacrebleu_with_its_signature() -> None:
    bleu = text_metrics.corpus("bleu", SYSTEM, REFERENCES)
    chrf = text_metrics.corpus("chrf", SYSTEM, REFERENCES)
    assert bleu.score == pytest.approx(0.4853, abs=5e-5)
    assert chrf.score == pytest.approx(0.5973, abs=5e-5)
    assert bleu.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert chrf.signature.startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.")
    assert "|nw:2|" in text_metrics.corpus("chrf++", SYSTEM, REFERENCES).signature


def test_references_may_be_of_different_number() -> None:
    one = text_metrics.corpus("bleu", SYSTEM, [REFERENCES[0], *([r[0]] for r in REFERENCES[1:])])
    assert 0 < one.score < text_metrics.corpus("bleu", SYSTEM, REFERENCES).score
    assert "nrefs:var" in one.signature
    with pytest.raises(ConfigError, match="meteor"):
        text_metrics.corpus("meteor", SYSTEM, REFERENCES)


@pytest.mark.parametrize(
    ("answer", "reference", "score", "value"),
    [
        # Unigrams: 1 of 1, 1 of 3; bigrams: 1 of 1, 1 of 2 (rouge-score's own tests).
        ("testing", "testing one two", "rouge1", 0.5),
        ("testing one", "testing one two", "rouge2", 2 / 3),
        ("a b c d", "a c b d", "rougeL", 0.75),
        # Lin 2004, 3.2: the union of the common subsequences has 4 of 5 words; 4 of 10 here.
        ("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", "rougeLsum", 8 / 15),
        ("running dogs", "run dog", "rouge1", 1.0),
    ],
)
def test_rouge_known_answers(answer: str, reference: str, score: str, value: float) -> None:
    assert text_metrics.rouge(answer, [reference])[score] == pytest.approx(value)


def test_rouge_takes_the_best_reference_and_stems_only_if_told() -> None:
    assert text_metrics.rouge("a cat", ["a dog", "a cat"])["rouge2"] == 1
    assert text_metrics.rouge("running", ["run"], stemmer=False)["rouge1"] == 0


def test_rouge_of_real_pairs(data_dir: Path) -> None:
    """ROUGE-1 counted by hand (words, no stemmer) on the pairs of the other package's tests."""
    import re
    from collections import Counter

    for row in read_jsonl_array(data_dir / "eval-rouge-pairs" / "data.json"):
        ours, theirs = (
            Counter(re.findall(r"[a-z0-9]+", row[key].lower())) for key in ("hyp", "ref")
        )
        common = (ours & theirs).total()
        expected = 2 * common / (ours.total() + theirs.total())
        got = text_metrics.rouge(row["hyp"], [row["ref"]], stemmer=False)["rouge1"]
        assert got == pytest.approx(expected)


def read_jsonl_array(path: Path) -> list[dict[str, str]]:
    import json

    rows: list[dict[str, str]] = json.loads(path.read_text())
    return rows


def test_sentences_are_put_on_lines_for_rouge_lsum() -> None:
    assert text_metrics.sentence_lines("Mr. A went. B stayed.\nC") == "Mr. A went.\nB stayed.\nC"
    grades = make("rouge").grade("One two. Three four.", ["Three four.\nOne two."])
    assert grades["rougeLsum"] == 1
    assert grades["rougeL"] == 0.5


def test_bert_score_says_what_it_needs(tmp_path: Path) -> None:
    options = {"kind": "bert_score", "model": str(tmp_path / "none"), "num_layers": 17}
    with pytest.raises(ConfigError, match=r"bert.score|is no directory"):
        make(options)


def test_translations_are_tasks(data_dir: Path) -> None:
    task = suites.find("flores:deu_Latn-eng_Latn", data_dir)
    items = task.items()
    assert len(items) == 1012
    assert len({item.group for item in items}) < 300  # sentences of one article depend
    assert items[0].ask.messages is not None
    assert "from German into English" in items[0].ask.messages[0]["content"]
    (reference,) = items[0].reference
    assert task.grade(items[0], Reply(text=reference)) == {"chrf++": 1}
    facts = suites.find("flores:zho_Hans", data_dir).facts(1)
    assert facts.scores["corpus_bleu"].metric == {"name": "bleu", "tokenizer": "zh"}
    with pytest.raises(ConfigError, match="xxx"):
        suites.find("flores:xxx", data_dir)


def test_summaries_are_a_task(data_dir: Path) -> None:
    task = suites.find("cnndm", data_dir)
    item = task.items()[0]
    assert "endoftext" not in item.reference[0]
    assert task.grade(item, Reply(text=item.reference[0]))[task.main_score] == 1
    assert task.grade(item, Reply(text=""))[task.main_score] == 0
