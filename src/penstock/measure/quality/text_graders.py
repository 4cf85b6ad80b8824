"""Graders that measure how near a text is to a reference: ROUGE, chrF and BLEU, BERTScore."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.quality import text_metrics
from penstock.measure.quality.graders import Grader


class Rouge(Grader, tag="rouge", frozen=True, kw_only=True):
    """ROUGE-1, -2, -L and -Lsum; sentences are put on lines of their own first."""

    stemmer: bool = True

    @property
    def scores(self) -> tuple[str, ...]:
        return ("rougeLsum", "rouge1", "rouge2", "rougeL")

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        lines = [text_metrics.sentence_lines(str(one)) for one in references]
        return text_metrics.rouge(text_metrics.sentence_lines(text), lines, stemmer=self.stemmer)


class Chrf(Grader, tag="chrf", frozen=True, kw_only=True):
    """chrF++ of each answer; BLEU and chrF++ of all answers together.

    `tokenizer` is BLEU's: `zh`, `ja-mecab`, `ko-mecab`, or `flores200` where its file is there.
    """

    tokenizer: str = "13a"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("chrf++",)

    @property
    def corpus(self) -> dict[str, dict[str, str]]:
        return {
            "corpus_chrf++": {"name": "chrf++"},
            "corpus_bleu": {"name": "bleu", "tokenizer": self.tokenizer},
        }

    def check(self) -> None:
        text_metrics.check_tokenizer(self.tokenizer)

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        words = [str(one) for one in references]
        return {"chrf++": text_metrics.chrf(text, words, word_order=2)}


class BertScore(Grader, tag="bert_score", frozen=True, kw_only=True):
    """BERTScore's F1, by the encoder in the directory `model`; see `text_metrics.bert_score`."""

    model: str
    num_layers: int

    @property
    def scores(self) -> tuple[str, ...]:
        return ("bert_score",)

    def check(self) -> None:
        if find_spec("bert_score") is None:
            raise ConfigError(
                "`grader.kind` is `bert_score`, and the package `bert-score` is not installed.",
                hint="pip install bert-score, which needs torch and transformers",
            )
        if not Path(self.model).is_dir():
            raise ConfigError(f"`grader.model` is `{self.model}`, which is no directory.")

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        words = [str(one) for one in references]
        (score,) = text_metrics.bert_score(
            [text], [words], model=Path(self.model), num_layers=self.num_layers
        )
        return {"bert_score": score}
