"""One line of a prompts file: its fields and types, and the job that it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec

from penstock.errors import InvalidField
from penstock.protocol.parse import decode_request
from penstock.types import SamplingParams

if TYPE_CHECKING:
    from penstock.llm import LLM, Job

_PARAMS = get_type_hints(SamplingParams)
_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_Line = msgspec.defstruct(
    "Line",
    [
        ("id", str | int | None, None),
        ("prompt", str | None, None),
        ("prompt_token_ids", list[int] | None, None),
        ("messages", list[dict[str, Any]] | None, None),
        ("tools", list[dict[str, Any]] | None, None),
        ("priority", int | None, None),
        *(
            (name, hint | msgspec.UnsetType if name != "stop" else str | hint, msgspec.UNSET)
            for name, hint in _PARAMS.items()
        ),
    ],
    forbid_unknown_fields=True,
    kw_only=True,
)


def id_of(line: str) -> str | int | None:
    """What a line calls itself, also where the rest of it is wrong."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    name = found.get("id") if isinstance(found, dict) else None
    return name if isinstance(name, (str, int)) else None


def job_of(line: str, llm: LLM, defaults: dict[str, Any]) -> Job:
    """Read a line and tokenize its prompt.

    Args:
        defaults: parameters for a line that names none.

    Raises:
        RequestError: the line is not what it should be; `.field` names the field.
    """
    fields = msgspec.structs.asdict(decode_request(_Line, line.encode()))
    given = [name for name in _PROMPTS if fields[name] is not None]
    if len(given) != 1:
        raise InvalidField(
            "The line must hold exactly one of `prompt`, `prompt_token_ids`, `messages`.",
            field=given[1] if given else "prompt",
        )
    params = {name: fields[name] for name in _PARAMS if fields[name] is not msgspec.UNSET}
    priority = fields["priority"]
    if priority is not None and llm.config.scheduling_policy != "priority":
        raise InvalidField(
            "`priority` has no meaning here.",
            field="priority",
            hint="run with `--scheduling-policy priority`",
        )
    if fields["tools"] is not None and given != ["messages"]:
        raise InvalidField("`tools` goes with `messages` only.", field="tools")
    is_chat = given == ["messages"]
    chosen = SamplingParams(**({"max_tokens": None} if is_chat else {}) | defaults | params)
    if is_chat:
        messages, tools = fields["messages"], fields["tools"]
        return llm.prepare_chat(messages, chosen, tools=tools, priority=priority or 0)
    prompt = fields["prompt"] if fields["prompt"] is not None else fields["prompt_token_ids"]
    return llm.prepare(prompt, chosen, priority or 0)
