"""Command-line options made from the fields of a settings dataclass, so that each is said once.

A field becomes `--its-name` (or `metadata["flag"]`) and shows `metadata["help"]` and its default;
`PENSTOCK_ITS_NAME` sets it, unless the command takes nothing from there; one with
`metadata["hidden"]` is not an option. Bytes take units: `512MiB`, `4GiB`.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Settings = TypeVar("Settings")

_BINARY = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS = _BINARY | {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A number of bytes: `1073741824`, `1GiB`, `1.5 GB`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            self.fail(f"`{value}` is not a number of bytes such as 512MiB or 4GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].lower()])


def options_of(
    settings: type, *, skip: frozenset[str] = frozenset(), from_environment: bool = True
) -> Callable[[Command], Command]:
    """A decorator that gives a command one option for each field of a dataclass.

    Args:
        from_environment: whether `PENSTOCK_ITS_NAME` sets an option.
    """
    hints = get_type_hints(settings)

    def decorate(command: Command) -> Command:
        for field in reversed(dataclasses.fields(settings)):
            if field.name not in skip and not field.metadata.get("hidden"):
                command = _option(field, hints[field.name], from_environment)(command)
        return command

    return decorate


def build(settings: type[Settings], values: dict[str, Any], **fixed: Any) -> Settings:
    """Take the fields of `settings` out of a command's values and make the object."""
    fields = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    chosen = {name: values[name] for name in fields & values.keys()}
    return settings(**chosen, **fixed)


def _option(
    field: dataclasses.Field[Any], hint: Any, from_environment: bool
) -> Callable[[Command], Command]:
    flag = field.metadata.get("flag") or "--" + field.name.replace("_", "-")
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    inner, many = _unwrap(hint)
    declaration = f"{flag}/--no-{flag[2:]}" if inner is bool else flag
    return click.option(
        declaration,
        field.name,
        type=None if inner is bool else _click_type(field, inner),
        multiple=many,
        default=default,
        show_default=default not in (None, (), ""),
        envvar=_envvar(field.name) if from_environment else None,
        help=field.metadata.get("help"),
    )


def _envvar(name: str) -> str:
    """The variable of an option. Kubernetes sets PENSTOCK_PORT for a Service named penstock."""
    return f"PENSTOCK_{'HTTP_PORT' if name == 'port' else name.upper()}"


def _click_type(field: dataclasses.Field[Any], inner: Any) -> Any:
    if choices := field.metadata.get("choices"):
        return click.Choice(list(choices))
    return Bytes() if field.name.endswith("_bytes") else inner


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """The type within `X | None` or `tuple[X, ...]`, and whether there may be many."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
