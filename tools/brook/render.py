"""Renders a conversation with the exported chat template, in a Jinja sandbox, to token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .example import Example


def _raise(message: str) -> str:
    raise ValueError(message)


class Chat:
    """The tokenizer and template of an exported directory."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        env.globals["raise_exception"] = _raise
        self.template = env.from_string((folder / "chat_template.jinja").read_text())

    def text(self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = True) -> str:
        """The rendered conversation; with `prompt`, ready for the assistant's turn."""
        return self.template.render(messages=messages, tools=tools, add_generation_prompt=prompt)

    def ids(
        self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = True
    ) -> list[int]:
        """The token ids of the rendered conversation."""
        text = self.text(messages, tools, prompt)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def wire(example: Example) -> list[dict[str, Any]]:
    """An example's messages as an OpenAI client would send them, system prompt first."""
    head = [{"role": "system", "content": example.system}] if example.system else []
    return [*head, *(message.to_dict() for message in example.messages)]
