"""What each format of weights costs and brings on the CPU: memory, loading, decoding, prompts.

Checkpoints of random numbers in real shapes (`benchmarks.stored`, `benchmarks.stored_gguf`), each
in a process of its own: started, loaded, asked and ended, one after the other, and every other
round in the opposite order. Ratios are of the same round. With `--peers`, llama.cpp on the same
GGUF files as well, in an environment of its own (see `benchmarks.peers`).

Run: python -m benchmarks.formats [--rounds 5] [--shape llama-3.2-1b] [--peers]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import stored, stored_gguf
from benchmarks.common import RESULTS, environment, summary, write
from benchmarks.peers.__main__ import CACHE
from benchmarks.peers.client import Worker, WorkerFailed
from benchmarks.peers.environments import InstallFailed, install, variables
from benchmarks.peers.protocol import Options
from benchmarks.peers.shapes import SHAPES, Shape, write_checkpoint
from penstock.models.checkpoint import precision
from penstock.models.files import read_config
from penstock.models.footprint import weight_bytes
from penstock.models.spec import ModelSpec
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import NONE, scheme

LIMIT_S = 300.0  # of any one request
NUM_PROMPT, NUM_DECODED, BATCH, NUM_PREFILLED = 64, 32, 8, 512
OURS = {"bf16": NONE, "int8": "int8", "int4": "int4"}  # quantized when loaded
GGUF = ("Q8_0", "Q4_0", "Q4_K_M")
HF = {
    "GPTQ, groups of 128": stored.gptq(4, 128, is_symmetric=True),
    "nf4": stored.nf4(),
    "fp8, blocks of 128": stored.fp8(128),
    "W8A8": stored.w8a8(),
}
FIGURES = ("load_s", "peak_rss_mib", "decode_1_tok_s", "decode_8_tok_s", "prefill_512_tok_s")
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Arm:
    """One engine with one checkpoint."""

    name: str
    engine: str
    python: Path
    options: Options
    weight_mib: float | None  # as penstock packs them

    def once(self, round_: int, cores: list[int], log: Path) -> Figures:
        """Start, load, ask and end.

        Raises:
            WorkerFailed: it cannot; nothing is left running.
        """
        command = [str(self.python), "-m", f"benchmarks.peers.workers.{self.engine}"]
        with Worker(command, variables(self.engine, self.python, cores), log) as worker:
            options = asdict(self.options)
            found = {"load_s": worker.call("load", limit_s=LIMIT_S, options=options)["seconds"]}

            def generate(what: str, num_prompts: int, length: int, num: int) -> list[list[float]]:
                prompts = [[(f"{what} {round_} {n}", length)] for n in range(num_prompts)]
                times: list[list[float]] = worker.call(
                    "generate", limit_s=LIMIT_S, prompts=prompts, num_tokens=num
                )
                return times

            for size in (1, BATCH):
                generate("warm-up", size, NUM_PROMPT, 4)
            found |= _asked(generate)
            found["peak_rss_mib"] = worker.peak_rss_bytes() / 2**20
        return found


def _asked(generate: Callable[[str, int, int, int], list[list[float]]]) -> Figures:
    """The speeds, in tokens a second; of decoding, from when every prompt is computed."""
    found = {}
    for size in (1, BATCH):
        times = generate(f"decode {size}", size, NUM_PROMPT, NUM_DECODED + 1)
        spent_s = max(one[-1] for one in times) - max(one[0] for one in times)
        found[f"decode_{size}_tok_s"] = size * NUM_DECODED / spent_s
    ((first_s,),) = generate("prefill", 1, NUM_PREFILLED, 1)
    return found | {"prefill_512_tok_s": NUM_PREFILLED / first_s}


def main() -> int:
    options = arguments()
    before = environment()
    cores = sorted(os.sched_getaffinity(0))
    python = _peer(options) if options.peers else None
    rows = []
    for name in options.shape or ["smollm2-135m"]:
        arms = list(_arms(SHAPES[name], options, cores, python))
        samples = measure(arms, options.rounds, cores, options.work_dir / "formats.log")
        rows += [{"shape": name, **row} for row in _rows(arms, samples)]
    figures = {
        "rounds": options.rounds,
        "lengths": {
            "prompt": NUM_PROMPT,
            "decoded": NUM_DECODED,
            "batch": BATCH,
            "prefill": NUM_PREFILLED,
        },
        "rows": rows,
    }
    write("formats", figures, before, options.results)
    return int(any("failed" in row for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="samples of each figure")
    add("--shape", action="append", choices=list(SHAPES), help="repeatable; smollm2-135m")
    add("--peers", action="store_true", help="llama.cpp on the same GGUF files")
    add("--work-dir", type=Path, default=CACHE, help="checkpoints and environments, kept")
    add("--pip-args", default=os.environ.get("PIP_ARGS", ""), help="for the install of llama.cpp")
    add("--results", type=Path, default=RESULTS, help="where formats.json goes")
    return parser.parse_args()


def _peer(options: argparse.Namespace) -> Path | None:
    """The interpreter of llama.cpp's environment."""
    try:
        return install("llamacpp", options.work_dir / "environments", options.pip_args.split())
    except InstallFailed as error:
        print(f"llama.cpp is not installed: {error}", file=sys.stderr)
        return None


