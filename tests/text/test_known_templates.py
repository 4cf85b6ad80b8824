"""Published chat templates: the text, and the tokens, that transformers makes of them."""

from __future__ import annotations

import html
import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tests.text.published import MISTRAL, byte_level, mistral, published
from transformers.utils import chat_template_utils

from penstock.errors import InvalidField
from penstock.text import filters
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": " Hi\n there  'x' <b> "}
ASSISTANT = {"role": "assistant", "content": "Hello.\n"}
MORE = {"role": "user", "content": '日本 😀 & <i>é</i> \t"q"\\'}


def parts(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def call(name: str, arguments: Any, identity: str = "abcdefghi") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def result(content: Any, identity: str = "abcdefghi", name: str = "weather") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "name": name, "content": content}


def calls(*tool_calls: dict[str, Any], content: Any = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}


ARGUMENTS = {"city": "Zürich", "days": 3, "deep": {"a": [1, None, True, 1.5]}}
FIRST, SECOND = call("weather", ARGUMENTS), call("clock", {}, "123456789")
THINK = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2\nis 4"}
TURN = [{"role": "user", "content": "Weather?"}, calls(FIRST), result('{"sun": true}')]
PARALLEL = [USER, calls(FIRST, SECOND), result("wet"), result("noon", "123456789", "clock")]
CONVERSATIONS: dict[str, list[Any]] = {
    "empty": [],
    "one": [USER],
    "system": [SYSTEM, USER],
    "system only": [SYSTEM],
    "turns": [USER, ASSISTANT, MORE],
    "many turns": [SYSTEM, USER, ASSISTANT, MORE, ASSISTANT, USER, ASSISTANT],
    "ends with assistant": [SYSTEM, USER, ASSISTANT],
    "late system": [USER, ASSISTANT, SYSTEM, MORE],
    "two systems": [SYSTEM, {"role": "system", "content": "Be brief."}, USER],
    "two users": [USER, MORE],
    "assistant first": [ASSISTANT, USER],
    "wrong": [ASSISTANT, SYSTEM, ASSISTANT],
    "unknown role": [{"role": "poet", "content": "x"}],
    "developer": [{"role": "developer", "content": "x"}, USER],
    "parts": [parts("user", "Hi", "there")],
    "parts of all": [parts("system", "s"), parts("user", "u"), parts("assistant", "a"), MORE],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}],
    "no content": [{"role": "user"}],
    "null content": [USER, {"role": "assistant", "content": None}, MORE],
    "empty content": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "no role": [{"content": "x"}],
    "tool turn": [SYSTEM, *TURN, ASSISTANT, USER],
    "tool result last": [SYSTEM, *TURN],
    "call last": [USER, calls(FIRST)],
    "null beside call": [USER, calls(FIRST, content=None), result("wet")],
    "words beside call": [USER, calls(FIRST, content="I look."), result("wet"), ASSISTANT],
    "parallel calls": [*PARALLEL, ASSISTANT],
    "arguments as text": [USER, calls(call("weather", '{"city": "Bern"}')), result("wet")],
    "result as parts": [USER, calls(FIRST), {**result(""), **parts("tool", "wet")}],
    "result without name": [USER, calls(FIRST), {"role": "tool", "content": "wet"}],
    "short call id": [USER, calls(call("weather", {}, "1")), result("wet", "1")],
    "reasoning": [USER, THINK, MORE],
    "reasoning in a tool turn": [USER, {**calls(FIRST), "thinking": "hm"}, result("wet"), THINK],
    "reasoning by another name": [USER, {**ASSISTANT, "reasoning": "hm"}, MORE],
    "reasoning inside": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        MORE,
    ],
    "thinking parts": [
        USER,
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}],
        },
        MORE,
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "It's é <b>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where"},
                    "days": {"type": "integer", "enum": [1, 2]},
                    "deep": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
    for name in ("weather", "clock")
]
UNION = {"name": "f", "parameters": {"properties": {"x": {"type": ["string", "null"]}}}}
DOCUMENTS = [{"title": "T", "text": "It rains."}, {"title": "U", "text": "é"}]
VARIANTS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False, "enable_thinking": False},
    {"add_generation_prompt": True, "tools": TOOLS},
    {
        "add_generation_prompt": False,
        "documents": DOCUMENTS,
        "enable_thinking": True,
        "custom_instructions": "c",
    },
]


