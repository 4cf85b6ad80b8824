"""Markup from values. Text becomes markup only through `escape`, so that none can break out.

Knows HTML and SVG elements, not what a page shows. Invariant: an `Html` is well-formed XML.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Final

# Not allowed in XML, or able to turn the order of the text around them.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
_VOID: Final = frozenset({"br", "col", "meta"})


class Html(str):
    """Markup. A `str` that is no `Html` is text, and is escaped where it meets markup."""

    __slots__ = ()


def escape(value: object) -> Html:
    """A value's text as markup; an `Html` as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_UNSAFE.sub("\ufffd", str(value))))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        children: markup or text; None is left out.
        attributes: `stroke_width` is `stroke-width`, `class_` is `class`; None is left out.
    """
    told = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{told}/>")
    return Html(f"<{tag}{told}>{join(children)}</{tag}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other; None is left out."""
    return Html(between.join(escape(part) for part in parts if part is not None))
