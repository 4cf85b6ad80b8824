"""`penstock generate`: a JSONL file of prompts in, a JSONL file of answers out.

A line holds `prompt` (text), `prompt_token_ids` or `messages`, and may hold an `id`, a `priority`
and any field of SamplingParams. A line that cannot be served becomes an error row and the others
go on; rows are written as they finish, so that an interrupted run keeps what is done.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from penstock.cli.options import build, options_of
from penstock.engine.config import EngineConfig
from penstock.errors import InvalidField, RequestError
from penstock.types import SamplingParams

if TYPE_CHECKING:
    from penstock.llm import LLM, Job, Output

PARAM_NAMES = {field.name for field in dataclasses.fields(SamplingParams)}
PROMPT_NAMES = ("prompt", "prompt_token_ids", "messages")
OTHER_NAMES = {"id", "priority", "tools"}


@click.command(
    epilog='Example: echo \'{"prompt": "2 + 2 ="}\' | penstock generate - -o answers.jsonl'
)
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), default="-", help="Default: stdout."
)
@click.option(
    "--model", "-m", default="brook", show_default=True, help="Directory or built-in name."
)
@click.option("--temperature", type=float, help="For lines that name none.")
@click.option("--max-tokens", type=int, help="For lines that name none.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stderr at the end.")
@options_of(EngineConfig, skip=frozenset({"model"}))
def command(
    prompts: str,
    output: str,
    model: str,
    temperature: float | None,
    max_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Answer the prompts of a JSONL file (`-`: stdin)."""
    from penstock.llm import LLM  # torch, only now

    lines = _read(prompts)
    config = build(EngineConfig, options, model=model)
    llm = LLM(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    defaults: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    defaults = {name: value for name, value in defaults.items() if value is not None}
    with _writer(output) as sink:
        summary = _answer(llm, lines, defaults, sink)
    if as_json:
        click.echo(json.dumps(summary), err=True)
    elif summary["num_errors"]:
        click.echo(f"error: {summary['num_errors']} of {len(lines)} lines failed.", err=True)
    return 1 if summary["num_errors"] else 0


def _read(path: str) -> list[str]:
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line.strip()]


def _writer(path: str) -> Any:
    return click.open_file(path, "w", encoding="utf-8")


def _answer(
    llm: LLM, lines: list[str], defaults: dict[str, Any], sink: IO[str]
) -> dict[str, int | float]:
    from tqdm import tqdm

    names: dict[int, Any] = {}  # what the line is called, by id() of its job
    summary: dict[str, int | float] = {"num_prompts": len(lines), "num_errors": 0, "num_tokens": 0}

    def write(row: dict[str, Any]) -> None:
        sink.write(json.dumps(row, ensure_ascii=False) + "\n")
        sink.flush()
        bar.update()

    def fail(name: Any, error: RequestError) -> None:
        summary["num_errors"] += 1
        write({"id": name, "error": {"field": error.field, "message": str(error)}})

    def jobs() -> Iterator[Job]:
        for number, line in enumerate(lines, start=1):
            name: Any = number
            try:
                fields = _parse(line)
                name = fields.pop("id", number)
                job = _job(llm, defaults | fields)
            except RequestError as error:
                fail(name, error)
                continue
            names[id(job)] = name
            yield job

    started = time.monotonic()
    with tqdm(total=len(lines), unit="prompt", dynamic_ncols=True, disable=None) as bar:
        for job, output in llm.run(jobs(), on_error=lambda job, error: fail(names[id(job)], error)):
            summary["num_tokens"] += sum(len(answer.token_ids) for answer in output.outputs)
            write(_row(names.pop(id(job)), output))
    summary["duration_s"] = round(time.monotonic() - started, 3)
    return summary


def _parse(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InvalidField(f"The line is not JSON: {error}.", field="line") from None
    if not isinstance(fields, dict):
        raise InvalidField("The line is not a JSON object.", field="line")
    known = PARAM_NAMES | set(PROMPT_NAMES) | OTHER_NAMES
    if unknown := sorted(fields.keys() - known):
        raise InvalidField(
            f"`{unknown[0]}` is not a known field.",
            field=unknown[0],
            hint=f"known are {', '.join(sorted(known))}",
        )
    if sum(name in fields for name in PROMPT_NAMES) != 1:
        raise InvalidField(
            "The line must hold exactly one of `prompt`, `prompt_token_ids`, `messages`.",
            field="prompt",
        )
    return fields


def _job(llm: LLM, fields: dict[str, Any]) -> Job:
    chosen = {name: fields[name] for name in PARAM_NAMES & fields.keys()}
    for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids", "stop"):
        if isinstance(chosen.get(name), str):
            chosen[name] = (chosen[name],)
        elif isinstance(chosen.get(name), list):
            chosen[name] = tuple(chosen[name])
    if isinstance(chosen.get("logit_bias"), dict):  # JSON has only text keys
        try:
            chosen["logit_bias"] = {int(key): bias for key, bias in chosen["logit_bias"].items()}
        except ValueError:
            raise InvalidField(
                "`logit_bias` has a key that is no token id.", field="logit_bias"
            ) from None
    priority = fields.get("priority", 0)
    if not isinstance(priority, int):
        raise InvalidField(
            f"`priority` is `{priority!r}`; it must be an integer.", field="priority"
        )
    if "messages" in fields:
        params = SamplingParams(**{"max_tokens": None, **chosen})
        return llm.prepare_chat(
            fields["messages"], params, tools=fields.get("tools"), priority=priority
        )
    prompt = fields.get("prompt", fields.get("prompt_token_ids"))
    return llm.prepare(_checked(prompt), SamplingParams(**chosen), priority)


def _checked(prompt: Any) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    if isinstance(prompt, str) or is_ids:
        return prompt  # type: ignore[no-any-return]
    raise InvalidField("The prompt must be text or a list of token ids.", field="prompt")


def _row(name: Any, output: Output) -> dict[str, Any]:
    return {
        "id": name,
        "outputs": [
            {
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
                "logprobs": answer.logprobs,
            }
            for answer in output.outputs
        ],
        "prompt_logprobs": output.prompt_logprobs,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "completion_tokens": sum(len(answer.token_ids) for answer in output.outputs),
        },
    }
