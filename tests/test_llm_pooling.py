"""The offline API with models that pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pooling_models import add_modules, bert_tokenizer, change_config, roberta_tokenizer, save

from penstock import LLM
from penstock.errors import ContextTooLong, EngineError, InvalidField

TEXTS = ["a quick brown fox", "the river was cold", "dog", "and the water runs over the bank"]


def llm_of(path: Path, **options: Any) -> LLM:
    return LLM(str(path), backend="torch", num_threads=1, **options)


def expected(model: Any, tokenizer: Any, text: str) -> Any:
    """The mean of the last hidden states, of length 1."""
    with torch.no_grad():
        hidden = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Any, Any]:
    path, tokenizer = tmp_path_factory.mktemp("bert"), bert_tokenizer()
    model = save(path, "BertModel", tokenizer)
    prompts = {"query": "the fox jumps ", "document": ""}
    add_modules(path, prompts=prompts)
    change_config(path, matryoshka_dimensions=[8, 32])
    return llm_of(path), model, tokenizer


def test_embed(bert: tuple[LLM, Any, Any]) -> None:
    llm, model, tokenizer = bert
    found = llm.embed(TEXTS, progress=False)
    for text, one in zip(TEXTS, found, strict=True):
        assert one.prompt == text
        assert one.prompt_token_ids == tokenizer(text)["input_ids"]
        assert one.vector.dtype == np.float32
        assert np.abs(one.vector - expected(model, tokenizer, text)).max() < 1e-4
    (ids,) = llm.embed(found[0].prompt_token_ids)
    assert ids.prompt is None
    assert np.abs(ids.vector - found[0].vector).max() < 1e-6


def test_prompts(bert: tuple[LLM, Any, Any]) -> None:
    llm, model, tokenizer = bert
    (one,) = llm.embed("a dog", prompt_name="query")
    whole = expected(model, tokenizer, "the fox jumps a dog")
    assert np.abs(one.vector - whole).max() < 1e-4
    with pytest.raises(InvalidField, match="`document`"):
        llm.embed("a dog", prompt_name="passage")


def test_dimensions(bert: tuple[LLM, Any, Any]) -> None:
    llm, _, _ = bert
    (whole,) = llm.embed("a dog")
    (short,) = llm.embed("a dog", dimensions=8)
    assert short.vector.shape == (8,)
    assert np.allclose(short.vector, whole.vector[:8] / np.linalg.norm(whole.vector[:8]), atol=1e-6)
    with pytest.raises(InvalidField, match="8, 32"):
        llm.embed("a dog", dimensions=9)


def test_truncation(bert: tuple[LLM, Any, Any]) -> None:
    llm, _, tokenizer = bert
    text = "dog " * 200
    with pytest.raises(ContextTooLong, match="`202` tokens"):
        llm.embed(["a", text])
    assert not llm.core.has_work
    for limit, number in ((-1, 66), (10, 10)):
        (one,) = llm.embed(text, truncate_prompt_tokens=limit)
        assert one.prompt_token_ids == tokenizer(text, truncation=True, max_length=number).input_ids
    with pytest.raises(InvalidField, match="truncate_prompt_tokens"):
        llm.embed(text, truncate_prompt_tokens=67)


def test_score_by_embeddings(bert: tuple[LLM, Any, Any]) -> None:
    llm, _, _ = bert
    first, *others = [one.vector for one in llm.embed(TEXTS)]
    scores = llm.score(TEXTS[0], TEXTS[1:])
    assert np.allclose(scores, [float(first @ other) for other in others], atol=1e-6)
    assert np.allclose(llm.score(TEXTS, TEXTS), 1.0, atol=1e-6)
    with pytest.raises(InvalidField, match="queries"):
        llm.score(TEXTS[:2], TEXTS[:3])
    with pytest.raises(InvalidField, match="documents"):
        llm.score(TEXTS[0], [])


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("BertForSequenceClassification", bert_tokenizer),
        ("XLMRobertaForSequenceClassification", roberta_tokenizer),
    ],
)
def test_score_by_a_classifier(tmp_path: Path, kind: str, make: Any) -> None:
    tokenizer = make()
    model = save(tmp_path, kind, tokenizer, num_labels=1)
    llm = llm_of(tmp_path)
    scores = llm.score("a quick fox", TEXTS, progress=False)
    for text, score in zip(TEXTS, scores, strict=True):
        given = tokenizer([["a quick fox", text]], return_tensors="pt", return_token_type_ids=True)
        given = {key: given[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            theirs = float(model(**given).logits.sigmoid())
        assert abs(score - theirs) < 1e-4
    assert np.std(scores) > 1e-3
    with pytest.raises(InvalidField, match="cannot `embed`"):
        llm.embed(TEXTS)


def test_classify(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    model = save(tmp_path, "BertForSequenceClassification", tokenizer, num_labels=3)
    llm = llm_of(tmp_path)
    for text, one in zip(TEXTS, llm.classify(TEXTS), strict=True):
        with torch.no_grad():
            theirs = model(**tokenizer([text], return_tensors="pt")).logits[0].softmax(-1)
        assert np.abs(one.vector - theirs.numpy()).max() < 1e-4
    with pytest.raises(InvalidField, match="`3` labels"):
        llm.score("a", "b")


def test_what_a_model_is_not_for(bert: tuple[LLM, Any, Any]) -> None:
    llm, _, _ = bert
    with pytest.raises(InvalidField, match="writes no text"):
        llm.generate("a dog")
    with pytest.raises(InvalidField, match="cannot `classify`"):
        llm.classify("a dog")
    brook = LLM("brook", num_threads=1, max_model_len=64, backend="torch")
    with pytest.raises(InvalidField, match="cannot `embed`"):
        brook.embed("a dog")


def test_broken_weights_are_told(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    model = save(tmp_path, "BertModel", tokenizer)
    model.embeddings.LayerNorm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    llm = llm_of(tmp_path)
    with pytest.raises(EngineError, match="not finite"):
        llm.embed(TEXTS)
    assert not llm.core.has_work
