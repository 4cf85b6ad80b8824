"""Makes a grader from what stands in a task file or on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.quality import graders, json_grader, text_graders
from penstock.measure.quality.graders import Grader

KINDS: dict[str, type[Grader]] = {
    "exact_match": graders.ExactMatch,
    "f1": graders.F1,
    "contains": graders.Contains,
    "regex": graders.Regex,
    "json_schema": json_grader.JsonSchema,
    "choice": graders.Choice,
    "numeric": graders.Numeric,
    "non_empty": graders.NonEmpty,
    "rouge": text_graders.Rouge,
    "chrf": text_graders.Chrf,
    "bert_score": text_graders.BertScore,
}


def make(options: str | Mapping[str, Any]) -> Grader:
    """A grader from its kind, from `{"kind": ..., option: value}`, or from that as JSON text.

    Raises:
        ConfigError: the kind or an option is not known, or has a wrong value.
    """
    config = _parse(options) if isinstance(options, str) else dict(options)
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"`grader.kind` is `{kind}`.", hint=f"known: {', '.join(f'`{name}`' for name in KINDS)}"
        )
    try:
        grader: Grader = msgspec.convert(config, KINDS[kind])
    except msgspec.ValidationError as error:
        raise ConfigError(f"`grader` of the kind `{kind}`: {error}.") from None
    grader.check()
    return grader


def _parse(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"kind": text}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`grader` is no JSON: {error}.") from None
    return dict(config)  # it begins with `{`
