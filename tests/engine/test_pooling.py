"""The engine that pools: what it computes, packs, refuses and forgets."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.models.helpers import BACKENDS
from tests.pooling_models import (
    HIDDEN,
    add_modules,
    bert_tokenizer,
    causal_tokenizer,
    change_config,
    roberta_tokenizer,
    save,
)

from penstock.engine.client import ThreadClient
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.make import make_core
from penstock.engine.pooling import PoolingCore
from penstock.engine.process import ProcessClient
from penstock.errors import (
    ConfigError,
    ContextTooLong,
    EngineError,
    InvalidField,
    RequestError,
    UnsupportedModel,
)
from penstock.text.pooled import vector_of
from penstock.types import EngineRequest, FinishReason, SamplingParams

TOLERANCE = 1e-4


def core_of(path: Path, **options: Any) -> PoolingCore:
    options = {"backend": "torch", "num_threads": 1, "dtype": "float32"} | options
    core = make_core(EngineConfig(model=str(path), **options))
    assert isinstance(core, PoolingCore)
    return core


def request(name: str, ids: list[int], second_start: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=ids, params=SamplingParams(), second_start=second_start
    )


def vectors(core: PoolingCore, texts: list[list[int]]) -> list[NDArray[np.float32]]:
    """What the engine makes of some texts, in their order."""
    for number, ids in enumerate(texts):
        core.add(request(str(number), ids))
    found = {}
    while core.has_work:
        for event in core.step():
            assert event.finish is FinishReason.STOP
            assert event.token_ids == []
            found[int(event.request_id)] = vector_of(event.vector, event.request_id)
    assert set(found) == set(range(len(texts)))
    return [found[number] for number in range(len(texts))]


def random_texts(number: int, vocab_size: int, longest: int = 40) -> list[list[int]]:
    drawn = random.Random(5)
    lengths = [drawn.randint(1, longest) for _ in range(number)]
    return [[drawn.randrange(6, vocab_size) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("bert")
    return path, save(path, "BertModel", bert_tokenizer())


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_equal_sentence_transformers(tmp_path: Path, backend: str) -> None:
    """Mean of what transformers computes, of length 1, in batches with others and alone."""
    theirs = save(tmp_path, "BertModel", bert_tokenizer())
    add_modules(tmp_path)
    core = core_of(tmp_path, backend=backend, max_num_batched_tokens=100, max_num_seqs=7)
    texts = random_texts(40, 60)
    together = vectors(core, texts)
    assert core.stats.num_steps > 5
    assert core.stats.num_prompt_tokens == sum(map(len, texts))
    for ids, ours in zip(texts, together, strict=True):
        with torch.no_grad():
            hidden = theirs(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.abs(ours - expected).max() < TOLERANCE
        assert np.abs(ours - vectors(core, [ids])[0]).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_token_of_a_causal_model(tmp_path: Path, backend: str) -> None:
    theirs = save(tmp_path, "Qwen3Model", causal_tokenizer())
    core = core_of(tmp_path, backend=backend)
    texts = random_texts(9, len(causal_tokenizer()))
    for ids, ours in zip(texts, vectors(core, texts), strict=True):
        with torch.no_grad():
            last = theirs(torch.tensor([ids])).last_hidden_state[0, -1]
        assert np.abs(ours - torch.nn.functional.normalize(last, dim=0).numpy()).max() < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reranker_reads_both_texts(tmp_path: Path, backend: str) -> None:
    """BERT's second texts have a type of their own."""
    theirs = save(tmp_path, "BertForSequenceClassification", bert_tokenizer(), num_labels=1)
    core = core_of(tmp_path, backend=backend)
    ids = [2, 5, 6, 7, 3, 8, 9, 10, 3]
    types = [0] * 5 + [1] * 4
    scores = []
    for start, token_types in ((5, types), (0, [0] * 9)):
        core.add(request("a", ids, start))
        with torch.no_grad():
            expected = theirs(
                torch.tensor([ids]), token_type_ids=torch.tensor([token_types])
            ).logits.sigmoid()
        (event,) = core.step()
        scores.append(float(vector_of(event.vector, "a")[0]))
        assert abs(scores[-1] - float(expected)) < TOLERANCE
    assert abs(scores[0] - scores[1]) > 1e-3


