"""A page of a report: one file that needs nothing else, in light and in dark, on screen and paper.

Nothing is loaded, and the page's own policy forbids it; the one script sorts tables, and the page
is whole without it. Knows the header of a run, not the figures of any kind of run.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.measure.metrics import FORMULAS
from penstock.measure.records import Header
from penstock.measure.report import tables
from penstock.measure.report.html import Html, element, escape, join
from penstock.measure.report.style import SCRIPT, STYLE


class Section(NamedTuple):
    """A part of a page; a text among its parts is a paragraph, `Html` stands as it is."""

    title: str
    parts: Sequence[str]


def document(
    title: str,
    sections: Sequence[Section],
    *,
    summary: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> str:
    """A whole page.

    Args:
        summary: what stands before the sections: the answer first. Text or `Html`.
        problems: why the run is not valid; shown before everything else.
    """
    contents = None
    if len(sections) > 2:
        links = [
            element("li", element("a", section.title, href=f"#part{number}"))
            for number, section in enumerate(sections, start=1)
        ]
        contents = element("nav", element("ul", *links), aria_label="Contents")
    body = element(
        "main",
        element("h1", title),
        _problems(problems),
        *(_part(part) for part in summary),
        contents,
        *(_section(number, section) for number, section in enumerate(sections, start=1)),
    )
    return "<!DOCTYPE html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_policy()),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", title),
            element("style", Html(STYLE)),
        ),
        element("body", body, element("script", Html(SCRIPT))),
        lang="en",
    )


def provenance(header: Header) -> Section:
    """What a reader needs to trust, repeat or doubt the figures: formulas, settings, hashes."""
    about = {
        "run": header.run_id,
        "kind": header.kind,
        "started": header.started_at,
        "penstock": header.version,
        "command": element("code", shlex.join(header.command)) if header.command else None,
        "verify": element("code", f"penstock verify {header.run_id}"),
    }
    formulas = tables.table(["name", "formula"], FORMULAS.items())
    arms = [
        tables.pairs({name: value for name, value in _plain(arm).items() if value})
        for arm in header.arms
    ]
    parts: list[str] = [tables.pairs(about), details("Formulas", formulas)]
    if arms:
        parts.append(details("What was measured", *arms))
    for title, facts in (
        ("Settings", header.settings),
        ("Hashes (SHA-256)", header.hashes),
        ("Prices", header.prices),
        ("Environment", header.environment),
    ):
        if facts:
            parts.append(details(title, tables.pairs(facts)))
    return Section("How these figures were made", parts)


def details(title: str, *parts: str) -> Html:
    """Something to open: on paper it is left closed."""
    return element("details", element("summary", title), *(_part(part) for part in parts))


def listing(items: Sequence[str]) -> Html:
    """A list of texts."""
    return element("ul", *(element("li", item) for item in items))


def code(text: str) -> Html:
    """A text as it is, such as an answer of a model or a command."""
    return element("pre", element("code", text))


def _plain(arm: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(arm)
    return plain


def _part(part: str) -> Html:
    return part if isinstance(part, Html) else element("p", part)


def _section(number: int, section: Section) -> Html:
    parts = (_part(part) for part in section.parts)
    return element("section", element("h2", section.title), *parts, id=f"part{number}")


def _problems(problems: Sequence[str]) -> Html | None:
    if not problems:
        return None
    title = element("strong", "This run is not valid.")
    return element("div", title, listing(problems), class_="problems", role="alert")


def _policy() -> str:
    """Nothing may be loaded or run but the style and the script that are in the page."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (STYLE, SCRIPT)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


__all__ = [
    "Html",
    "Section",
    "code",
    "details",
    "document",
    "element",
    "escape",
    "join",
    "listing",
    "provenance",
]
