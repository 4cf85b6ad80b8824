"""What each number format costs in quality, on brook: weights, distributions, answers.

- the relative error of the packed weights, root mean square over the matrices of a kind;
- the Kullback-Leibler divergence of the next token's distribution from that of float32, and how
  often the most likely token is the same, over held-out answers;
- the share of held-out tasks that are solved, answered greedily by the engine.

Run: python -m benchmarks.quantization [--count 20] [--task-count 50]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tools.brook.chat import END
from tools.brook.evaluate import MAX_TOKENS, by_group, score, wilson
from tools.brook.example import Example
from tools.brook.render import Chat, wire
from tools.brook.tasks import TASKS, held_out

from benchmarks.common import environment, write
from penstock import LLM, SamplingParams, builtin
from penstock.models.base import Model
from penstock.models.batch import ForwardBatch
from penstock.models.load import load_model
from penstock.models.safetensors import map_tensors
from penstock.native import library
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.schemes import NATIVE_NAMES, NONE, Format, scheme
from penstock.quantization.unpack import unpack

F32 = NDArray[np.float32]

MODEL = "brook"
MAX_LEN = 1024
# dtype, quantization, KV cache; the first is what the others are compared with
FORMATS = [
    ("float32", NONE, "float32"),
    ("bfloat16", NONE, "bfloat16"),
    *(("bfloat16", name, "bfloat16") for name in NATIVE_NAMES if name != NONE),
    ("bfloat16", NONE, "int8"),
    ("bfloat16", "int8", "int8"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="examples a task for distributions")
    parser.add_argument("--task-count", type=int, default=50, help="examples a task for answers")
    options = parser.parse_args()
    before = environment()
    path = builtin.path(MODEL)
    texts = token_rows(path, options.count)
    exact = [logits for logits, _ in distributions(path, FORMATS[0], texts)]
    rows = []
    for form in FORMATS:
        row = dict(zip(("dtype", "quantization", "kv_cache_dtype"), form, strict=True))
        found = distributions(path, form, texts)
        figures = divergence(exact, [logits for logits, _ in found])
        rows.append({**row, **figures, "tasks": tasks(form, options.task_count)})
        print(json.dumps(rows[-1]), flush=True)
    write("quantization", {"weights": weight_errors(path), "formats": rows}, before)


def weight_errors(path: Path) -> dict[str, dict[str, float]]:
    """By format and kind of matrix: |W - packed W| / |W|."""
    formats = {form for name in NATIVE_NAMES for form in scheme(name, "bfloat16")[:2]}
    pool = Pool(library.load(), 1)
    sums: dict[str, dict[str, NDArray[np.float64]]] = {}
    for tensor in map_tensors(next(path.glob("*.safetensors"))):
        if len(tensor.shape) != 2:
            continue
        assert tensor.dtype == "BF16", "brook's own"
        exact = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        exact = exact.reshape(tensor.shape)
        kind = tensor.name.split(".")[-2]
        for form in formats:
            weight = PackedWeight(pool, form, *tensor.shape, Arena())
            weight.pack(tensor.data, "bfloat16", tensor.shape[0], Placement())
            packed = unpack(form, weight.data, weight.scales, *tensor.shape)
            pair = np.square([packed - exact, exact], dtype=np.float64).sum(axis=(1, 2))
            by_kind = sums.setdefault(_label(form), {})
            by_kind[kind] = by_kind.get(kind, np.zeros(2)) + pair
    return {
        name: {kind: round(float(np.sqrt(a / b)), 5) for kind, (a, b) in by_kind.items()}
        for name, by_kind in sorted(sums.items())
    }


def _label(form: Format) -> str:
    return f"{form.dtype}, groups of {form.group_size}" if form.group_size else form.dtype


def token_rows(path: Path, count: int) -> list[tuple[list[int], int]]:
    """Held-out conversations with their answers, and where the answers begin."""
    chat = Chat(path)
    rows = []
    for name in TASKS:
        for example in held_out(name, count, 0):
            prompt = chat.ids(wire(example), list(example.tools))
            answer = chat.tokenizer.encode(example.answer_text + END).ids
            rows.append((prompt + answer[:-1], len(prompt) - 1))
    return rows


def distributions(
    path: Path, form: tuple[str, str, str], rows: Sequence[tuple[list[int], int]]
) -> list[tuple[F32, list[int]]]:
    """The logits of every answer's positions, [length, V]."""
    dtype, quantization, kv_cache_dtype = form
    model = load_model(
        path,
        backend="native",
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        num_slots=MAX_LEN,
        max_num_tokens=MAX_LEN,
        max_num_logit_rows=MAX_LEN,
        weight_cache="off",
    )
    return [(_logits(model, token_ids, first), token_ids) for token_ids, first in rows]


def _logits(model: Model, token_ids: list[int], first: int) -> F32:
    num_tokens = len(token_ids)
    places = np.arange(num_tokens)
    batch = ForwardBatch(
        input_ids=np.array(token_ids, np.int64),
        positions=places,
        query_start=np.array([0, num_tokens], np.int32),
        context_len=np.array([num_tokens], np.int32),
        slot_mapping=places,
        block_table=np.zeros((1, 1), np.int32),
        block_size=MAX_LEN,
        logit_rows=places[-1:],
        lengths=[num_tokens],
        context_lens=[num_tokens],
    )
    model.forward(batch)
    return model.logits(places[first:]).copy()


def divergence(exact: list[F32], found: list[F32]) -> dict[str, float]:
    """Of all positions of all answers."""
    divergences, agreements, peaks = [], [], []
    for right, ours in zip(exact, found, strict=True):
        p, q = _log_softmax(right), _log_softmax(ours)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        agreements.append(right.argmax(axis=1) == ours.argmax(axis=1))
        peaks.append(np.abs(right - ours).max())
    values = np.concatenate(divergences)
    return {
        "kl_nats_mean": float(values.mean()),
        "kl_nats_p99": float(np.quantile(values, 0.99)),
        "same_top_token": float(np.concatenate(agreements).mean()),
        "largest_logit_error": float(max(peaks)),
        "num_positions": len(values),
    }


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def tasks(form: tuple[str, str, str], count: int) -> dict[str, Any]:
    """The share of solved tasks, with its 95 % interval, and by group."""
    dtype, quantization, kv_cache_dtype = form
    llm = LLM(
        MODEL,
        backend="native",
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        weight_cache="off",
    )
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def answer(examples: Sequence[Example]) -> list[str]:
        texts = [""] * len(examples)
        by_tools: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_tools.setdefault(json.dumps(list(example.tools)), []).append(index)
        for tools, indices in by_tools.items():
            chats = [wire(examples[index]) for index in indices]
            outputs = llm.chat(chats, params, tools=json.loads(tools) or None, progress=False)
            for index, output in zip(indices, outputs, strict=True):
                texts[index] = output.outputs[0].text
        return texts

    result = score(answer, count, 0, 0)
    right, num = (sum(pair[i] for pair in result.values()) for i in (0, 1))
    low, high = wilson(right, num)
    groups = {name: round(a / b, 4) for name, (a, b) in by_group(result).items()}
    return {"score": round(right / num, 4), "low": low, "high": high, "n": num, "groups": groups}


if __name__ == "__main__":
    main()
