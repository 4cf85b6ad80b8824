"""From the bytes of a request body to a typed value, or an `InvalidField` that names the field.

Owns the three rules of reading: unknown fields are errors; fields that are known but not served
are errors with their reason, unless they ask for nothing; JSON is nested at most `MAX_DEPTH` deep.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from penstock.errors import InvalidField

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 32
_AT = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<path>.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*?)`", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*?)`")
# Linear: nothing is tried twice, and a string without an end takes all the rest.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


class Refusal(NamedTuple):
    """Why a field is refused, and its value that asks for nothing beside those that never do."""

    reason: str
    harmless: object = None

    def covers(self, value: object) -> bool:
        """Whether a field with this value is refused."""
        nothing: tuple[object, ...] = (None, False, [], {}, self.harmless)
        return not any(type(value) is type(none) and value == none for none in nothing)


@cache
def unsupported_fields(cls: type[msgspec.Struct]) -> dict[str, Refusal]:
    """The fields of a request that are known and refused, by name; see `not_supported`."""
    refusals = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, msgspec.Meta) and mark.extra and "unsupported" in mark.extra:
                refusals[name] = mark.extra["unsupported"]
    return refusals


@cache
def _decoder(cls: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(cls)


def decode_request(cls: type[T], body: bytes) -> T:
    """Read a request body.

    Raises:
        InvalidField: it is not JSON, nested too deep, of a wrong type, or asks for what is not
            served; `.field` is the path of the field, or `body`.
    """
    if nested_deeper_than(body, MAX_DEPTH):
        raise InvalidField(
            f"The JSON of the request is nested more than `{MAX_DEPTH}` deep.", field="body"
        )
    try:
        request: T = _decoder(cls).decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(cls, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidField(f"The request body is not JSON: {reason}.", field="body") from None
    _refuse_unsupported(request, "")
    return request


def _refuse_unsupported(value: msgspec.Struct, path: str) -> None:
    for name, refusal in unsupported_fields(type(value)).items():
        if refusal.covers(getattr(value, name)):
            field = _join(path, name)
            raise InvalidField(f"`{field}` is not supported.", field=field, hint=refusal.reason)
    for name in _nested_fields(type(value)):
        inner = getattr(value, name)
        field = _join(path, name)
        if isinstance(inner, msgspec.Struct):
            _refuse_unsupported(inner, field)
        elif isinstance(inner, list):
            for index, item in enumerate(inner):
                _refuse_unsupported(item, f"{field}[{index}]")


@cache
def _nested_fields(cls: type[msgspec.Struct]) -> list[str]:
    """The fields that may hold a struct or a list of structs."""
    return [
        name
        for name, hint in get_type_hints(cls).items()
        if any(_holds_struct(part) for part in (hint, *get_args(hint)))
    ]


def _holds_struct(hint: Any) -> bool:
    parts = get_args(hint) if get_origin(hint) is list else (hint,)
    return any(isinstance(part, type) and issubclass(part, msgspec.Struct) for part in parts)


def nested_deeper_than(body: bytes, depth: int) -> bool:
    """Whether the JSON in `body` is nested deeper than `depth`, without recursion.

    Malformed JSON may be called deep; it is refused either way.
    """
    if body.count(b"[") + body.count(b"{") <= depth:
        return False
    brackets = _STRING.sub(b"", body).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(depth):  # each round takes the innermost level away
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _invalid(cls: type[msgspec.Struct], message: str) -> InvalidField:
    at = _AT.match(message)
    path = at["path"] if at else ""
    what = at["what"] if at else message
    if unknown := _UNKNOWN.match(what):
        return _unknown(cls, path, unknown["name"])
    if missing := _MISSING.match(what):
        field = _join(path, missing["name"])
        return InvalidField(f"`{field}` is missing.", field=field)
    if not path:
        return InvalidField(f"The request body is wrong: {what}.", field="body")
    return InvalidField(f"`{path}` is wrong: {what}.", field=path)


def _unknown(cls: type[msgspec.Struct], path: str, name: str) -> InvalidField:
    shown = name if len(name) <= 64 else name[:64] + "..."
    field = _join(path, shown)
    known = [] if path else [item.name for item in msgspec.structs.fields(cls)]
    close = difflib.get_close_matches(shown, known, n=1)
    return InvalidField(
        f"`{field}` is not a field of this request.",
        field=field,
        hint=f"did you mean `{close[0]}`?" if close else "leave it out",
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def not_supported(reason: str, *, harmless: object = None) -> Any:
    """The mark of a field that is known and refused: `Annotated[Any, not_supported(...)]`.

    Values that ask for nothing pass: null, false, [], {}, and the one that is `harmless`.
    """
    return msgspec.Meta(extra={"unsupported": Refusal(reason, harmless)})