class Noon(datetime):
    """A clock that stands, so that a test may run at midnight."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls(2026, 2, 3, 12, 0, 0)


@pytest.fixture(autouse=True)
def _noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "datetime", Noon)
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)


@cache
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL)


def reference(source: str, messages: Any, variables: dict[str, Any]) -> tuple[str | None, str]:
    """What transformers renders, or None and why the template refuses."""
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **SPECIAL, **variables
        )
    except TemplateError as error:
        return None, str(error)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None, ""
    text: str = rendered[0]
    # There `safe` makes Jinja escape what is concatenated to its result, which no author means
    # (mistral-common's issue 311).
    return html.unescape(text) if "|safe" in source else text, ""


def check(file: str, source: str, messages: Any, variables: dict[str, Any]) -> bool:
    """Equal, or both refuse: with the template's own words, in one sentence."""
    expected, reason = reference(source, messages, variables)
    try:
        text, message = compiled(source).render(messages, **variables), ""
    except InvalidField as error:
        text, message = None, error.message
    assert text == expected, file
    if text is None:
        assert message.startswith("The chat template cannot render `messages`: "), file
        assert reason.strip().rstrip(".") in message, file
    return text is not None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_as_transformers(data_dir: Path, name: str) -> None:
    templates = published(data_dir)
    num_equal = 0
    for file, source in templates:
        for variables in VARIANTS:
            num_equal += check(file, source, CONVERSATIONS[name], variables)
    assert len(templates) > 50
    if name in ("one", "turns", "many turns"):
        assert num_equal > 0.9 * len(VARIANTS) * len(templates)


def test_tools_that_some_templates_cannot_write(data_dir: Path) -> None:
    """One of them calls itself until Python gives up."""
    tools = [{"type": "function", "function": UNION}]
    variables = {"tools": tools, "add_generation_prompt": True}
    results = [check(*file, CONVERSATIONS["tool turn"], variables) for file in published(data_dir)]
    assert True in results
    assert False in results


def known(data: Path, name: str, directory: Path) -> tuple[Tokenizer, Any]:
    """Ours and transformers' tokenizer."""
    return mistral(data, name)[:2] if name in MISTRAL else byte_level(data, name, directory)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "v1", "v3", "v7"])
def test_tokens_as_transformers(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """From messages to ids, with the special tokens that a template writes."""
    ours, theirs = known(data_dir, name, tmp_path_factory.getbasetemp())
    names = theirs.special_tokens_map
    num_equal = 0
    for file, source in published(data_dir):
        if "|safe" in source:
            continue  # see `reference`
        template = ChatTemplate(source, names)
        for conversation in ("many turns", "parallel calls", "reasoning"):
            messages = CONVERSATIONS[conversation]
            variables: dict[str, Any] = {"tools": TOOLS if name == "v7" else None}
            try:
                ids = template.encode(ours, messages, add_generation_prompt=True, **variables)
            except InvalidField:
                continue
            text = template.render(messages, add_generation_prompt=True, **variables)
            if name in MISTRAL and text.startswith(" "):
                continue  # see `check_spaced`
            expected = theirs.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=True, **variables
            )
            assert ids == expected["input_ids"], file
            num_equal += 1
    assert num_equal > 60


def rewritten(text: str, messages: list[Any], version: int) -> str:
    """What Mistral's own library does to a conversation before it tokenizes, and templates do not:
    results that are JSON go in as such, and version 2 puts those of one turn into one list."""
    for message in messages:
        if message["role"] == "tool":
            try:
                content = json.loads(message["content"])
            except ValueError:
                continue
            quoted = json.dumps(message["content"], ensure_ascii=False)
            text = text.replace(quoted, json.dumps(content, ensure_ascii=False))
    return text.replace("][/TOOL_RESULTS][TOOL_RESULTS] [", ", ") if version == 2 else text


@pytest.mark.parametrize("version", [1, 2, 3])
def test_tokens_of_mistral_conversations(data_dir: Path, version: int) -> None:
    """Against the tokens that Mistral's own library gives, all that are in the data."""
    folder = data_dir / "tokenizer-mistral"
    tokenizer = load_tokenizer(folder / "data" / MISTRAL[f"v{version}"])
    source = (folder / "chat_templates" / f"v{version}_spm.jinja").read_text("utf-8")
    template = ChatTemplate(source, tokenizer.special_tokens)
    num_equal = 0
    for file in sorted((folder / "samples").glob(f"*/tokens_v{version}.json")):
        sample = json.loads(file.with_name("sample.json").read_text("utf-8"))
        messages = sample["messages"]
        for message in messages:
            for tool_call in message.get("tool_calls") or ():  # that library parses them
                function = tool_call["function"]
                function["arguments"] = json.loads(function["arguments"])
        prompt = {"tools": sample["tools"] or None, "add_generation_prompt": False}
        text = template.render(messages, **prompt)
        expected = json.loads(file.read_bytes())["tokens"]
        changed = rewritten(text, messages, version)
        ids = tokenizer.encode_guarded(changed)
        assert ids == expected, file.parent.name
        if changed == text:
            assert template.encode(tokenizer, messages, **prompt) == expected, file.parent.name
        num_equal += 1
    assert num_equal == {1: 1, 2: 6, 3: 6}[version]
