"""`penstock bench startup|latency|throughput|engines`: engines that penstock starts itself.

Each command is the same run of rounds with other stages. An ARM is a URL, an engine in this
process, or an engine by its recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli import runs
from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.meters.settings import MeterSettings

if TYPE_CHECKING:
    from penstock.measure.engines.workload import Work

Command = Callable[..., Any]
DEFAULT_LOAD, DEFAULT_CONTEXT = "512x128", 2048
# Of the meters: an engine here has no price and no country.
_NOT_MEASURED = frozenset(
    {
        *("prices", "usd_per_hour", "usd_per_kwh"),
        *("country", "cloud_region", "gco2_per_kwh", "whole_machine"),
    }
)
_ARMS = """

    An ARM is `http://HOST:PORT[#MODEL]`, `RECIPE:MODEL?option=value&flag` or `inprocess:MODEL`;
    recipes are penstock (also without its name), vllm, llama-server, llama-cpp-python, ovms and
    transformers. `NAME=ARM` names it. An option becomes the engine's flag; `executable=PATH`,
    `env.NAME=value`, `precision=`, `tokenizer=`, `dialect=` and `ready_timeout_s=` are penstock's.
    """
_STATUS = """

    \b
    Exit status: 0 fine, 1 an error, 2 wrong usage, 3 the run is not valid.
    """


def _common(command: Command) -> Command:
    """What all four commands are told."""
    for option in reversed(
        [
            click.argument("arms", nargs=-1, required=True, metavar="ARM..."),
            click.option("--rounds", type=click.IntRange(1), default=3, show_default=True,
                         help="Each arm is started anew in each."),
            click.option("--seed", type=int, default=0, show_default=True, help="Draws prompts."),
            click.option("--page-cache", type=click.Choice(["warm", "cold"]), default="warm",
                         show_default=True, help="cold: drop the model's files before a start."),
            click.option("--output",
                "-o", type=click.Path(file_okay=False, path_type=Path),
                         help="Directory of the run. Default: a new one below PENSTOCK_RUNS."),
            click.option("--api-key-env", metavar="NAME",
                         help="Variable with the key of a URL. Default: PENSTOCK_API_KEY, else "
                         "OPENAI_API_KEY."),
            click.option("--header-env", multiple=True, metavar="NAME=VARIABLE",
                         help="A header of requests to a URL, whose value a variable holds."),
            click.option("--ready-timeout", type=click.FloatRange(1), default=600.0,
                         show_default=True, help="Seconds that an engine may take to start."),
            click.option("--request-timeout", type=click.FloatRange(1), default=600.0,
                         show_default=True, help="Seconds that an answer may take."),
            click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
            options_of(MeterSettings, skip=_NOT_MEASURED),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _help(text: str) -> str:
    return text + _ARMS + _STATUS


@click.command(
    help=_help("Measure how long engines take to start: cold process to first token."),
    epilog="Example: penstock bench startup brook llama-server:model.gguf --rounds 5",
)
@_common
def startup(**values: Any) -> int:
    return _run("startup", lambda: ([], {}), values)


@click.command(
    help=_help("Ask engines one request at a time: time to first token, and of each token."),
    epilog="Example: penstock bench latency brook brook?quantization=int8 --lengths 512x64",
)
@click.option(
    "--lengths",
    default="512x64",
    show_default=True,
    help="Tokens of prompt and answer, some by commas: 128x64,1024x64.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Of each pair of lengths, in each round.",
)
@_common
def latency(lengths: str, requests: int, **values: Any) -> int:  # fmt: skip
    return _run("latency", lambda: (_latency_works(lengths, requests), {}), values)


def _load(command: Command) -> Command:
    """Which requests are asked some at a time."""
    for option in reversed(
        [
            click.option(
                "--load-lengths",
                help="Of the requests at a time: tokens of prompt and answer; some by commas take "
                f"turns.  [default: {DEFAULT_LOAD}]",
            ),
            click.option(
                "--trace",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="Lengths of requests of a trace instead of --load-lengths.",
            ),
            click.option(
                "--context",
                type=click.IntRange(2),
                help="With --trace: longer requests are clipped to so many tokens.  "
                f"[default: {DEFAULT_CONTEXT}]",
            ),
            click.option(
                "--requests",
                type=click.IntRange(1),
                default=32,
                show_default=True,
                help="In each round.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.command(
    help=_help("Give engines many requests and count tokens per second, prompts and answers."),
    epilog="Example: penstock bench throughput brook vllm:./model --requests 64",
)
@_load
@click.option("--concurrency", type=click.IntRange(1), help="At a time. Default: all at once.")
@_common
def throughput(**values: Any) -> int:
    return _run("throughput", lambda: _throughput_work(values), values)


@click.command(
    help=_help("Compare engines in one table: start-up, latency, throughput, memory and energy."),
    epilog="Example: penstock bench engines brook llama-server:model.gguf --trace conv.csv",
)
@click.option(
    "--lengths",
    default="512x64",
    show_default=True,
    help="Of the requests one at a time: tokens of prompt and answer.",
)
@click.option(
    "--latency-requests",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="One at a time, of each pair of lengths, in each round.",
)
@_load
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="How many requests at a time.",
)
@_common
def engines(lengths: str, latency_requests: int, **values: Any) -> int:
    def works() -> tuple[list[Work], dict[str, Any]]:
        some, facts = _throughput_work(values)
        return [*_latency_works(lengths, latency_requests), *some], facts

    return _run("engines", works, values)


def _latency_works(text: str, num_requests: int) -> list[Work]:
    from penstock.measure.engines.workload import Work, parse_lengths

    return [
        Work("latency", f"latency {length}", (length,) * num_requests, 1)
        for length in dict.fromkeys(parse_lengths(text, "--lengths"))
    ]


def _throughput_work(values: dict[str, Any]) -> tuple[list[Work], dict[str, Any]]:
    """The stage, and what the header keeps of a trace."""
    from penstock.measure.engines.workload import Work, parse_lengths, trace_lengths

    text, trace, context = values["load_lengths"], values["trace"], values["context"]
    num = values["requests"]
    at_once = min(values["concurrency"] or num, num)
    stage = f"throughput {'all' if at_once == num else at_once} at once"
    if trace is None:
        if context is not None:
            raise ConfigError("`--context` is set without `--trace`.", hint="it clips a trace")
        some = parse_lengths(text or DEFAULT_LOAD, "--load-lengths")
        lengths = tuple(some[index % len(some)] for index in range(num))
        return [Work("throughput", stage, lengths, at_once)], {}
    if text is not None:
        raise ConfigError("`--load-lengths` and `--trace` both give lengths.", hint="give one")
    drawn = trace_lengths(trace, num, context_len=context or DEFAULT_CONTEXT, seed=values["seed"])
    return [Work("throughput", stage, drawn.lengths, at_once)], {"trace": drawn.facts}


def _run(
    name: str, works: Callable[[], tuple[list[Work], dict[str, Any]]], values: dict[str, Any]
) -> int:
    """Measure, write the run, print the table.

    Args:
        works: reads the stages, and what the header keeps of them, out of the options.
    """
    from penstock.measure.engines.page import text_table
    from penstock.measure.engines.session import Options, Session

    runs.check_output(values["output"])
    with runs.usage():
        stages, facts = works()
        session = Session(
            Options(
                command=name,
                arms=values["arms"],
                works=stages,
                num_rounds=values["rounds"],
                seed=values["seed"],
                is_cold=values["page_cache"] == "cold",
                out=values["output"],
                api_key_env=values["api_key_env"],
                header_env=values["header_env"],
                ready_timeout_s=values["ready_timeout"],
                request_timeout_s=values["request_timeout"],
                meters=build(MeterSettings, values),
                facts=facts,
            )
        )
    work = session.run(lambda line: click.echo(line, err=True))
    made, interrupted = runs.measured(session, work)
    assert session.path is not None
    return runs.tell(
        session.path,
        made,
        lambda: text_table(made.figures),
        as_json=values["as_json"],
        interrupted=interrupted,
    )
