"""From the start of the server's process to the first streamed token, split by phase.

The phases are the engine's own (EngineInfo.startup_s); `listening_s` is when the server said that
it can be asked, `first_token_s` when the first piece of a streamed completion arrived, both counted
from the moment the process was spawned. Files are in the page cache: a first start, which is not
counted, has read them.

Rows are brook on both backends and, for each of `--sizes`, a checkpoint of random bfloat16 weights
with a tokenizer of as many words: unquantized, and in int4 quantized (one start) and from the
weight cache.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import environment, summary, write
from benchmarks.peers.shapes import SHAPES, write_checkpoint
from benchmarks.serving import Server, serving
from penstock.protocol.sse import DONE_DATA, Decoder

NUM_RUNS = 5
NUM_RESERVED = 256  # special tokens of a large vocabulary, as Llama 3 has them
MAX_WORD_LEN = 12
WRITE_S = 120.0  # how long the weight cache may take to be written
Run = dict[str, float]


def first_token_s(server: Server) -> float:
    """Ask a server for a few tokens: seconds from its start to the first."""
    body = {
        "model": Path(server.facts["model"]).name,
        "prompt": "What is this",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    decoder = Decoder()
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        for piece in response.iter_bytes():
            for event in decoder.push(piece):
                if event.data != DONE_DATA and json.loads(event.data)["choices"][0]["text"]:
                    return time.perf_counter() - server.spawned_s
    raise RuntimeError(f"no token from {server.facts['model']}")


def once(model: str, *options: str, until: Path | None = None) -> Run:
    """Seconds of one start, by name. `until`: leave once this directory holds kept weights."""
    with serving(model, *options) as server:
        listening_s = time.perf_counter() - server.spawned_s
        run = {"listening_s": listening_s, "first_token_s": first_token_s(server)}
        run |= {f"engine_{name}_s": value for name, value in server.facts["startup_s"].items()}
        deadline_s = time.monotonic() + WRITE_S
        while until is not None and not list(until.glob("*.weights")):
            if time.monotonic() > deadline_s:
                raise RuntimeError("the weights were not kept")
            time.sleep(0.1)
    return run


def measured(name: str, model: str, *options: str, warm_up: bool = True) -> dict[str, Any]:
    """A row: medians of several starts."""
    if warm_up:
        once(model, *options)
    runs = [once(model, *options) for _ in range(NUM_RUNS)]
    return {"name": name, "phases": {key: summary([run[key] for run in runs]) for key in runs[0]}}


def rows_of(size: str, directory: Path) -> Iterator[dict[str, Any]]:
    """The rows of a synthetic model."""
    model = str(write_model(size, directory))
    yield measured(f"{size}, bfloat16", model)
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        quantized = ("--quantization", "int4", "--weight-cache", cache)
        run = once(model, *quantized, until=Path(cache))
        phases = {name: summary([value]) for name, value in run.items()}
        yield {"name": f"{size}, int4, quantizing", "phases": phases}
        yield measured(f"{size}, int4, kept", model, *quantized)


def write_model(size: str, directory: Path) -> Path:
    """A checkpoint of a shape, with a tokenizer, written if it is not there."""
    shape = SHAPES[size]
    path = write_checkpoint(shape, directory)
    if not (path / "tokenizer.json").exists():
        (path / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocab_size)))
        (path / "tokenizer_config.json").write_text("{}")
    return path


def tokenizer(num_words: int) -> dict[str, Any]:
    """A byte-pair tokenizer in the Hugging Face format whose words are random ASCII letters."""
    rng = random.Random(0)
    specials = [f"<|reserved_{number}|>" for number in range(NUM_RESERVED)]
    words = dict.fromkeys([*string.ascii_letters, *string.digits, *string.punctuation, "\u0120"])
    parts, merges = list(words), []
    while len(words) + len(specials) < num_words:
        left, right = rng.choice(parts), rng.choice(parts)
        word = left + right
        if word not in words and len(word) <= MAX_WORD_LEN:
            words[word] = None
            merges.append([left, right])
            if len(word) <= MAX_WORD_LEN // 2:
                parts.append(word)
    vocab = {word: number for number, word in enumerate([*words, *specials])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[word], "content": word, "special": True, **added} for word in specials
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="*", choices=list(SHAPES), default=["smollm2-135m"])
    usual = Path(tempfile.gettempdir(), "penstock-benchmarks")
    parser.add_argument("--checkpoints", type=Path, default=usual, help="where they are written")
    options = parser.parse_args()
    before = environment()
    rows = [
        measured("brook, torch", "brook", "--backend", "torch"),
        measured("brook, native", "brook", "--backend", "native"),
    ]
    for size in options.sizes:
        rows += rows_of(size, options.checkpoints)
    write("startup", {"rows": rows}, before)


if __name__ == "__main__":
    main()
