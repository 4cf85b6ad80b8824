"""Chat messages to the text a model was trained on.

Owns what a template is given and which errors it may cause. The sandbox it runs in is
`penstock.text.sandbox`. Invariant: words of a message that a template leaves as they are never
become special tokens (`encode`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError

from penstock.errors import InvalidField, ModelLoadError
from penstock.text.meter import Meter
from penstock.text.sandbox import SandboxEnvironment, render
from penstock.text.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 256_000
MAX_SOURCE_TOKENS = 20_000  # of Jinja, all sources together: six times the longest published
MAX_CHARS = 4_000_000  # a million tokens
MAX_S = 1.5

# What Jinja and a template's own operators and methods raise.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


_WORDS = ("messages", "tools", "documents")  # variables that hold more than labels
_LABELS = ("role", "type")  # keys in them
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first that a message has counts
_Clean = Callable[[str, bool], str]  # of a text, and whether it is a label: `Tokenizer.guard`


class ChatTemplate:
    """A model's chat template, from an untrusted source.

    Args:
        source: Jinja, or several by name, of which "default" is needed; "tool_use" is taken
            when there are tools.
        special_tokens: strings the template knows by name (`bos_token`, ...).
        max_chars, max_s: limits of one rendering, see `Meter`.

    Raises:
        ModelLoadError: a source is too long, or is not valid.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        *,
        max_chars: int = MAX_CHARS,
        max_s: float = MAX_S,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise ModelLoadError(
                f"None of the chat templates `{sorted(sources)}` is named `default`."
            )
        _check_sources(sources)
        self._templates = {name: _compile(name, text) for name, text in sources.items()}
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        self._max_s = max_s

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that lies beside a tokenizer; None if there is none."""
        if not tokenizer.chat_templates:
            return None
        return cls(tokenizer.chat_templates, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt's text.

        Args:
            messages: JSON data: `role`, `content`, ... as the template wants them.
            tools: JSON data: function declarations.
            add_generation_prompt: end where the assistant begins to speak.
            kwargs: further variables of the template.

        Raises:
            InvalidField: the template refuses the messages, or uses too much on them.
        """
        variables = {"tools": tools, "documents": None, **kwargs}
        return self._render(messages, variables, add_generation_prompt, _unchanged)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's token ids: as of `render`, but the only special tokens in it are those that
        the template wrote. A special-token string in a message stays text.

        It may be trimmed and put between other text, but a template that cuts, replaces or changes
        the case of a message's characters may make such a string of others. Around a label (a key,
        a `role` or `type`, one of the `kwargs`) a template may write a special token.
        """
        variables = {"tools": tools, "documents": None, **kwargs}
        text = self._render(messages, variables, add_generation_prompt, tokenizer.guard)
        return tokenizer.encode_guarded(text)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        add_generation_prompt: bool,
        clean: _Clean,
    ) -> str:
        chosen = "tool_use" if variables["tools"] and "tool_use" in self._templates else "default"
        try:
            plain = {name: _plain(v, clean, name not in _WORDS) for name, v in variables.items()}
            plain["messages"] = _messages(_plain(messages, clean))
            _objects("documents", plain["documents"])
            plain["add_generation_prompt"] = add_generation_prompt
            meter = Meter(self._max_chars, self._max_s)
            return render(self._templates[chosen], {**self._special_tokens, **plain}, meter)
        except _RENDER_ERRORS as error:
            raise InvalidField(
                f"The chat template cannot render `messages`: {_reason(error)}.", field="messages"
            ) from error


@cache
def _environment() -> SandboxEnvironment:
    return SandboxEnvironment()


def _check_sources(sources: Mapping[str, str]) -> None:
    """Refuse what takes long to compile: that costs more than linear time."""
    num_tokens = 0
    for name, source in sources.items():
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelLoadError(
                f"The chat template `{name}` has `{len(source)}` characters, "
                f"more than `{MAX_SOURCE_CHARS}`."
            )
        try:
            for _ in _environment().lexer.tokeniter(source, None):
                num_tokens += 1
                if num_tokens > MAX_SOURCE_TOKENS:
                    raise ModelLoadError(
                        f"The chat template `{name}` has more than `{MAX_SOURCE_TOKENS}` words "
                        "and signs of Jinja."
                    )
        except (TemplateError, ValueError):
            continue  # `_compile` says what and where


def _compile(name: str, source: str) -> Any:
    try:
        return _environment().from_string(source)
    except (TemplateError, MemoryError, RecursionError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        raise ModelLoadError(
            f"The chat template `{name}` is not valid{where}: {_reason(error)}."
        ) from error


def _reason(error: BaseException) -> str:
    text = str(error).strip().rstrip(".") or type(error).__name__
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def _objects(name: str, value: Any) -> Sequence[dict[Any, Any]]:
    if not isinstance(value, (list, type(None))) or not all(
        isinstance(item, dict) for item in value or ()
    ):
        raise TypeError(f"{name} should be a list of objects")
    return value or ()


def _messages(messages: Any) -> list[dict[Any, Any]]:
    """Reasoning under all the names that templates read it by, as in transformers."""
    named: list[dict[Any, Any]] = []
    for message in _objects("messages", messages):
        given = [message[name] for name in _REASONING if message.get(name) is not None]
        if given:
            message = {"thinking": given[0], **message, "reasoning_content": given[0]}
        named.append(message)
    return named


def _unchanged(text: str, label: bool) -> str:
    return text


def _plain(value: Any, clean: _Clean, label: bool = False) -> Any:
    """A copy of exact JSON types only: other objects have methods that no sandbox knows."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return clean(str.__str__(value), label)
    if isinstance(value, Mapping):
        return {
            _plain(key, clean, True): _plain(
                item, clean, label or (key in _LABELS and isinstance(item, str))
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, clean, label) for item in value]
    raise TypeError(f"a {type(value).__name__} is no JSON value")