def test_labels(tmp_path: Path) -> None:
    tokenizer = roberta_tokenizer()
    theirs = save(tmp_path, "XLMRobertaForSequenceClassification", tokenizer, num_labels=3)
    core = core_of(tmp_path)
    texts = random_texts(5, len(tokenizer))
    for ids, ours in zip(texts, vectors(core, texts), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].softmax(-1).numpy()
        assert np.abs(ours - expected).max() < TOLERANCE
    assert core.info.pooling is not None
    assert core.info.pooling.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_chat_model_pools_if_it_is_asked_to() -> None:
    core = make_core(EngineConfig(model="brook", runner="pooling", backend="torch", num_threads=1))
    assert isinstance(core, PoolingCore)
    assert core.info.pooling is not None
    assert core.info.pooling.kind == "last"
    assert len(vectors(core, [[5, 6, 7]])[0]) == core.info.pooling.size
    assert isinstance(
        make_core(EngineConfig(model="brook", num_threads=1, max_model_len=64)), EngineCore
    )


def test_which_runner(tmp_path: Path, bert: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="BertModel"):
        make_core(EngineConfig(model=str(bert[0]), runner="generate"))
    save(tmp_path, "Qwen3ForCausalLM", causal_tokenizer())
    assert isinstance(make_core(EngineConfig(model=str(tmp_path), backend="torch")), EngineCore)
    add_modules(tmp_path, "lasttoken")
    assert isinstance(make_core(EngineConfig(model=str(tmp_path), backend="torch")), PoolingCore)
    generate = EngineConfig(model=str(tmp_path), backend="torch", runner="generate")
    assert isinstance(make_core(generate), EngineCore)


def test_steps_take_whole_texts_in_order(bert: tuple[Path, Any]) -> None:
    core = core_of(bert[0], max_num_batched_tokens=64, max_num_seqs=3)
    lengths = [30, 30, 10, 1, 1, 1, 1, 64]
    for number, length in enumerate(lengths):
        core.add(request(str(number), [6] * length))
    assert core.stats.num_waiting == 8
    steps = []
    while core.has_work:
        steps.append([event.request_id for event in core.step()])
    assert steps == [["0", "1"], ["2", "3", "4"], ["5", "6"], ["7"]]
    assert core.stats.num_waiting == 0