def _arms(
    shape: Shape, options: argparse.Namespace, cores: list[int], peer: Path | None
) -> list[Arm]:
    """bf16 first. Files that are missing are written."""
    plain = write_checkpoint(shape, options.work_dir / "checkpoints")
    directory = options.work_dir / "formats" / shape.name
    arms = []

    def add(name: str, path: Path, quantization: str | None, engine: str = "penstock") -> None:
        asked = quantization or NONE
        weight_mib = _weight_mib(path, asked) if engine == "penstock" else None
        told = Options(
            checkpoint=str(path),
            directory=str(path.parent),
            precision="bf16" if asked == NONE else asked,
            group=shape.quantization_group,
            num_threads=len(cores),
            max_len=1024,
            max_num_seqs=BATCH,
            max_batched_tokens=NUM_PREFILLED,
            kv_bytes=(BATCH + 1) * 1024 * shape.kv_bytes_per_token,
            vocab_size=shape.vocab_size,
            extra={} if asked == NONE else {"weight_cache": "off"},
        )
        python = peer if engine == "llamacpp" and peer else Path(sys.executable)
        arms.append(Arm(name, engine, python, told, weight_mib))

    for name, quantization in OURS.items():
        add(name, plain, quantization)
    for mix in GGUF:
        path = stored_gguf.write(shape, mix, directory / mix / "model.gguf")
        add(f"GGUF {mix}", path, None)
        if peer is not None:
            add(f"GGUF {mix}", path, None, "llamacpp")
    for name, form in HF.items():
        add(name, stored.write(shape, form, directory / name.replace(", ", "-")), None)
    return arms


def _weight_mib(path: Path, quantization: str) -> float:
    """Of the weights as the native backend holds them: `tests/models/test_formats.py`."""
    config = read_config(path)
    stored_as = precision(path, config) if quantization == NONE else None
    formats = Formats(scheme(quantization, "bfloat16"), stored_as)
    return weight_bytes(ModelSpec.from_hf(config), formats) / 2**20


def measure(
    arms: list[Arm], num_rounds: int, cores: list[int], log: Path
) -> list[dict[int, Figures] | str]:
    """The figures of every round, by arm; or why there are none."""
    samples: list[dict[int, Figures] | str] = [{} for _ in arms]
    for round_ in range(num_rounds):
        order = list(range(len(arms)))
        for index in order if round_ % 2 == 0 else reversed(order):
            rounds, arm = samples[index], arms[index]
            if isinstance(rounds, str):
                continue
            try:
                rounds[round_] = arm.once(round_, cores, log)
            except WorkerFailed as error:
                samples[index] = str(error)
            told = samples[index] if isinstance(samples[index], str) else rounds[round_]
            print(f"{round_} {arm.name}, {arm.engine}: {told}", file=sys.stderr, flush=True)
    return samples


def _rows(arms: list[Arm], samples: list[dict[int, Figures] | str]) -> list[dict[str, Any]]:
    """A row for each arm: medians, samples, and ratios to bf16 in the same round."""
    base = samples[0]
    rows = []
    for arm, rounds in zip(arms, samples, strict=True):
        row: dict[str, Any] = {"format": arm.name, "engine": arm.engine}
        if arm.weight_mib is not None:
            row["weight_mib"] = round(arm.weight_mib, 2)
        rows.append(row)
        if isinstance(rounds, str):
            row["failed"] = rounds
            continue
        for figure in FIGURES:
            values = [found[figure] for found in rounds.values()]
            row[figure] = {**summary(values), "samples": values}
            if isinstance(base, dict):
                both = [(found[figure], base[n][figure]) for n, found in rounds.items()]
                row[f"{figure}_over_bf16"] = summary([ours / bf16 for ours, bf16 in both])
    return rows


if __name__ == "__main__":
    sys.exit(main())
