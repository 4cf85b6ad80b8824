"""`penstock serve`: one model behind the OpenAI protocol."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from shutil import which
from typing import Any

import click

from penstock.builtin import resolve_model
from penstock.cli.options import build, options_of
from penstock.engine.config import EngineConfig
from penstock.server.settings import ServerSettings
from penstock.types import EngineInfo

CURL = """  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "{question}"}}]}}'"""
CHAT = "  {penstock} chat --url {url}"
QUESTION = "What is 17 + 25?"


@click.command(epilog="Example: penstock serve brook --port 8000")
@click.argument("model", default="brook", envvar="PENSTOCK_MODEL")
@click.option("--json", "as_json", is_flag=True, help="Print the URL and engine facts as one line.")
@options_of(ServerSettings)
@options_of(EngineConfig, skip=frozenset({"model"}))
def command(model: str, as_json: bool, **options: Any) -> int:
    """Serve MODEL, a directory in Hugging Face layout or a built-in name, over HTTP."""
    config = build(EngineConfig, options, model=model)
    settings = build(ServerSettings, options)
    resolve_model(config.model), settings.keys()  # what is wrong there is told at once
    from penstock.engine.process import ProcessClient

    # The engine loads while this process still imports; it ends with it, whatever comes.
    engine = None if settings.engine_thread else ProcessClient(config)
    from penstock.server.run import default_model_name, serve

    names = settings.served_model_name or (default_model_name(config),)

    def banner(url: str, info: EngineInfo) -> None:
        if as_json:
            click.echo(json.dumps({"url": url} | dataclasses.asdict(info)))
        else:
            click.echo(_banner(url, info, names[0], needs_key=bool(settings.keys())))

    make_client = None if engine is None else lambda config: engine
    return serve(config, settings, banner=banner, make_client=make_client)


def _relative(program: str) -> str:
    return os.path.relpath(program) if os.path.isabs(program) else program


def _banner(url: str, info: EngineInfo, name: str, *, needs_key: bool) -> str:
    key = ' -H "authorization: Bearer $PENSTOCK_API_KEY"' if needs_key else ""
    started_s = sum(info.startup_s.values())
    lines = [
        "",
        *info.plan,
        "",
        f"{name} answers at {url} (engine ready in {started_s:.1f} s). Try:",
        "",
        *(["  export PENSTOCK_API_KEY=...  # one of the keys", ""] if needs_key else []),
        CURL.format(url=url, model=name, key=key, question=QUESTION),
        "",
        # As it was called, where it is not on the path (`make serve`).
        CHAT.format(url=url, penstock="penstock" if which("penstock") else _relative(sys.argv[0])),
        "",
    ]
    return "\n".join(lines)
