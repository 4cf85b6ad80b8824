"""Text metrics by the field's own packages: BLEU and chrF (sacrebleu), ROUGE (rouge-score).

Nothing is computed here that those packages compute, so that figures can be compared with
published ones; the signature of sacrebleu is stored with every figure. Percentages as they print
them become shares of 1 here. Each package is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import ConfigError

CORPUS = ("bleu", "chrf", "chrf++")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class CorpusScore(NamedTuple):
    """A score from 0 to 1 of all answers together, and sacrebleu's signature of it."""

    score: float
    signature: str


def check_tokenizer(name: str) -> None:
    """Raise ConfigError for a tokenizer that sacrebleu does not know, or cannot use here."""
    from sacrebleu.metrics.bleu import BLEU

    try:
        BLEU(tokenize=name)
    except (AssertionError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"`grader.tokenizer` is `{name}`, which sacrebleu cannot use.", hint=str(error)[:200]
        ) from None
    except KeyError:
        raise ConfigError(f"`grader.tokenizer` is `{name}`, unknown to sacrebleu.") from None


@cache
def _metric(name: str, tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "bleu":
        return BLEU(tokenize=tokenizer)
    if name in CORPUS:
        return CHRF(word_order=2 if name == "chrf++" else 0)
    raise ConfigError(
        f"`{name}` is no text metric of a whole corpus.",
        hint=f"known: {', '.join(f'`{one}`' for one in CORPUS)}",
    )


def corpus(
    name: str,
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = "13a",
) -> CorpusScore:
    """BLEU (Papineni et al. 2002), chrF or chrF++ (Popović 2015, 2017) of a corpus.

    Args:
        references: one or more for each output.
        tokenizer: of BLEU; `zh`, `ja-mecab` and `ko-mecab` for languages without spaces.
    """
    metric = _metric(name, tokenizer)
    most = max((len(each) for each in references), default=1)
    # sacrebleu wants one stream for each place; an item with fewer references has None there.
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    score = metric.corpus_score(list(outputs), streams)
    return CorpusScore(score.score / 100, str(metric.get_signature()))


def chrf(output: str, references: Sequence[str], *, word_order: int = 0) -> float:
    """chrF of one sentence; with `word_order=2`, chrF++."""
    metric = _metric("chrf++" if word_order == 2 else "chrf", "")
    return float(metric.sentence_score(output, list(references)).score) / 100


@cache
def _rouge(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=stemmer)


def rouge(output: str, references: Sequence[str], *, stemmer: bool = True) -> dict[str, float]:
    """F measures of ROUGE-1, -2, -L and -Lsum (Lin 2004) of the best reference of each.

    ROUGE-Lsum takes a line for a sentence: put one on each line (`sentence_lines`). The stemmer is
    Porter's, for English, as the summarisation tasks of the field have it.
    """
    scores = _rouge(stemmer).score_multi(list(references), output)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


def sentence_lines(text: str) -> str:
    """A sentence on each line, for ROUGE-Lsum; lines that are there already stay."""
    from penstock.measure.quality.ifeval.words import sentences

    return "\n".join(one for line in text.split("\n") for one in sentences(line))


def bert_score(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    model: Path,
    num_layers: int,
    batch_size: int = 16,
) -> list[float]:
    """F1 of BERTScore (Zhang et al. 2020) for each output, not rescaled.

    Needs the package `bert-score` (which needs torch and transformers) and a directory with an
    encoder's weights and tokenizer; the layer that suits a model stands in the package's
    `model2layers`, such as 17 for roberta-large. Figures of different encoders or layers cannot
    be compared.

    Raises:
        ConfigError: the package is not there, or `model` is no directory.
    """
    try:
        from bert_score import BERTScorer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"BERTScore needs `{error.name}`, which is not installed.",
            hint="pip install bert-score",
        ) from None
    if not model.is_dir():
        raise ConfigError(f"`{model}` is no directory of an encoder.")
    scorer = BERTScorer(model_type=str(model), num_layers=num_layers, batch_size=batch_size)
    _, _, f1 = scorer.score(list(outputs), [list(each) for each in references])
    return [float(value) for value in f1]
