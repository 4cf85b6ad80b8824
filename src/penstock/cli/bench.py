"""`penstock bench`: commands by name, imported when they run; an address alone means `serve`."""

from __future__ import annotations

from importlib import import_module

import click

# name: (module in penstock.cli, one line for `penstock bench --help`). The module holds the name.
COMMANDS = {
    "serve": ("bench_load", "One load on a server, or on an engine that is started for it."),
    "sweep": ("bench_load", "Loads up to saturation, or the highest rate within limits."),
    "startup": ("bench_engines", "How long engines take until they answer."),
    "latency": ("bench_engines", "One request at a time, on engines side by side."),
    "throughput": ("bench_engines", "As much as goes, on engines side by side."),
    "engines": ("bench_engines", "All of these for several engines, in one table."),
}


class BenchGroup(click.Group):
    """`bench TARGET` is `bench serve TARGET`; options may come first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*COMMANDS, "-h", "--help"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = getattr(import_module(f"penstock.cli.{module}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=BenchGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: penstock bench http://127.0.0.1:8000 --request-rate 4 --duration 60",
)
def command() -> None:
    """Load a server, or engines side by side, and report what they do.

    `penstock bench http://HOST:PORT` is `penstock bench serve http://HOST:PORT`: its options, such
    as --request-rate, --concurrency, --duration and --slo, are told by `penstock bench serve
    --help`, those of the others by `penstock bench COMMAND --help`.
    """
