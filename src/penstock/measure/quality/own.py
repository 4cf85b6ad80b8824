"""Your own tasks: a JSONL file of items, or a text file of prompts.

A JSONL line holds `prompt` or `messages`, and may hold `id`, `reference` or `references`, `grader`,
`group`, `category`, `system`, `max_tokens`, `temperature`, `stop` and `seed`. A first line without
`prompt` and `messages` holds defaults for all others, and may hold the task's `name`. A line of a
text file is a prompt, and what follows a tab is its reference. An error names line and field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.load.target import Ask, Reply
from penstock.measure.quality.graders import Grader
from penstock.measure.quality.grading import make
from penstock.measure.quality.jsonl import reason_of
from penstock.measure.quality.tasks import JUDGE, Item, ScoreFacts, TaskFacts, hash_of, sample

DEFAULT_MAX_TOKENS = 512


class Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An item as it stands in the file; the first line may hold defaults only."""

    id: str | int | None = None
    name: str | None = None  # of the task; in the first line only
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    system: str | None = None
    reference: Any = None
    references: list[Any] | None = None
    grader: str | dict[str, Any] | None = None
    group: str | None = None
    category: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    stop: list[str] | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class GradedTask:
    """Items with the grader of each: your own, or of a published set."""

    name: str
    all_items: Sequence[Item]
    graders: Mapping[str, Grader]  # by the item's id
    source: str
    unused: frozenset[str] = frozenset()  # defaults that every line, or the first one, overrides

    @property
    def data_hash(self) -> str:
        return hash_of(self.all_items)

    @property
    def _kinds(self) -> list[Grader]:
        """One grader of each kind."""
        return list({type(one): one for one in self.graders.values()}.values())

    @property
    def main_score(self) -> str:
        """The grader's first score; `score` where lines have graders of several kinds."""
        return self._kinds[0].scores[0] if len(self._kinds) == 1 else "score"

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def random_baseline(self) -> float | None:
        """Mean over the items of what chance gets."""
        chances = [self.graders[item.id].random_baseline() for item in self.all_items]
        known = [chance for chance in chances if chance is not None]
        return sum(known) / len(known) if len(known) == len(chances) else None

    def facts(self, num_items: int) -> TaskFacts:
        scores = {self.main_score: ScoreFacts()}
        if len(self._kinds) == 1:  # of several, each score is there for some items only
            scores |= {name: ScoreFacts() for name in self._kinds[0].scores}
            for name, metric in self._kinds[0].corpus.items():
                scores[name] = ScoreFacts(how="corpus", metric=metric)
        return TaskFacts(
            name=self.name,
            main_score=self.main_score,
            scores=scores,
            random_baseline=self.random_baseline,
            data_hash=self.data_hash,
            data_source=self.source,
            num_items=num_items,
        )

    def items(self, limit: int | None = None, seed: int = 0) -> list[Item]:
        return sample(self.all_items, limit, seed)

    def grade(self, item: Item, reply: Reply) -> dict[str, float]:
        grader = self.graders[item.id]
        scores = grader.grade(reply.text, item.reference)
        return (
            scores if self.main_score in scores else {"score": scores[grader.scores[0]], **scores}
        )


def read(path: Path, **defaults: Any) -> GradedTask:
    """A task from a file; `defaults` (`grader`, `max_tokens`, ...) are for lines that say nothing.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` cannot be read: {reason_of(error)}.") from None
    numbered = [(n, one) for n, one in enumerate(text.split("\n"), 1) if one.strip()]
    parse = _parse_plain if path.suffix in (".txt", ".tsv") else _parse_json
    lines = [(number, parse(one.rstrip("\r"), _place(path, number))) for number, one in numbered]
    head = Line()
    if lines and lines[0][1].prompt is None and lines[0][1].messages is None:
        head = lines.pop(0)[1]
    if not lines:
        raise ConfigError(f"`{path}` holds no prompt.", hint="a line of a task has a `prompt`")
    task = _task(path, _merge(head, Line(**defaults)), lines)
    unused = (
        name
        for name in defaults
        if _says(head, name) or all(_says(line, name) for _, line in lines)
    )
    return replace(task, unused=frozenset(unused))


def _says(line: Line, name: str) -> bool:
    """Whether a line needs no default."""
    first = line.messages[0] if line.messages else {}
    return getattr(line, name) is not None or (name == "system" and first.get("role") == "system")


def _place(path: Path, number: int) -> str:
    return f"Line `{number}` of `{path}`"


def _parse_plain(text: str, _: str) -> Line:
    prompt, tab, reference = text.partition("\t")
    return Line(prompt=prompt, reference=reference if tab else None)


def _parse_json(text: str, place: str) -> Line:
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place} is wrong: {error}.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(
            f"{place} is no JSON: {error}.", hint="a file of plain prompts is named `.txt`"
        ) from None


def _merge(line: Line, base: Line) -> Line:
    """The line, with the base's values where it has none."""
    chosen = {
        name: mine if (mine := getattr(line, name)) is not None else getattr(base, name)
        for name in Line.__struct_fields__
    }
    return Line(**chosen)


def _task(path: Path, base: Line, lines: Sequence[tuple[int, Line]]) -> GradedTask:
    items: dict[str, Item] = {}
    graders: dict[str, Grader] = {}
    for number, line in lines:
        place = _place(path, number)
        name = str(number if line.id is None else line.id)
        if name in items:
            raise ConfigError(f"{place}: `id` is `{name}`, as an earlier line's is.")
        if line.name is not None:
            raise ConfigError(f"{place}: `name` belongs into a first line without a prompt.")
        try:
            items[name], graders[name] = _item(name, _merge(line, base))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None
    task_name = base.name or path.stem
    if task_name == JUDGE:
        raise ConfigError(
            f"The task of `{path}` is named `{JUDGE}`, as the rows of a judge are.",
            hint="a `name` in a first line without a prompt names it",
        )
    return GradedTask(
        name=task_name,
        all_items=list(items.values()),
        graders=graders,
        source=path.name,
    )


def _messages(line: Line) -> list[dict[str, Any]]:
    """What is asked, with the system message before it unless it has one."""
    if line.messages is None:
        messages: list[dict[str, Any]] = [{"role": "user", "content": line.prompt}]
    else:
        messages = line.messages
        if not messages or not all(isinstance(one.get("role"), str) for one in messages):
            raise ConfigError("`messages` holds one or more messages, each with a `role`.")
    if line.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": line.system}, *messages]


def _item(name: str, line: Line) -> tuple[Item, Grader]:
    if (line.prompt is None) == (line.messages is None):
        raise ConfigError("one of `prompt` and `messages` is needed, and not both.")
    if line.reference is not None and line.references is not None:
        raise ConfigError("`reference` and `references` cannot both be there.")
    references = line.references if line.references is not None else [line.reference]
    references = [one for one in references if one is not None]
    grader = make(line.grader or ("exact_match" if references else "non_empty"))
    if grader.needs_reference and not references:
        kind = type(grader).__struct_config__.tag
        raise ConfigError(f"`reference` is needed by the grader `{kind}`.")
    if references:
        grader.check_references(references)
    messages = _messages(line)
    ask = Ask(
        prompt_id=name,
        messages=messages,
        max_tokens=DEFAULT_MAX_TOKENS if line.max_tokens is None else line.max_tokens,
        temperature=line.temperature or 0.0,
        seed=line.seed,
        stop=line.stop or [],
    )
    item = Item(
        id=name,
        ask=ask,
        reference=references,
        group=line.group or "",
        category=line.category or "",
        details={"grader": msgspec.to_builtins(grader), "references": references},
    )
    return item, grader
