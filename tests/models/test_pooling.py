"""How a checkpoint pools: what its files say, what is refused, and the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.configs_pooling import POOLING_CONFIGS
from tests.pooling_models import HIDDEN, add_modules

from penstock.errors import ModelLoadError, UnsupportedModel
from penstock.models.pooling import (
    Kind,
    PoolingSpec,
    activated,
    has_modules,
    normalised,
    pooled,
    read_pooling,
    rows_of,
)
from penstock.models.spec import ModelSpec

BERT = POOLING_CONFIGS["BertModel"]["plain"] | {"architectures": ["BertModel"]}
QWEN = POOLING_CONFIGS["Qwen3Model"]["plain"] | {"architectures": ["Qwen3ForCausalLM"]}
RANK = {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "yes"}}
RANK = POOLING_CONFIGS["XLMRobertaModel"]["plain"] | RANK


def read(path: Path, config: dict[str, Any] = BERT) -> PoolingSpec:
    return read_pooling(path, ModelSpec.from_hf(config), config)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_defaults(tmp_path: Path) -> None:
    assert not has_modules(tmp_path)
    assert read(tmp_path).kind == "cls"
    assert read(tmp_path).is_normalised
    assert read(tmp_path, QWEN).kind == "last"
    assert read(tmp_path / "a.gguf", BERT | {"pooling_type": "mean"}).kind == "mean"
    assert read(tmp_path / "a.gguf", BERT | {"pooling_type": "none"}).kind == "cls"
    with pytest.raises(UnsupportedModel, match="rank"):
        read(tmp_path / "a.gguf", BERT | {"pooling_type": "rank"})


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("cls_token", "cls"),
        ("mean_tokens", "mean"),
        ("max_tokens", "max"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len"),
        ("lasttoken", "last"),
    ],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_modules(tmp_path: Path, mode: str, kind: str, normalise: bool) -> None:
    add_modules(tmp_path, mode, normalise=normalise, max_len=32, prompts={"q": "ask: "})
    spec = read(tmp_path)
    assert has_modules(tmp_path)
    assert (spec.kind, spec.is_normalised, spec.max_len) == (kind, normalise, 32)
    assert spec.prompts == {"q": "ask: "}
    assert spec.default_prompt is None


def test_texts_are_lowercased_if_the_checkpoint_says_so(tmp_path: Path) -> None:
    """As the files of BGE v1.5 do."""
    add_modules(tmp_path, max_len=32)
    assert not read(tmp_path).is_lowercased
    rewrite(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    assert read(tmp_path).is_lowercased


def test_newer_pooling_file(tmp_path: Path) -> None:
    add_modules(tmp_path)
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"embedding_dimension": HIDDEN, "pooling_mode": "lasttoken"}))
    assert read(tmp_path).kind == "last"
    file.write_text(json.dumps({"pooling_mode": "weightedmean"}))
    with pytest.raises(UnsupportedModel, match="pooling_mode"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "no mode"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": 3}, "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 7}, "word_embedding_dimension"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": -3}, "max_seq_length"),
        ("config_sentence_transformers.json", {"prompts": {"a": 3}}, "prompts"),
        ("config_sentence_transformers.json", {"prompts": {"a": "x" * 10**6}}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "z"}, "default_prompt_name"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "similarity"),
    ],
)
def test_what_is_refused(tmp_path: Path, file: str, changes: dict[str, Any], told: str) -> None:
    add_modules(tmp_path, max_len=32)
    read(tmp_path)
    rewrite(tmp_path / file, **changes)
    with pytest.raises(UnsupportedModel, match=told):
        read(tmp_path)


def test_weighted_mean_is_refused_by_name(tmp_path: Path) -> None:
    add_modules(tmp_path, "weightedmean_tokens")
    with pytest.raises(UnsupportedModel, match="pooling_mode_weightedmean_tokens"):
        read(tmp_path)


@pytest.mark.parametrize(
    "modules",
    [
        {},
        [],
        [3],
        [{"type": "x.Transformer"}],
        [{"type": "x.Transformer", "path": ""}],
        [{"type": "x.Transformer", "path": "0_T"}, {"type": "x.Pooling", "path": "1_Pooling"}],
        [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": ".."}],
        [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "/etc"}],
        [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "a\0b"}],
        [
            {"type": "x.Transformer", "path": ""},
            {"type": "x.Pooling", "path": "1_Pooling"},
            {"type": "x.Dense", "path": "2_Dense"},
        ],
        [{"type": "x.WordEmbeddings", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}],
    ],
)
def test_hostile_modules(tmp_path: Path, modules: Any) -> None:
    add_modules(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadError):
        read(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"\xff\xfe", b"nothing"])
def test_damaged_modules(tmp_path: Path, data: bytes) -> None:
    add_modules(tmp_path)
    (tmp_path / "modules.json").write_bytes(data)
    with pytest.raises(ModelLoadError):
        read(tmp_path)


def test_matryoshka(tmp_path: Path) -> None:
    assert read(tmp_path).dimensions is None
    assert read(tmp_path, BERT | {"is_matryoshka": True}).dimensions == ()
    assert read(tmp_path, BERT | {"matryoshka_dimensions": [32, 8]}).dimensions == (8, 32)
    for wrong in ([], [0], [10**6], ["8"], 8, [True]):
        with pytest.raises(UnsupportedModel, match="matryoshka_dimensions"):
            read(tmp_path, BERT | {"matryoshka_dimensions": wrong})


def test_bidirectional_causal_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="is_causal"):
        read(tmp_path, QWEN | {"is_causal": False})
    read(tmp_path, QWEN | {"is_causal": True})


def test_classifiers(tmp_path: Path) -> None:
    spec = read(tmp_path, RANK)
    assert (spec.kind, spec.activation, spec.labels) == ("cls", "sigmoid", ("yes",))
    three = RANK | {"id2label": {str(i): f"l{i}" for i in range(3)}}
    assert read(tmp_path, three).activation == "softmax"
    assert read(tmp_path, three).labels == ("l0", "l1", "l2")
    several = three | {"problem_type": "multi_label_classification"}
    assert read(tmp_path, several).activation == "sigmoid"
    old = "sbert_ce_default_activation_function"
    identity = "torch.nn.modules.linear.Identity"
    assert read(tmp_path, RANK | {old: identity}).activation == "identity"
    new = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    assert read(tmp_path, RANK | new).activation == "sigmoid"
    with pytest.raises(UnsupportedModel, match="Tanh"):
        read(tmp_path, RANK | {old: "torch.nn.modules.activation.Tanh"})


# --- formulas: those of sentence-transformers' Pooling, over padded tensors with a mask ---


def published(kind: Kind, hidden: list[torch.Tensor]) -> torch.Tensor:
    """As sentence-transformers computes it (models/Pooling.py), on a padded batch."""
    padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True, padding_value=7.0)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(part)) for part in hidden], batch_first=True
    )[..., None].expand_as(padded)
    if kind == "cls":
        return padded[:, 0]
    if kind == "last":
        last = mask[..., 0].sum(1).long() - 1
        return padded[torch.arange(len(hidden)), last]
    if kind == "max":
        return padded.masked_fill(mask == 0, -1e9).max(1)[0]
    total, count = (padded * mask).sum(1), mask.sum(1).clamp(min=1e-9)
    return total / (count if kind == "mean" else count.sqrt())


@pytest.mark.parametrize("kind", ["cls", "mean", "max", "mean_sqrt_len", "last"])
def test_formulas(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 17, 2]
    hidden = [torch.randn(length, 24, generator=generator) * 3 for length in lengths]
    flat = torch.cat(hidden).numpy()
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ours, theirs = pooled(kind, flat, start), published(kind, hidden).numpy()
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5
    unit = torch.nn.functional.normalize(torch.from_numpy(theirs), dim=-1).numpy()
    assert np.abs(normalised(ours) - unit).max() < 1e-6
    rows = rows_of(kind, start)
    if rows is None:
        assert kind not in {"cls", "last"}
    else:
        assert np.array_equal(flat[rows], ours)
    for index, part in enumerate(hidden):  # alone exactly as among others
        alone = pooled(kind, part.numpy(), np.array([0, len(part)], np.int32))
        assert np.array_equal(alone[0], ours[index])


def test_a_vector_of_nothing_stays() -> None:
    assert not normalised(np.zeros((2, 4), np.float32)).any()


def test_activations() -> None:
    scores = np.array([[-800.0, 0.5, 3.0], [90.0, -90.0, 0.0]], np.float32)
    tensor = torch.from_numpy(scores)
    assert np.array_equal(activated("identity", scores), scores)
    assert np.allclose(activated("sigmoid", scores), torch.sigmoid(tensor).numpy(), atol=1e-7)
    assert np.allclose(activated("softmax", scores), torch.softmax(tensor, -1).numpy(), atol=1e-7)
