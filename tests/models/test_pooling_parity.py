"""Hidden states and scores of every architecture that is pooled equal those of transformers.

Texts of different lengths are computed one by one and together, in blocks that are not full.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.configs_pooling import POOLING_CONFIGS
from tests.models.helpers import BACKENDS, Sessions, load

from penstock.errors import PenstockError, UnsupportedModel, WeightMismatch
from penstock.models.architectures import POOLING_ARCHITECTURES
from penstock.models.base import Model
from penstock.models.spec import ModelSpec

TOLERANCE = 1e-4
LENGTHS = (41, 1, 7, 16, 23)
VARIANTS = [(name, variant) for name, variants in POOLING_CONFIGS.items() for variant in variants]


class Case(NamedTuple):
    model: Model
    rows: dict[str, list[int]]
    hidden: dict[str, Any]  # [length, hidden] by transformers
    scores: dict[str, Any]  # [labels], of models that classify


def oracle(architecture: str, variant: str, seed: int) -> Any:
    """A transformers model with random weights; biases and scales are random as well."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture)
    config = kind.config_class(**POOLING_CONFIGS[architecture][variant])
    config._attn_implementation = "eager"
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def body(model: Any) -> Any:
    """The part of a transformers model that has no head."""
    return getattr(model, model.base_model_prefix, model)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(variant))
def case(
    request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    seed = VARIANTS.index(request.param)
    theirs = oracle(*request.param, seed)
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    rows, hidden, scores = {}, {}, {}
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(6, theirs.config.vocab_size, (1, length), generator=generator)
        name = f"r{index}"
        rows[name] = ids[0].tolist()
        with torch.no_grad():
            hidden[name] = body(theirs)(ids).last_hidden_state[0].numpy()
            if "Classification" in request.param[0]:
                scores[name] = theirs(ids).logits[0].numpy()
    return Case(load(path, backend=backend), rows, hidden, scores)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("is_together", [False, True])
def test_hidden_states_equal_transformers(case: Case, block_size: int, is_together: bool) -> None:
    model = case.model
    sessions = Sessions(model, block_size=block_size)
    steps = [case.rows] if is_together else [{name: ids} for name, ids in case.rows.items()]
    for step in steps:
        batch = sessions.batch(step)
        batch.logit_rows = np.empty(0, np.int64)
        model.forward(batch)
        hidden = model.hidden(np.arange(len(batch.input_ids)))
        assert hidden.dtype == np.float32
        for name, ours in zip(step, np.split(hidden, batch.query_start[1:-1]), strict=True):
            theirs = case.hidden[name]
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() < TOLERANCE
            assert theirs.std() > 0.1
            if name in case.scores:
                picked = ours[-1:] if model.spec.arrangement == "pre" else ours[:1]
                scores = model.classify(picked)[0]
                assert np.abs(scores - case.scores[name]).max() < TOLERANCE


def test_scores_differ_between_texts(case: Case) -> None:
    """A classifier whose scores hardly vary would agree with anything."""
    if case.scores:
        assert np.std(np.stack(list(case.scores.values())), axis=0).max() > 0.01


def test_every_architecture_has_a_config() -> None:
    assert set(POOLING_CONFIGS) == set(POOLING_ARCHITECTURES)
    assert all(len(variants) >= 1 for variants in POOLING_CONFIGS.values())


def test_token_types(tmp_path: Path, backend: str) -> None:
    """A token of type t has its position t tables further on."""
    theirs = oracle("BertModel", "types", 3)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, backend=backend)
    ids = torch.randint(6, 101, (1, 12), generator=torch.Generator().manual_seed(3))
    types = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    with torch.no_grad():
        expected = theirs(ids, token_type_ids=types).last_hidden_state[0].numpy()
    batch = Sessions(model, block_size=16).batch({"a": ids[0].tolist()})
    batch.positions += types[0].numpy() * model.spec.num_positions
    model.forward(batch)
    assert np.abs(model.hidden(np.arange(12)) - expected).max() < TOLERANCE


def test_names_without_the_body_prefix(tmp_path: Path) -> None:
    """Checkpoints that sentence-transformers has saved have the names of the body alone."""
    theirs = oracle("Qwen3Model", "plain", 1)
    theirs.config.architectures = ["Qwen3ForCausalLM"]
    theirs.config.tie_word_embeddings = True
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"Qwen3Model"', '"Qwen3ForCausalLM"'))
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state[0].numpy()
    model = load(tmp_path)
    model.forward(Sessions(model, block_size=16).batch({"a": ids[0].tolist()}))
    assert np.abs(model.hidden(np.arange(14)) - expected).max() < TOLERANCE


def test_names_of_the_first_checkpoints(tmp_path: Path) -> None:
    """Norms whose scale is called gamma and whose bias is called beta, as in bert-base-uncased."""
    theirs = oracle("BertModel", next(iter(POOLING_CONFIGS["BertModel"])), 0)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file(old, file, {"format": "pt"})
    row = list(range(5, 20))
    sessions = Sessions(load(tmp_path), block_size=16)
    sessions.model.forward(sessions.batch({"a": row}))
    ours = sessions.model.hidden(np.arange(len(row)))
    with torch.no_grad():
        expected = theirs(torch.tensor([row])).last_hidden_state[0].numpy()
    assert np.abs(ours - expected).max() < TOLERANCE


def test_a_head_that_is_missing_is_told(tmp_path: Path) -> None:
    theirs = oracle("BertModel", "plain", 1)
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("BertModel", "BertForSequenceClassification"))
    with pytest.raises(WeightMismatch, match=r"classifier\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"type_vocab_size": 10**9}, "type_vocab_size"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": 7}, "id2label"),
        ({"num_labels": 2**30}, "num_labels"),
        ({"architectures": ["XLMRobertaModel"], "max_position_embeddings": 1}, "max_position"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str) -> None:
    config = {
        "architectures": ["BertForSequenceClassification"],
        **POOLING_CONFIGS["BertModel"]["plain"],
        **changes,
    }
    config.pop("initializer_range")
    with pytest.raises(UnsupportedModel, match=told):
        ModelSpec.from_hf(config)


def test_errors_are_ours() -> None:
    with pytest.raises(PenstockError):
        ModelSpec.from_hf({"architectures": ["BertModel"]})
