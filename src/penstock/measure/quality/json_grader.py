"""The grader of answers in JSON: whether they are JSON, fit a schema and equal a reference.

Nothing is fetched: a schema that refers to what is not in it is refused when the grader is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigError
from penstock.measure.quality.graders import Grader

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def json_in(text: str) -> Any:
    """The JSON value of an answer: the whole of it, or its only fenced block.

    Raises:
        ValueError: there is none.
    """
    fenced = _FENCE.findall(text)
    return json.loads(
        fenced[0] if len(fenced) == 1 else text,
        parse_constant=_refuse,
        object_pairs_hook=_object,
    )


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):  # Python keeps the last one: a reader may keep the first
        raise ValueError("a name stands twice")
    return made


class JsonSchema(Grader, tag="json_schema", frozen=True, kw_only=True, dict=True):
    """The answer is JSON (whole, or one fenced block) and fits the schema, draft 2020-12 unless
    the schema names another. References, where there are any, must equal the value."""

    schema: dict[str, Any]

    @property
    def scores(self) -> tuple[str, ...]:
        return ("json_schema", "json_valid")

    @property
    def needs_reference(self) -> bool:
        return False

    @cached_property
    def _validator(self) -> Validator:
        return self._of(self.schema)

    def _of(self, schema: dict[str, Any]) -> Validator:
        from jsonschema import Draft202012Validator, validators
        from referencing import Registry

        kind = validators.validator_for(self.schema, default=Draft202012Validator)
        return kind(schema, registry=Registry())  # the default one fetches what it does not know

    def check(self) -> None:
        from jsonschema.exceptions import SchemaError
        from referencing.exceptions import Unresolvable

        try:
            self._validator.check_schema(self.schema)
            _resolve_all(self.schema)
            self._validator.is_valid(None)
        except SchemaError as error:
            raise ConfigError(f"`grader.schema` is no JSON schema: {error.message}.") from None
        except Unresolvable as error:
            raise ConfigError(
                f"`grader.schema` refers to `{error.ref}`, which is not in it.",
                hint="nothing is fetched: put what it refers to under `$defs`",
            ) from None
        except RecursionError:
            raise ConfigError("`grader.schema` refers to itself without an end.") from None

    def grade(self, text: str, references: Sequence[Any]) -> dict[str, float]:
        try:
            value = json_in(text)
        except (ValueError, RecursionError):
            return {"json_schema": 0.0, "json_valid": 0.0}
        try:
            right = self._validator.is_valid(value) and (
                # JSON's equality, not Python's: true is not 1
                not references
                or any(self._of({"const": one}).is_valid(value) for one in references)
            )
        except RecursionError:  # nested too deeply to be looked at
            right = False
        return {"json_schema": float(right), "json_valid": 1.0}


def _resolve_all(schema: dict[str, Any]) -> None:
    """Look up every reference of a schema; raises Unresolvable where one leads out of it."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    def look(resource: Resource[Any], resolver: Any) -> None:
        told = resource.contents
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(told, Mapping) and isinstance(told.get(keyword), str):
                resolver.lookup(told[keyword])
        for part in resource.subresources():
            look(part, resolver.in_subresource(part))

    whole = Resource.from_contents(schema, default_specification=DRAFT202012)
    look(whole, Registry().resolver_with_root(whole))
