"""Messages, and the one place that knows how a conversation is written down as tokens.

`TEMPLATE` is the chat template that ships with the model. Text of any role has `<|` replaced by
`< |`, so that no text can be read as a special token, whichever way the caller encodes the prompt.
`segments` writes the same conversation for training, telling which parts the model has to learn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
TOOL_CALL, PAD = "<|tool_call|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, TOOL, END, TOOL_CALL)

TEMPLATE = (
    "{%- macro safe(text) -%}"
    "{%- if text is string -%}{{ text | replace('<|', '< |') }}"
    "{%- elif text is sequence -%}"
    "{%- for part in text -%}"
    "{%- if part.type == 'text' -%}{{ part.text | replace('<|', '< |') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- elif text is not none -%}{{ text | string | replace('<|', '< |') }}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro listed(tools) -%}"
    "You can call these tools:"
    "{%- for tool in tools -%}"
    "{%- set f = tool.function if tool.function is defined else tool -%}"
    "{{ '\\n' }}{{ safe(f.name) }}("
    "{%- for name, spec in ((f.parameters or {}).properties or {}).items() -%}"
    "{{ safe(name) }}: {{ safe(spec.type) }}{{ ', ' if not loop.last }}"
    "{%- endfor -%}"
    "){{ ': ' ~ safe(f.description) if f.description }}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
    "{{ '<|bos|>' }}"
    "{%- if messages and messages[0].role in ('system', 'developer') -%}"
    "{{ '<|system|>' }}{{ safe(messages[0].content) }}"
    "{{ '\\n' ~ listed(tools) if tools }}{{ '<|end|>' }}"
    "{%- elif tools -%}"
    "{{ '<|system|>' }}{{ listed(tools) }}{{ '<|end|>' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role in ('system', 'developer') -%}"
    "{%- if not loop.first -%}"
    "{{ '<|system|>' }}{{ safe(message.content) }}{{ '<|end|>' }}"
    "{%- endif -%}"
    "{%- elif message.role == 'user' -%}"
    "{{ '<|user|>' }}{{ safe(message.content) }}{{ '<|end|>' }}"
    "{%- elif message.role == 'tool' -%}"
    "{{ '<|tool|>' }}{{ safe(message.content) }}{{ '<|end|>' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ '<|assistant|>' }}{{ safe(message.content) }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set f = call.function if call.function is defined else call -%}"
    '{{ \'<|tool_call|>\' }}{"name": "{{ safe(f.name) }}", "arguments": '
    "{{ safe(f.arguments if f.arguments is string else (f.arguments | tojson)) }}}"
    "{%- endfor -%}"
    "{{ '<|end|>' }}"
    "{%- else -%}"
    "{{ raise_exception('unknown role: ' ~ message.role) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Message:
    """One turn. An assistant's turn is either text or one tool call."""

    role: str
    content: str
    call: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.call is None:
            return {"role": self.role, "content": self.content}
        function = {"name": self.call["name"], "arguments": self.call["arguments"]}
        return {"role": self.role, "content": "", "tool_calls": [{"function": function}]}


@dataclass(frozen=True)
class Segment:
    """A run of text or one special token; `learn` says whether the loss counts it."""

    text: str
    special: bool
    learn: bool


@dataclass
class Conversation:
    """Messages with the tools that the system prompt lists."""

    messages: list[Message]
    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)


def dump(value: object) -> str:
    """JSON as brook writes it."""
    return json.dumps(value, ensure_ascii=False)


def tool_text(tools: Sequence[dict[str, Any]]) -> str:
    """The tool list as the template writes it."""
    lines = ["You can call these tools:"]
    for tool in tools:
        function = tool["function"]
        properties = function["parameters"]["properties"]
        arguments = ", ".join(f"{name}: {spec['type']}" for name, spec in properties.items())
        lines.append(f"{function['name']}({arguments}): {function['description']}")
    return "\n".join(lines)


def segments(conversation: Conversation) -> list[Segment]:
    """The conversation in the template's format, marked for training."""
    out = [Segment(BOS, True, False)]
    messages = list(conversation.messages)
    head: list[str] = []
    if messages and messages[0].role == "system":
        head.append(messages.pop(0).content)
    if conversation.tools:
        head.append(tool_text(conversation.tools))
    if head:
        out += [Segment(SYSTEM, True, False), Segment("\n".join(head), False, False)]
        out.append(Segment(END, True, False))
    for message in messages:
        learn = message.role == "assistant"
        out.append(Segment(f"<|{message.role}|>", True, False))
        if message.call is not None:
            out += [Segment(TOOL_CALL, True, True), Segment(dump(message.call), False, True)]
        else:
            out.append(Segment(message.content, False, learn))
        out.append(Segment(END, True, learn))
    return out
