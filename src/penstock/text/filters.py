"""The filters, tests and functions that a chat template has.

Jinja's, less those that are of no use to a chat or that can run away; the ones that make much out
of little are rewritten with a check in front. Invariant: every one goes through `metered`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import Environment, pass_context, pass_environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import safe_range
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Cycler, Joiner, Namespace

from penstock.text.meter import (
    MAX_INT_BITS,
    METER,
    TemplateLimitError,
    allow_format,
    allow_replace,
    check_format,
    printed,
)

MAX_INT_ARGUMENT = 10_000  # of a filter or a test; `range` has its own limit

_KEPT_FILTERS = (
    *("abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "first"),
    *("float", "groupby", "items", "last", "length", "list", "lower", "map", "max", "min"),
    *("reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice", "sort"),
    *("string", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)


def metered(function: Any) -> Callable[..., Any]:
    """A filter or test that pays for its result, and takes no huge numbers.

    Lazy results are computed at once, so that no work waits unpaid in a chain of generators. They
    stay iterators, which can be read only once and not be printed.
    """
    wanted = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        for argument in (*args[1:], *kwargs.values()):
            if isinstance(argument, int) and abs(argument) > MAX_INT_ARGUMENT:
                raise SecurityError(f"the argument {argument} is too large")
        if wanted is not None:
            passed = {"context": context, "eval_context": context.eval_ctx}
            args = (passed.get(wanted.name, context.environment), *args)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return iter(meter.charge_all(result))
        return meter.charge(result)

    return run


def join_checked(value: Iterable[str], separator: str) -> str:
    """`separator.join(value)`, refused where it would be too large."""
    texts = list(value)
    METER.get().allow(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@pass_environment
def _join(
    environment: Environment, value: Iterable[Any], d: str = "", attribute: str | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return join_checked(map(printed, value), d)


@pass_environment
def _sum(
    environment: Environment, iterable: Iterable[Any], attribute: str | None = None, start: Any = 0
) -> Any:
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    total = start
    for item in iterable:
        if not isinstance(total, (int, float)) or not isinstance(item, (int, float)):
            raise SecurityError("only numbers can be summed")
        total += item
    return total


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = printed(value)
    allow_replace(text, old, new)
    return text.replace(old, new, count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = printed(s)
    margin = len(width) if isinstance(width, str) else width
    METER.get().allow(len(text) + margin * (1 + len(text.splitlines())))
    indented: str = JINJA_FILTERS["indent"](text, width, first, blank)
    return indented


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    check_format(value)
    allow_format(value, value.count("%"), [*args, *kwargs.values()])
    return value % (kwargs or args)


def _int(value: Any, default: int = 0, base: int = 10) -> Any:
    number = JINJA_FILTERS["int"](value, default, base)
    if isinstance(number, int) and number.bit_length() > MAX_INT_BITS:
        raise TemplateLimitError(f"an integer has more than {MAX_INT_BITS} bits")
    return number


def _escape(value: Any) -> str:
    return str(JINJA_FILTERS["escape"](printed(value)))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    meter = METER.get()
    meter.allow(meter.size(value))
    if any(len(separator) > 16 for separator in separators or ()):
        raise SecurityError("a JSON separator is too long")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    pieces, num_chars = [], 0
    for piece in encoder.iterencode(value):
        num_chars += len(piece)
        meter.allow(num_chars)
        meter.tick()
        pieces.append(piece)
    return "".join(pieces)


FILTERS = {name: metered(JINJA_FILTERS[name]) for name in _KEPT_FILTERS} | {
    "e": metered(_escape),
    "escape": metered(_escape),
    "format": metered(_format),
    "indent": metered(_indent),
    "int": metered(_int),
    "join": metered(_join),
    "replace": metered(_replace),
    "safe": metered(printed),  # nothing is escaped that would have to be spared
    "string": metered(printed),
    "sum": metered(_sum),
    "tojson": metered(_tojson),
}

TESTS = {name: metered(test) for name, test in JINJA_TESTS.items()}


class TemplateNamespace(Namespace):
    """Keeps a template from giving its namespace attributes that Jinja or Python look for."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _dict(pairs: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
    built: dict[Any, Any] = {}  # (the type itself would have more methods)
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        METER.get().tick()  # numbers can be chosen so that each is compared with all the others
        built[key] = value
    return built | kwargs


def _raise_exception(message: Any) -> None:
    raise TemplateError(printed(message))


def _strftime_now(format: str) -> str:
    if re.search(r"%[^A-Za-z%]*\d", format):
        raise SecurityError("a width in a date format is not allowed")
    return datetime.now().strftime(format)


GLOBALS: dict[str, Any] = {
    "cycler": Cycler,
    "dict": _dict,
    "joiner": Joiner,
    "namespace": TemplateNamespace,
    "raise_exception": _raise_exception,
    "range": safe_range,
    "strftime_now": _strftime_now,
}
