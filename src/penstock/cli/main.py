"""The `penstock` command. Commands are named here and imported only when they run.

Results go to stdout, everything else to stderr. An error of ours is one sentence and a hint, and
exit status 1; a wrong option is exit status 2; Ctrl-C is 130. Commands that measure have more, see
`penstock.cli.runs`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

import penstock
from penstock.errors import PenstockError
from penstock.extras import explain

# name: one line for `penstock --help`. The module penstock.cli.<name> holds `command`.
COMMANDS = {
    "serve": "Serve a model over the OpenAI protocol.",
    "chat": "Chat in the terminal, with a model or a running server.",
    "generate": "Answer the prompts of a JSONL file.",
    "bench": "Load a server, or engines side by side, and report what they do.",
    "eval": "Score a model's answers: published tasks, brook's, or your own.",
    "compare": "Decide between two servers, precisions, engines or providers.",
    "track": "Probe providers on a schedule and keep the time series.",
    "models": "List, check, download and remove the models of the hub that are here.",
    "plan": "Tell what a model takes and how fast it will be here, from its config alone.",
    "results": "List, filter, diff, import and export runs.",
    "verify": "Compute every figure of a run again from its raw records.",
    "doctor": "Show what this machine has and what penstock makes of it.",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"penstock.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: penstock serve brook, then penstock chat --url http://127.0.0.1:8000",
)
@click.version_option(penstock.__version__, prog_name="penstock")
def cli() -> None:
    """Serve open LLMs fast on hardware you own."""


def main() -> None:
    """Entry point: run a command and turn our errors into a sentence."""
    try:
        sys.exit(_run())
    except BrokenPipeError:
        # The reader of stdout has left; nothing is wrong, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run() -> int:
    try:
        try:
            status = cli.main(standalone_mode=False, prog_name="penstock")
        except ModuleNotFoundError as error:
            raise explain(error) from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PenstockError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    sys.stdout.flush()  # a broken pipe is found here, not at exit
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
