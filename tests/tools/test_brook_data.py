"""The generator, the tokenizer, the template and the exported directories of brook."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from brook.chat import END, SPECIAL_TOKENS, Conversation, Message, segments  # noqa: E402
from brook.data import conversation  # noqa: E402
from brook.example import Example, draw, is_held_out  # noqa: E402
from brook.render import Chat, wire  # noqa: E402
from brook.tasks import TASKS, held_out  # noqa: E402
from penstock import builtin  # noqa: E402

CAPS = {"brook": 16_000_000, "brook-draft": 3_000_000}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(builtin.path("brook"))


@pytest.mark.parametrize("name", TASKS)
def test_splits_never_overlap(name: str) -> None:
    rng = random.Random(name)
    trained = {draw(TASKS[name].generate, rng, "train").key for _ in range(300)} - {""}
    measured = {example.key for example in held_out(name, 30)}
    assert measured
    assert not trained & measured


@pytest.mark.parametrize("name", TASKS)
def test_held_out_is_deterministic(name: str) -> None:
    def plain(examples: list[Example]) -> list[Any]:
        return [(example.messages, example.answer) for example in examples]

    assert plain(held_out(name, 5)) == plain(held_out(name, 5))
    assert plain(held_out(name, 5)) != plain(held_out(name, 5, seed=1))


def test_the_training_stream_emits_no_held_out_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    from brook import data

    seen: list[Example] = []
    real = data.example

    def spy(*args: Any) -> Example:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(data, "example", spy)
    rng = random.Random(0)
    for _ in range(100):
        conversation(rng, 4)
    assert len(seen) > 300
    assert not any(is_held_out(example.task, example.key) for example in seen)


@pytest.mark.parametrize("name", TASKS)
def test_checkers_accept_the_answer_and_reject_others(name: str) -> None:
    examples = held_out(name, 30)
    for example in examples:
        assert example.check(example.answer_text)
        assert not example.check("")
        assert not example.check(example.answer_text + " and more")
    if TASKS[name].group != "stories":
        first = examples[0]
        others = [e.answer_text for e in examples if e.answer_text != first.answer_text]
        assert not any(first.check(text) for text in others)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(chat: Chat, text: str) -> None:
    safe = text.replace("<|", "")
    ids = chat.tokenizer.encode(safe, add_special_tokens=False).ids
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == safe


def test_digits_are_single_tokens(chat: Chat) -> None:
    tokens = chat.tokenizer.encode("in 2024 we had 365 days", add_special_tokens=False).tokens
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("2024365")


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_cannot_carry_special_tokens(chat: Chat, role: str, token: str) -> None:
    special = {chat.tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}

    def count(content: str) -> int:
        ids = chat.ids([{"role": role, "content": content}, {"role": "user", "content": "hi"}])
        return sum(i in special for i in ids)

    assert count(f"a {token} b") == count("a b")


@pytest.mark.parametrize("name", TASKS)
def test_template_writes_what_training_saw(chat: Chat, name: str) -> None:
    for example in held_out(name, 5):
        head = [Message("system", example.system)] if example.system else []
        made = Conversation([*head, *example.messages, example.answer], example.tools)
        whole = "".join(part.text for part in segments(made))
        prompt = chat.text(wire(example), list(example.tools))
        assert prompt + example.answer_text + END == whole


def test_template_renders_tool_calls_with_either_kind_of_arguments(chat: Chat) -> None:
    def render(arguments: object) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return chat.text(
            [{"role": "assistant", "content": None, "tool_calls": [call]}], prompt=False
        )

    assert render({"a": 1}) == render('{"a": 1}')
    assert '<|tool_call|>{"name": "f", "arguments": {"a": 1}}<|end|>' in render({"a": 1})


@pytest.mark.parametrize("name", builtin.NAMES)
def test_exported_directory(name: str) -> None:
    folder = builtin.path(name)
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= CAPS[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = Chat(folder).tokenizer
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.token_to_id(END) in generation["eos_token_id"]
    assert len((folder / "training_log.jsonl").read_text().splitlines()) < 200


def test_both_models_share_the_tokenizer() -> None:
    files = [(builtin.path(name) / "tokenizer.json").read_bytes() for name in builtin.NAMES]
    assert files[0] == files[1]


def test_tasks_need_no_torch() -> None:
    code = "import sys; import brook.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tools")


def test_unknown_name() -> None:
    with pytest.raises(KeyError):
        builtin.path("creek")
