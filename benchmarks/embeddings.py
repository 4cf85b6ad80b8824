"""Texts a second that become embeddings, beside transformers on torch, in the same run.

The shapes of BERT-base and of Qwen3-0.6B with random weights, one checkpoint for both sides; texts
of 32 and of 512 tokens, all of a length, so that the peer pads nothing. Each round asks one side
after the other, by turns the other one first; a figure is the median of the rounds. Both use all
cores. The answers are compared first: a benchmark of different results would measure nothing.

Run: python -m benchmarks.embeddings [--rounds 5] [--shapes bert-base qwen3-0.6b]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.common import environment, write
from penstock.engine.config import EngineConfig
from penstock.engine.make import make_core
from penstock.types import EngineRequest, SamplingParams

F32 = NDArray[np.float32]
Texts = NDArray[np.int64]  # [number, length]
Embed = Callable[[Texts], F32]

LENGTHS = (32, 512)
BATCH_TOKENS = 2048  # of a step of ours, and of a batch of the peer
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99}  # between the two sides' answers


class Shape(NamedTuple):
    """A model, and how many texts of each length a round has."""

    make: Callable[[], Any]  # a transformers model
    pooling: str
    dtypes: tuple[str, ...]
    num_texts: tuple[int, int]


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)


def _qwen3() -> Any:
    config = transformers.Qwen3Config(
        vocab_size=151669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3Model(config)


SHAPES = {
    "bert-base": Shape(_bert, "cls", ("float32", "bfloat16"), (32, 4)),
    "qwen3-0.6b": Shape(_qwen3, "last", ("bfloat16",), (8, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backend", default="native", choices=["native", "torch"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    before = environment()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.shapes:
        for row in measure(name, SHAPES[name], options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    settings = {"rounds": options.rounds, "threads": options.threads, "backend": options.backend}
    write("embeddings", {**settings, "rows": rows}, before)


def measure(name: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each dtype and length."""
    rows = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        with torch.device("cpu"):
            model = shape.make().eval()
        for dtype in shape.dtypes:
            path = Path(directory) / dtype
            model = model.to(getattr(torch, dtype))
            model.save_pretrained(path)
            sides = {
                "penstock": ours(path, dtype, options),
                "transformers": theirs(model, shape.pooling),
            }
            for length, number in zip(LENGTHS, shape.num_texts, strict=True):
                texts = np.random.default_rng(length).integers(1000, 30000, (number, length))
                figures = compare(sides, texts, dtype, options.rounds)
                rows.append({"model": name, "dtype": dtype, "length": length, **figures})
    return rows


def compare(sides: dict[str, Embed], texts: Texts, dtype: str, num_rounds: int) -> dict[str, Any]:
    """Texts a second of each side, and ours over theirs round by round."""
    found = [embed(texts[:2]) for embed in sides.values()]  # which warms both up, too
    cosine = float((found[0] * found[1]).sum(axis=1).min())
    if cosine < LEAST_COSINE[dtype]:
        raise SystemExit(f"The answers differ: their cosine is {cosine}.")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(num_rounds):
        for name in sorted(sides, reverse=bool(round_ % 2)):
            started_s = time.perf_counter()
            sides[name](texts)
            rates[name].append(len(texts) / (time.perf_counter() - started_s))
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    return {
        "num_texts": len(texts),
        "cosine": round(cosine, 6),
        **{f"{name}_texts_per_s": round(statistics.median(r), 3) for name, r in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def ours(path: Path, dtype: str, options: argparse.Namespace) -> Embed:
    """The engine that pools, in this process."""
    config = EngineConfig(
        model=str(path),
        runner="pooling",
        dtype=dtype,
        backend=options.backend,
        max_num_batched_tokens=BATCH_TOKENS,
        num_threads=options.threads,
    )
    core = make_core(config)

    def embed(texts: Texts) -> F32:
        for number, ids in enumerate(texts.tolist()):
            request = EngineRequest(
                request_id=str(number), prompt_token_ids=ids, params=SamplingParams()
            )
            core.add(request)
        found: dict[int, F32] = {}
        while core.has_work:
            for event in core.step():
                found[int(event.request_id)] = np.frombuffer(event.vector or b"", "<f4")
        return np.stack([found[number] for number in range(len(texts))])

    return embed


def theirs(model: Any, pooling: str) -> Embed:
    """transformers, with as many texts in a batch as a step of ours has."""

    @torch.inference_mode()
    def embed(texts: Texts) -> F32:
        size = max(BATCH_TOKENS // texts.shape[1], 1)
        found = []
        for first in range(0, len(texts), size):
            ids = torch.from_numpy(texts[first : first + size])
            causal = {"use_cache": False} if pooling == "last" else {}
            hidden = model(ids, **causal).last_hidden_state
            picked = hidden[:, -1 if pooling == "last" else 0].float()
            found.append(torch.nn.functional.normalize(picked, dim=-1).numpy())
        return np.concatenate(found)

    return embed


if __name__ == "__main__":
    main()
