"""Our engine as lm-eval's model gives what lm-eval's own HFLM gives."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from penstock.errors import ConfigError
from penstock.hub import resolve_model
from penstock.measure.quality.harness.access import Access
from penstock.measure.quality.harness.model import EngineLM, rendered

TEXT = "the red house stands on a hill near the river and an old man sells 17 apples every day"
WORDS = TEXT.split()
QUESTION = "<|bos|><|user|>What is 17 + 25?<|end|><|assistant|>"
STORY = "<|bos|><|user|>Tell me a story.<|end|><|assistant|>"


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


LONG = words(1200, 0)


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


@pytest.fixture(scope="module")
def hflm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's HFLM on brook, without the `max_new_tokens` of its generation_config.json.

    HFLM lets that number win over the task's own `max_gen_toks`.
    """
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("brook")
    shutil.copytree(resolve_model("brook"), directory, dirs_exist_ok=True)
    config = json.loads((directory / "generation_config.json").read_text())
    del config["max_new_tokens"]
    (directory / "generation_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=8)


@pytest.mark.filterwarnings("ignore")
def test_loglikelihood_equals_hflm(access: Access, hflm: Any) -> None:
    pairs = [
        ("", "Hello world"),  # an empty context becomes the beginning of a sequence
        ("", "<|bos|>Hello"),
        (QUESTION, "42"),  # what it says
        (QUESTION, "17 + 25 = 43"),
        ("a space belongs to the continuation ", "here"),
        *((LONG, f" {words(count, count)}") for count in (1, 2, 7)),  # cut from the left
    ]
    for seed in range(5):  # contexts that are shared, long and short, continuations of all lengths
        context = words((5, 40, 150)[seed % 3], seed)
        pairs += [(context, f" {words(count, seed + count)}") for count in (1, 1, 3, 12)]
    lm, requests = access.lm, instances("loglikelihood", pairs)
    hflm._max_length = lm.max_length
    ours, theirs = lm.loglikelihood(requests), hflm.loglikelihood(requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert any(greedy for _, greedy in ours)
    assert [value for value, _ in ours] == pytest.approx(
        [value for value, _ in theirs], rel=1e-5, abs=1e-4
    )
    assert access.troubles.drain() == [
        "A prompt was cut from the left to `1022` tokens (`3` times)."
    ]


@pytest.mark.filterwarnings("ignore")
def test_rolling_loglikelihood_equals_hflm(access: Access, hflm: Any) -> None:
    """Texts of several windows, of one, and of none."""
    requests = instances("loglikelihood_rolling", [(LONG,), ("short text",), ("",)])
    hflm._max_length = access.lm.max_length
    ours = access.lm.loglikelihood_rolling(requests)
    assert ours == pytest.approx(hflm.loglikelihood_rolling(requests), rel=1e-6)
    assert ours[2] == 0
    num_tokens = len(access.lm.tok_encode(LONG))
    assert access.lm.max_length < num_tokens  # more than one window
    assert not access.troubles.drain()


@pytest.mark.filterwarnings("ignore")
def test_generations_equal_hflm(access: Access, hflm: Any) -> None:
    hflm._max_length = None  # the model's own
    cases = [
        (QUESTION, {"until": ["\n"], "max_gen_toks": 24}),
        (STORY, {"until": [], "max_gen_toks": 40}),
        (STORY, {"until": [" the", ". "], "max_gen_toks": 40}),
        (STORY, {"until": ["<|end|>"], "max_gen_toks": 40}),
        (
            words(30, 1),
            {"until": ["apples"], "max_gen_toks": 24, "temperature": 0.7, "do_sample": False},
        ),
        (LONG, {"until": [], "max_gen_toks": 20}),
    ]
    requests = instances("generate_until", cases)
    ours = access.lm.generate_until(requests)
    assert ours == hflm.generate_until(requests)
    assert ours[0] == "42"
    assert " the" not in ours[2]
    assert access.troubles.drain() == [
        "A prompt was cut from the left to `1004` tokens, to leave room for `20` of answer "
        "(`1` times)."
    ]


def test_a_special_token_as_stop_string(access: Access) -> None:
    """Its text is hidden in answers, so that it must be found as a token."""
    lm = access.lm
    assert lm._stops(["<|user|>", "\n", ""]) == (("\n",), (lm._text.token_id("<|user|>"),))


def test_sampled_answers_depend_on_seed_and_place_only(access: Access) -> None:
    case = (STORY, {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    first = access.lm.generate_until(instances("generate_until", [case] * 4))
    again = access.lm.generate_until(instances("generate_until", [case] * 2))
    assert first[:2] == again
    assert len(set(first)) > 1  # repeats of a document are not copies


def test_results_keep_the_order_and_scores_do_not_depend_on_company(access: Access) -> None:
    pairs = [(words(20 + 7 * seed, seed), f" {words(1 + seed % 3, seed)}") for seed in range(8)]
    together = access.lm.loglikelihood(instances("loglikelihood", pairs))
    alone = [access.lm.loglikelihood(instances("loglikelihood", [pair]))[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([v for v, _ in alone], abs=1e-4)


def test_choices_share_their_context(access: Access) -> None:
    """Four long choices of one context compute little more than the context once."""
    context = words(300, 77)
    stats, lm = access.lm._llm.core.stats, access.lm
    before = stats.num_prompt_tokens
    lm.loglikelihood(instances("loglikelihood", [(context, f" {words(4, s)}") for s in range(4)]))
    num_context = len(lm.tok_encode(context))
    assert stats.num_prompt_tokens - before < 2 * num_context


def test_wrong_settings(access: Access) -> None:
    with pytest.raises(ConfigError, match=r"`max_length` is `5000`"):
        EngineLM(access.lm._llm, max_length=5000)
    lm = access.lm
    with pytest.raises(ConfigError, match=r"up to `1280` tokens of answer"):
        lm.generate_until(instances("generate_until", [("x", {"max_gen_toks": 1280})]))
    with pytest.raises(ConfigError, match="`num_beams`"):
        lm.generate_until(instances("generate_until", [("x", {"num_beams": 4})]))
    with pytest.raises(ConfigError, match="A continuation has"):
        lm.loglikelihood(instances("loglikelihood", [("x", " " + LONG)]))


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """brook with a tokenizer that begins every text, as Llama's and Mistral's do."""
    shutil.copytree(resolve_model("brook"), tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, texts[0]],
        "pair": [bos, *texts],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_special_tokens_as_hflm_adds_them(
    with_bos: Path, access: Access, hflm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of our client of `local-completions`, whose original leaves them out."""
    from transformers import AutoTokenizer

    from penstock.measure.quality.harness.http import _Completions
    from penstock.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(with_bos)
    monkeypatch.setattr(access.lm, "_text", tokenizer)
    monkeypatch.setattr(hflm, "tokenizer", AutoTokenizer.from_pretrained(with_bos))
    client = _Completions.__new__(_Completions)
    client.tokenizer_backend = "remote"
    client.tokenizer = SimpleNamespace(  # type: ignore[assignment]
        bos_token="<|bos|>",
        encode=lambda text, special: tokenizer.encode(text, add_special_tokens=special),
    )
    for lm in (access.lm, client):
        for text in ("Hello there", "<|bos|>Hello there", ""):
            assert lm.tok_encode(text) == hflm.tok_encode(text)
        assert lm.tok_encode("Hello")[0] == 0
        assert lm.tok_encode("Hello", add_special_tokens=False)[0] != 0
        for pair in (("A context", " goes on"), ("<|bos|>A context ", "goes on")):
            assert lm._encode_pair(*pair) == hflm._encode_pair(*pair)


@pytest.mark.filterwarnings("ignore")
def test_chat_template_equals_hflm(access: Access, hflm: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2? "},
        {"role": "assistant", "content": "The answer is "},
    ]
    for chat, open_end in ((messages[:2], True), (messages, False)):
        ours = access.lm.apply_chat_template(chat, add_generation_prompt=open_end)
        assert ours == hflm.apply_chat_template(chat, add_generation_prompt=open_end)
    assert access.lm.chat_template(True) == hflm.chat_template(True)
    assert Path(access.lm.tokenizer_name).name == access.lm.tokenizer_name


def test_a_template_without_system_messages(access: Access) -> None:
    from penstock.text.template import ChatTemplate

    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert rendered(template, messages, True, access.troubles) == "[b]"
    assert "left out" in access.troubles.drain()[0]