def test_longest_text(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """As long as the model has positions, a step has tokens, and the checkpoint was made for."""
    assert core_of(bert[0]).info.max_model_len == 66
    assert core_of(bert[0], max_num_batched_tokens=20).info.max_model_len == 20
    save(tmp_path, "BertModel", bert_tokenizer())
    add_modules(tmp_path, max_len=32)
    core = core_of(tmp_path)
    assert core.info.max_model_len == 32
    assert any("of 66" in line for line in core.info.plan)
    assert core_of(tmp_path, max_model_len=50).info.max_model_len == 50
    with pytest.raises(ConfigError, match="max_model_len"):
        core_of(tmp_path, max_model_len=67)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        core_of(tmp_path, max_model_len=50, max_num_batched_tokens=49)
    core.add(request("a", [6] * 32))
    with pytest.raises(ContextTooLong, match="`33` tokens; at most `32`"):
        core.add(request("b", [6] * 33))
    assert len(core.step()) == 1


@pytest.mark.parametrize(
    ("ids", "second_start", "field"),
    [
        ([], 0, "prompt_token_ids"),
        ("abc", 0, "prompt_token_ids"),
        ([10**6], 0, "prompt_token_ids"),
        ([-1], 0, "prompt_token_ids"),
        ([1.5], 0, "prompt_token_ids"),
        ([6] * 10**6, 0, "prompt_token_ids"),
        ([6], 2, "second_start"),
        ([6], -1, "second_start"),
        ([6], "x", "second_start"),
    ],
)
def test_what_is_refused(bert_core: PoolingCore, ids: Any, second_start: Any, field: str) -> None:
    with pytest.raises(RequestError) as refused:
        bert_core.add(request("a", ids, second_start))
    assert refused.value.field == field
    assert not bert_core.has_work


@pytest.fixture(scope="module")
def bert_core(bert: tuple[Path, Any]) -> PoolingCore:
    return core_of(bert[0])


def test_ids_in_use_and_aborts(bert_core: PoolingCore) -> None:
    bert_core.add(request("a", [6]))
    bert_core.add(request("b", [7]))
    with pytest.raises(InvalidField, match="in use"):
        bert_core.add(request("a", [6]))
    (event,) = bert_core.abort("a")
    assert event.finish is FinishReason.ABORT
    assert bert_core.abort("a") == []
    assert [event.request_id for event in bert_core.step()] == ["b"]
    assert not bert_core.has_work


def test_a_step_that_fails_leaves_its_texts(
    bert_core: PoolingCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert_core.add(request("a", [6]))
    with monkeypatch.context() as patch:

        def interrupted(batch: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(bert_core._model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bert_core.step()
    assert [event.request_id for event in bert_core.step()] == ["a"]


def test_broken_weights_give_an_error(tmp_path: Path) -> None:
    theirs = save(tmp_path, "BertModel", bert_tokenizer())
    theirs.encoder.layer[0].intermediate.dense.weight.data[3, 4] = float("nan")
    theirs.save_pretrained(tmp_path)
    core = core_of(tmp_path)
    core.add(request("a", [6, 7]))
    (event,) = core.step()
    with pytest.raises(EngineError, match=r"`input\[0\]` is not finite"):
        vector_of(event.vector, "input[0]")


@pytest.mark.parametrize(
    "option",
    [
        {"num_blocks": 8},
        {"kv_cache_memory_bytes": 10**6},
        {"scheduling_policy": "priority"},
        {"long_prefill_token_threshold": 3},
        {"enforce_eager": True},
        {"tensor_parallel_size": 2},
    ],
)
def test_settings_without_a_use_are_refused(bert: tuple[Path, Any], option: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        core_of(bert[0], **option)


def test_a_classifier_is_not_kept(tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", bert_tokenizer(), num_labels=1)
    with pytest.raises(ConfigError, match="weight_cache"):
        core_of(tmp_path, weight_cache=str(tmp_path / "cache"))


def test_what_cannot_pool_is_told_before_loading(tmp_path: Path) -> None:
    save(tmp_path, "Qwen3ForCausalLM", causal_tokenizer())
    change_config(tmp_path, is_causal=False)
    with pytest.raises(UnsupportedModel, match="is_causal"):
        core_of(tmp_path, runner="pooling")


@pytest.mark.parametrize("client_of", [ThreadClient, ProcessClient])
def test_clients(bert: tuple[Path, Any], bert_core: PoolingCore, client_of: Any) -> None:
    """The same vectors through a thread and a process; a reader that leaves is forgotten."""

    async def run() -> None:
        config = EngineConfig(model=str(bert[0]), backend="torch", num_threads=1)
        client = client_of(config)
        try:
            await client.start()
            assert client.info.pooling.size == HIDDEN

            async def one(number: int, ids: list[int]) -> Any:
                events = [event async for event in client.generate(request(str(number), ids))]
                return vector_of(events[-1].vector, "x")

            texts = random_texts(30, 60)
            found = await asyncio.gather(*(one(*pair) for pair in enumerate(texts)))
            for ours, expected in zip(found, vectors(bert_core, texts), strict=True):
                assert np.abs(ours - expected).max() < 1e-5
            with pytest.raises(ContextTooLong, match="`99` tokens"):
                await one(0, [6] * 99)
            gone = asyncio.create_task(one(7, [6]))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert (await one(8, [6])) is not None
            assert client.stats.num_waiting == 0
        finally:
            await client.shutdown()

    asyncio.run(run())
