"""penstock's server beside other engines' servers, on lengths of the Azure conversation trace.

A checkpoint of random bfloat16 weights in a real shape is served by each engine over HTTP, with as
many threads and the same context: vLLM from its environment of `benchmarks.peers`, llama.cpp's
`llama-server` from wherever it was built. What is asked and computed is `penstock bench engines`;
this writes the checkpoint in each engine's format, and keeps figures and page as
`results/engines.json` and `results/engines.html`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from benchmarks.common import RESULTS, ROOT, environment, write
from benchmarks.peers.__main__ import CACHE
from benchmarks.peers.environments import install, variables
from benchmarks.peers.shapes import SHAPES
from benchmarks.startup import write_model
from benchmarks.verdict import CPU_WATTS
from penstock.measure.engines.page import text_table
from penstock.measure.engines.session import Options, Session
from penstock.measure.engines.workload import Length, Work, trace_lengths
from penstock.measure.kinds import finish
from penstock.measure.meters.settings import MeterSettings
from penstock.measure.run import Run

TRACE = "traces-azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
# Of the variables of its environment: those for an engine in one process with its benchmark.
NOT_SERVED = {"PYTHONPATH", "VLLM_ENABLE_V1_MULTIPROCESSING"}
ENGINES = ("penstock", "llama-server", "vllm")
# llama.cpp's server is not in its Python package: it is built from the same source.
WRITE_GGUF = "from benchmarks.peers.workers.llamacpp import write_gguf as w; from pathlib import Path; import sys; w(*map(Path, sys.argv[1:]))"  # noqa: E501


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--engines", nargs="*", choices=ENGINES, default=list(ENGINES), help="penstock first")
    add("--model", choices=list(SHAPES), default="smollm2-135m", help="shape of the checkpoint")
    add("--trace", type=Path, default=Path(os.environ.get("PENSTOCK_DATA", "."), TRACE), help="CSV")
    add("--context", type=int, default=4096, help="tokens of prompt and answer; longer are clipped")
    add("--requests", type=int, default=24, help="of the trace, in each round")
    add("--concurrency", type=int, default=8, help="of them at a time")
    add("--latency-requests", type=int, default=5, help="one at a time, in each round")
    add("--rounds", type=int, default=3, help="each engine is started anew in each")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    add("--llama-server", type=Path, help="the binary; else what is on the PATH")
    add("--work-dir", type=Path, default=CACHE, help="checkpoints and environments")
    add("--pip-args", default=os.environ.get("PIP_ARGS", ""), help="for an install")
    add("--cpu-watts", type=float, default=CPU_WATTS, help="of this machine when busy: assumed")
    add("--results", type=Path, default=RESULTS, help="where results go")
    return parser.parse_args()


def arm(name: str, model: Path, **options: str | int | None) -> str:
    """An arm's text: `name=name:model?option=value&flag`."""
    told = [
        option if value is None else f"{option}={quote(str(value), safe='/,{}')}"
        for option, value in options.items()
    ]
    return f"{name}={name}:{model}?{'&'.join(told)}"


def arms(options: argparse.Namespace, model: Path) -> list[str]:
    """The text of each engine's arm: the same threads, context and requests at a time."""
    threads, context, batch = options.threads, options.context, options.concurrency
    made = []
    for engine in options.engines:
        if engine == "penstock":
            made.append(arm(engine, model, num_threads=threads, max_model_len=context))
        elif engine == "llama-server":
            binary = {"executable": str(options.llama_server)} if options.llama_server else {}
            slots: dict[str, int | None] = {"parallel": batch, "ctx_size": batch * context}
            cache = {"cache_ram": 0}  # no prompt comes twice: keeping them only costs
            gguf = write_gguf(model, options)
            made.append(arm(engine, gguf, threads=threads, **slots, **cache, **binary))
        else:
            python = install("vllm", options.work_dir / "environments", options.pip_args.split())
            cores = sorted(os.sched_getaffinity(0))[:threads]
            told = {
                f"env.{name}": value
                for name, value in variables("vllm", python, cores).items()
                if os.environ.get(name) != value and name not in NOT_SERVED
            }
            told |= {"env.VLLM_CPU_KVCACHE_SPACE": "2", "executable": str(python)}
            sizes: dict[str, str | int] = {"max_model_len": context, "dtype": "bfloat16"}
            made.append(arm(engine, model, **sizes, enable_prompt_tokens_details=None, **told))
    return made


def write_gguf(model: Path, options: argparse.Namespace) -> Path:
    """The checkpoint in llama.cpp's format, written if it is not there."""
    path: Path = options.work_dir / f"{model.name}-bf16.gguf"
    if not path.exists():
        environments = options.work_dir / "environments"
        python = install("llamacpp", environments, options.pip_args.split())
        command = [str(python), "-c", WRITE_GGUF, str(model), str(path)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return path


def works(options: argparse.Namespace) -> tuple[list[Work], dict[str, object]]:
    """One request at a time, and the trace's lengths some at a time."""
    drawn = trace_lengths(options.trace, options.requests, context_len=options.context, seed=0)
    length = Length(min(1024, options.context - 64), 64)
    one = Work("latency", f"latency {length}", (length,) * options.latency_requests, 1)
    stage = f"Azure conversation, {options.concurrency} at once"
    return [one, Work("throughput", stage, drawn.lengths, options.concurrency)], drawn.facts


def main() -> int:
    options = arguments()
    before = environment()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    options.work_dir.mkdir(parents=True, exist_ok=True)
    model = write_model(options.model, options.work_dir / "served")
    # vLLM and transformers ask for a class; the format of the file says the rest.
    told = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    stages, trace = works(options)
    asked = Options(
        command="benchmarks.engines",
        arms=arms(options, model),
        works=stages,
        num_rounds=options.rounds,
        seed=0,
        is_cold=False,
        out=None,
        api_key_env=None,
        ready_timeout_s=600.0,
        request_timeout_s=1200.0,
        meters=MeterSettings(cpu_watts=options.cpu_watts),
        facts={"trace": trace},
    )
    session = Session(asked)
    asyncio.run(session.run(lambda line: print(line, file=sys.stderr)))
    assert session.path is not None
    path, made = session.path, finish(session.path)
    header = Run(path).header
    places = {str(options.work_dir): "WORK", str(options.llama_server): "llama-server"}
    figures = {
        "problems": made.problems,
        "records_sha256": made.records_sha256,
        "settings": {key: header.settings[key] for key in ("num_rounds", "works", "trace")},
        **made.figures,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write("engines", json.loads(_without(json.dumps(figures), places)), before, options.results)
    page = (path / "report.html").read_text()
    (options.results / "engines.html").write_text(_without(page, places))
    print(text_table(made.figures), file=sys.stderr)
    return 0


def _without(text: str, places: dict[str, str]) -> str:
    """A text without the directories of this machine."""
    for place, name in places.items():
        text = text.replace(place, name)
    return text


if __name__ == "__main__":
    sys.exit(main())
