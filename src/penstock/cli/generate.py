"""`penstock generate`: a JSONL file of prompts in, a JSONL file of answers out.

A line holds `prompt` (text), `prompt_token_ids` or `messages`, and may hold an `id`, a `priority`
and any field of SamplingParams. A line that cannot be served becomes an error row and the others
go on; rows are written as they finish, so that an interrupted run keeps what is done.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from penstock.cli.lines import id_of, job_of
from penstock.cli.options import build, options_of
from penstock.engine.config import EngineConfig
from penstock.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from penstock.llm import LLM, Job, Output


@click.command(
    epilog='Example: echo \'{"prompt": "2 + 2 ="}\' | penstock generate - -o answers.jsonl'
)
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), default="-", help="Default: stdout."
)
@click.option(
    "--model", "-m", default="brook", show_default=True, help="A model, as serve takes it."
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
    lines = _read(prompts)
    with _open(output) as sink:  # before the model: a wrong path is told at once
        from penstock.llm import LLM  # torch, only now

        config = build(EngineConfig, options, model=model)
        llm = LLM(**{field.name: getattr(config, field.name) for field in fields(config)})
        defaults: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        summary = _answer(llm, lines, defaults, sink)
    if as_json:
        click.echo(json.dumps(summary), err=True)
    elif summary["num_errors"]:
        click.echo(f"error: {summary['num_errors']} of {len(lines)} lines failed.", err=True)
    return 1 if summary["num_errors"] else 0


def _read(path: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` cannot be read as UTF-8 text: {error}.") from None
    return [line for line in text.split("\n") if line.strip()]


def _open(path: str) -> Any:
    try:
        return click.open_file(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`--output {path}` cannot be written: {error.strerror}.") from None


def _answer(
    llm: LLM, lines: list[str], defaults: dict[str, Any], sink: IO[str]
) -> dict[str, int | float]:
    from tqdm import tqdm

    names: dict[int, str | int] = {}  # what the line is called, by id() of its job
    summary: dict[str, int | float] = {"num_prompts": len(lines), "num_errors": 0, "num_tokens": 0}

    def write(row: dict[str, Any]) -> None:
        sink.write(json.dumps(row) + "\n")
        sink.flush()
        bar.update()

    def fail(name: str | int, error: RequestError) -> None:
        summary["num_errors"] += 1
        write({"id": name, "error": {"field": error.field, "message": str(error)}})

    def jobs() -> Iterator[Job]:
        for number, line in enumerate(lines, start=1):
            name = id_of(line)
            name = number if name is None else name
            try:
                job = job_of(line, llm, defaults)
            except RequestError as error:
                fail(name, error)
                continue
            names[id(job)] = name
            yield job

    started_s = time.monotonic()
    with tqdm(total=len(lines), unit="prompt", dynamic_ncols=True, disable=None) as bar:
        for job, output in llm.run(jobs(), on_error=lambda job, error: fail(names[id(job)], error)):
            summary["num_tokens"] += sum(len(answer.token_ids) for answer in output.outputs)
            write(_row(names.pop(id(job)), output))
    summary["duration_s"] = round(time.monotonic() - started_s, 3)
    return summary


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
