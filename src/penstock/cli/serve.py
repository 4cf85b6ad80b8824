"""`penstock serve`: one model behind the OpenAI protocol."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from shutil import which
from typing import Any

import click

from penstock.cli.options import build, options_of
from penstock.engine.config import EngineConfig
from penstock.engine.locate import locate
from penstock.server.logs import configure_logging
from penstock.server.settings import ServerSettings
from penstock.types import EngineInfo

CURL = """  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "{question}"}}]}}'"""
POOL = """  curl {url}{route} -H 'content-type: application/json'{key} \\
    -d '{{"model": "{model}", {body}}}'"""
EMBEDS = ("/v1/embeddings", '"input": ["What is a penstock?", "A pipe to a turbine."]')
RANKS = ("/v1/rerank", '"query": "What is a penstock?", "documents": ["A pipe.", "A bird."]')
CLASSIFIES = ("/classify", '"input": "What is a penstock?"')
CHAT = "  {penstock} chat --url {url}"
QUESTION = "What is 17 + 25?"


@click.command(epilog="Example: penstock serve brook --port 8000")
@click.argument("model", default="brook", envvar="PENSTOCK_MODEL")
@click.option("--json", "as_json", is_flag=True, help="Print the URL and engine facts as one line.")
@options_of(ServerSettings)
@options_of(EngineConfig, skip=frozenset({"model"}))
def command(model: str, as_json: bool, **options: Any) -> int:
    """Serve MODEL over HTTP.

    MODEL is a built-in name, a directory in Hugging Face layout, a GGUF file, or a model of the
    hub: org/name, org/name@revision, org/name:Q4_K_M. What is not here is downloaded.
    """
    config = build(EngineConfig, options, model=model)
    settings = build(ServerSettings, options)
    settings.keys()  # what is wrong there is told at once
    configure_logging(settings.log_level)
    config = locate(config)  # in this process, which has the terminal
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
    ]
    if (pooling := info.pooling) is not None:
        route, body = EMBEDS
        if pooling.is_classifier:
            route, body = RANKS if pooling.size == 1 else CLASSIFIES
        pool = POOL.format(url=url, route=route, body=body, model=name, key=key)
        return "\n".join([*lines, pool, ""])
    # As it was called, where it is not on the path (`make serve`).
    program = "penstock" if which("penstock") else _relative(sys.argv[0])
    curl = CURL.format(url=url, model=name, key=key, question=QUESTION)
    return "\n".join([*lines, curl, "", CHAT.format(url=url, penstock=program), ""])
