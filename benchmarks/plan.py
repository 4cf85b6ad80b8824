"""Whether `penstock plan` is right: what it expects of a model, against what the engine then does.

Models of published shapes with random weights, in several precisions; in every round the rates are
measured anew, then decoding with 1 and with 8 requests and a prompt of 512 tokens, so that all of
them meet the same machine. A figure is measured seconds divided by expected ones.

Run: python -m benchmarks.plan [--rounds 3] [--models qwen3-0.6b,...] [--precisions none,int8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, summary, write
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.models import estimate, speeds
from penstock.models.estimate import Rates
from penstock.models.spec import ModelSpec
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import scheme
from penstock.types import EngineRequest, SamplingParams

DTYPE = "bfloat16"
DECODED = 64  # tokens of an answer
PROMPT = 512
CONTEXT = 128  # tokens before an answer begins
BATCHES = (1, 8)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _config(architecture: str, sizes: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        **dict(zip(_SIZES, sizes, strict=True)),
        "max_position_embeddings": 4096,
        "torch_dtype": DTYPE,
        **rest,
    }


MODELS = {
    "smollm2-135m": _config(
        "LlamaForCausalLM", (49152, 576, 1536, 30, 9, 3), tie_word_embeddings=True
    ),
    "qwen3-0.6b": _config(
        "Qwen3ForCausalLM", (151936, 1024, 3072, 28, 16, 8), head_dim=128, tie_word_embeddings=True
    ),
    "llama-3.2-1b": _config(
        "LlamaForCausalLM", (128256, 2048, 8192, 16, 32, 8), head_dim=64, tie_word_embeddings=True
    ),
    "olmoe-4-layers": _config(
        "OlmoeForCausalLM",
        (50304, 2048, 1024, 4, 16, 16),
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default="none,int8,int4")
    options = parser.parse_args()
    before = environment()
    rows = []
    for name in options.models.split(","):
        for quantization in options.precisions.split(","):
            rows.append({"model": name, "quantization": quantization})
            rows[-1] |= compare(MODELS[name], quantization, options.rounds)
            print(json.dumps(rows[-1]), flush=True)
    cases = [case for row in rows for case in row["cases"].values()]
    ratios = [case["measured_by_expected"]["median"] for case in cases]
    write("plan", {"rows": rows, "ratios": summary(ratios)}, before)


def compare(config: dict[str, Any], quantization: str, num_rounds: int) -> dict[str, Any]:
    """Expected and measured milliseconds, by case, of every round."""
    spec = ModelSpec.from_hf(config)
    formats = Formats(scheme(quantization, DTYPE))
    samples: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config))
        core = _engine(directory, quantization)
        for _ in range(num_rounds):
            rates = speeds.measured(
                spec, formats, dtype=DTYPE, kv_dtype=DTYPE, num_requests=max(BATCHES)
            )
            for case, expected_s in _expected(spec, formats, rates).items():
                samples.setdefault(case, []).append((expected_s, _measured(core, case, spec)))
    return {"cases": {case: _told(pairs) for case, pairs in samples.items()}}


def _engine(directory: str, quantization: str) -> EngineCore:
    config = EngineConfig(
        model=directory,
        backend="native",
        quantization=quantization,
        load_format="dummy",
        weight_cache="off",
        max_model_len=PROMPT + DECODED,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
    )
    return EngineCore.from_config(config)


def _expected(spec: ModelSpec, formats: Formats, rates: Rates) -> dict[str, float]:
    """Seconds of a step or of the prompt, by case."""
    middle = CONTEXT + DECODED // 2
    found = {}
    for count in BATCHES:
        step = estimate.decode(spec, formats, DTYPE, rates, num_requests=count, context_len=middle)
        found[f"decode {count}"] = step.seconds
    chunk = EngineConfig(model="").max_num_batched_tokens
    prompt = estimate.prefill(spec, formats, rates, num_tokens=PROMPT, chunk=chunk)
    return found | {f"prefill {PROMPT}": prompt.seconds}


def _measured(core: EngineCore, case: str, spec: ModelSpec) -> float:
    """Seconds: of prefill the step, of decoding the median of the steps."""
    kind, count = case.split()
    if kind == "prefill":
        return statistics.median(_steps(core, 1, int(count), 1, spec)[0] for _ in range(3))
    return statistics.median(_steps(core, int(count), CONTEXT, DECODED, spec)[2:])


def _steps(
    core: EngineCore, num_requests: int, num_tokens: int, num_answered: int, spec: ModelSpec
) -> list[float]:
    """Seconds of every step, until all requests are done."""
    params = SamplingParams(temperature=0.0, max_tokens=num_answered, ignore_eos=True)
    for index in range(num_requests):
        prompt = [(index * 31 + place * 7 + 1) % spec.vocab_size for place in range(num_tokens)]
        core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    taken = []
    while core.has_work:
        started_s = time.perf_counter()
        core.step()
        taken.append(time.perf_counter() - started_s)
    return taken


def _told(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "expected_ms": [round(expected * 1e3, 3) for expected, _ in pairs],
        "measured_ms": [round(found * 1e3, 3) for _, found in pairs],
        "measured_by_expected": summary([found / expected for expected, found in pairs]),
    }


if __name__ == "__main__":
    main()
