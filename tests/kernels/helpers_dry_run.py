"""Launches every kernel that an engine launches on a GPU that is not there; prints what failed.

The launchers and Triton's own way from arguments to machine code are real: which numbers become
constants, which addresses count as aligned, whether it compiles for Hopper. Only the launch itself
is left out, and the numbers come from the references. A program of its own, because Triton's
interpreter, which the tests run with, replaces the compiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.kernels import chip, registry
from penstock.kernels.op import Op
from penstock.types import EngineRequest, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "eos_token_id": 5,
    "dtype": "bfloat16",
}
ENGINES: list[dict[str, Any]] = [
    {"block_size": 16},
    {"block_size": 1, "kv_cache_dtype": "int8", "quantization": "int8-a16"},
    {"block_size": 64, "kv_cache_dtype": "fp8", "quantization": "fp8"},
    {"block_size": 16, "quantization": "int4-a16", "dtype": "float16"},
    {"block_size": 3, "quantization": "fp8-block"},
]

launched: Counter[str] = Counter()
failures: list[str] = []
where = ""


class Hopper:
    """The driver of a GPU that is never asked to compute."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """What `kernel[grid](...)` does, but for the launch."""
    assert all(type(size) is int and size >= 0 for size in grid), f"grid {grid}"
    run(kernel, *args, grid=grid, warmup=True, **kwargs)
    launched[kernel.fn.__name__] += 1


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Launch, and let the reference compute."""
    try:
        op.launch(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - all are to be told
        failures.append(f"{where}: {op.name}: {type(error).__name__}: {str(error)[-800:]}")
    return op.reference(*args, **kwargs)


def play(settings: dict[str, Any], directory: Path) -> None:
    """Prompts, long and short, that decode together, with every way to choose a token."""
    core = EngineCore.from_config(
        EngineConfig(
            model=str(directory),
            backend="triton",
            load_format="dummy",
            num_blocks=400 if settings["block_size"] > 3 else 1500,
            max_model_len=1024,
            max_num_seqs=12,
            **settings,
        )
    )
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 5, "top_p": 0.9},
        {"min_p": 0.1, "logprobs": 2, "prompt_logprobs": 1},
        {"repetition_penalty": 1.2, "typical_p": 0.9},
    ]
    for index, length in enumerate((1, 17, 300, 5)):
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=index, **ways[index])
        prompt = [(index + 7 * position) % 1000 for position in range(length)]
        core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
        core.step()  # so that some decode while others begin
    while core.has_work:
        core.step()


driver.set_active(Hopper())
run, JITFunction.run = JITFunction.run, compile_only
chip.SMALL = chip.HOPPER  # what kernels are cut for where there is no GPU
with torch.inference_mode():
    for op in registry.load():
        for label, args, kwargs, _ in op.samples(torch.device("cpu")):
            where = label
            compute(op, *args, **kwargs)
Op.__call__ = compute  # type: ignore[method-assign, assignment]
with tempfile.TemporaryDirectory() as name:
    (Path(name) / "config.json").write_text(json.dumps(CONFIG))
    for engine in ENGINES:
        where = str(engine)
        play(engine, Path(name))
print(json.dumps({"launched": launched, "failures": failures}))
sys.exit(bool(failures))
