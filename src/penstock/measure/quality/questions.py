"""What was asked, as a reader or a judge sees it. Knows no task and no answer."""

from __future__ import annotations

from typing import Any

from penstock.measure.load.target import Ask

MAX_CHARACTERS = 2_000  # that a row keeps of its question


def question_of(ask: Ask) -> str:
    """What was asked, whole: one message as it is, several with their roles."""
    if ask.messages is None:
        return str(ask.prompt)
    texts = [(str(one["role"]), _text(one.get("content"))) for one in ask.messages]
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"[{role}]\n{text}" for role, text in texts)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return str(content or "")


def shortened(text: str, most: int = MAX_CHARACTERS) -> str:
    """The text, or its begin and its longer end: after examples, the question comes last."""
    if len(text) <= most:
        return text
    begin = most // 4
    end = most - begin
    left_out = f"\n[… {len(text) - most:,} characters left out …]\n"
    return text[:begin] + left_out + text[-end:]
