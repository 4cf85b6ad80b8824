"""What a user writes for one arm of a measurement, taken apart.

Owns the grammar: `URL[#model]`, `RECIPE:MODEL?option=value&flag`, `inprocess:MODEL?...`, each with
`LABEL=` before it if it shall be called so. Without a recipe it is penstock's. Starts nothing.
Invariant: an arm holds no secret, since its text is written to the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from urllib.parse import unquote, urlsplit

from penstock.errors import ConfigError
from penstock.measure.engines.recipes import ENVIRONMENT, RECIPES

URL, IN_PROCESS = "url", "inprocess"
URL_OPTIONS = frozenset({"dialect", "engine", "precision"})
_LABEL = re.compile(r"(?P<label>[\w.+-]+)=(?P<rest>.+)", re.DOTALL)
_ADDRESS = re.compile(r"(localhost|(?!penstock:)[\w.-]+:\d{2,5}|\[[\da-f:]+\]:\d+)(/\S*)?(#\S*)?")
_RECIPE = re.compile(r"(?P<recipe>[a-z][a-z0-9_-]*):(?P<rest>.*)", re.DOTALL)
_SECRET = re.compile(r"(^|[-_.])(api[-_]?key|key|token|password|secret|authorization)$", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSpec:
    """One arm, as it was written.

    `kind` is `url`, `inprocess` or the name of a recipe; `location` is the URL or the model;
    `model` is the name behind `#` of a URL; an option without value is None.
    """

    text: str
    name: str
    kind: str
    location: str
    model: str | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def is_started(self) -> bool:
        """Whether it is a process that this one starts and ends."""
        return self.kind in RECIPES


def parse_arm(text: str) -> ArmSpec:
    """Take an arm apart.

    Raises:
        ConfigError: it is none; the sentence says why, and the hint which recipes there are.
    """
    labelled = _LABEL.fullmatch(text)
    label, target = (labelled["label"], labelled["rest"]) if labelled else ("", text)
    if "://" in target.partition("?")[0]:
        return _url(text, target, label)
    found = _RECIPE.fullmatch(target)
    kind, rest = (found["recipe"], found["rest"]) if found else ("penstock", target)
    if _ADDRESS.fullmatch(target) and kind not in (IN_PROCESS, *RECIPES.keys() - {"penstock"}):
        raise ConfigError(
            f"The arm `{text}` is an address without `http://`.",
            hint=f"did you mean `{labelled['label'] + '=' if labelled else ''}http://{target}`?",
        )
    if kind not in RECIPES and kind != IN_PROCESS:
        raise _wrong(text, f"there is no recipe `{kind}`")
    model, _, query = rest.partition("?")
    if not model:
        raise _wrong(text, "it names no model")
    options = _options(text, query)
    if kind in RECIPES:
        _check_options(text, options, RECIPES[kind].own_flags)
    shown = PurePath(model).name or model
    name = label or f"{kind}:{shown}{'?' if query else ''}{unquote(query)}"
    return ArmSpec(text=text, name=name, kind=kind, location=unquote(model), options=options)


def parse_arms(texts: Sequence[str]) -> list[ArmSpec]:
    """Several arms; one that is called as another is numbered: `brook`, `brook (2)`.

    Raises:
        ConfigError: as `parse_arm`, or two arms have the same label.
    """
    arms: list[ArmSpec] = []
    for text in texts:
        arm = parse_arm(text)
        names = {other.name for other in arms}
        if arm.name in names:
            if text.startswith(f"{arm.name}="):
                raise _wrong(text, f"another arm is labelled `{arm.name}`")
            number = next(n for n in range(2, len(texts) + 2) if f"{arm.name} ({n})" not in names)
            arm = replace(arm, name=f"{arm.name} ({number})")
        arms.append(arm)
    return arms


def _url(text: str, target: str, label: str) -> ArmSpec:
    try:
        parts = urlsplit(target)
        port = parts.port
    except ValueError as error:
        raise _wrong(text.rpartition("@")[2], f"its URL is none: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise _wrong(text, f"a URL begins with `http://` or `https://`, not `{parts.scheme}://`")
    if not parts.hostname:
        raise _wrong(text, "its URL names no host")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"The URL of `{parts.hostname}` holds a user or a password.",
            hint="a key is read from the environment: `--api-key-env NAME`",
        )
    options = _options(text, parts.query)
    if unknown := sorted(options.keys() - URL_OPTIONS):
        raise _wrong(
            text, f"a URL has no option `{unknown[0]}`, only {', '.join(sorted(URL_OPTIONS))}"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    where = f"{host}:{port}" if port else host
    location = f"{parts.scheme}://{where}{parts.path.rstrip('/')}"
    model = unquote(parts.fragment) or None
    name = label or where + (f"#{model}" if model else "")
    return ArmSpec(text=text, name=name, kind=URL, location=location, model=model, options=options)


def _check_options(text: str, options: Mapping[str, str | None], taken: frozenset[str]) -> None:
    """Refuse what would undo the recipe, such as `host=0.0.0.0`, or cannot be told to a process."""
    for name, value in options.items():
        if name.replace("-", "_") in taken:
            raise _wrong(text, f"`{name}` is decided by the recipe")
        if name.startswith(ENVIRONMENT) and not re.fullmatch(r"\w+", name[len(ENVIRONMENT) :]):
            raise _wrong(text, f"`{name}` names no variable")
        if "\0" in name + (value or ""):
            raise _wrong(text, "it holds a null byte")


def _options(text: str, query: str) -> dict[str, str | None]:
    """`a=1&b` as {"a": "1", "b": None}; a plus sign stays one."""
    options: dict[str, str | None] = {}
    for part in query.split("&") if query else []:
        name, has_value, value = part.partition("=")
        name = unquote(name)
        if not name:
            raise _wrong(text, f"`{part}` is no option")
        if _SECRET.search(name):
            raise ConfigError(
                f"The option `{name}` of an arm would be a secret that is written to the run.",
                hint="a key is read from the environment: `--api-key-env NAME`",
            )
        if name in options:
            raise _wrong(text, f"it has the option `{name}` twice")
        options[name] = unquote(value) if has_value else None
    return options


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"The arm `{text}` cannot be read: {why}.",
        hint="an arm is `http(s)://HOST[#MODEL]`, `inprocess:MODEL` or `RECIPE:MODEL?option=value`;"
        f" recipes: {', '.join(RECIPES)}",
    )
