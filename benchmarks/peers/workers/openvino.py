"""OpenVINO GenAI's continuous batching pipeline, on token ids.

The weights are compressed by NNCF when the model is exported: 8 bits by channel, or 4 bits by
groups with the embedding in 8 bits. The KV cache has the type that OpenVINO chooses, 8 bits.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from benchmarks.peers.protocol import Engine, Options, serve


class OpenVINO(Engine):
    packages = ("openvino", "openvino-genai", "optimum-intel", "nncf", "torch")

    def prepare(self, options: Options) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        settings: dict[str, Any] = {"bits": 8}
        if options.precision == "int4":
            settings = {"bits": 4, "group_size": options.group, "ratio": 1.0, "sym": True}
        model = OVModelForCausalLM.from_pretrained(
            options.checkpoint,
            export=True,
            compile=False,
            quantization_config=OVWeightQuantizationConfig(**settings),
        )
        model.save_pretrained(options.directory)

    def load(self, options: Options) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = -(-options.kv_bytes // 2**30)
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = options.max_batched_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": options.num_threads,
            "CACHE_DIR": f"{options.directory}/cache",
            **options.extra,
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            options.directory, scheduler, "CPU", properties
        )
        self._ids = count()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles: list[Any] = []
        times: list[list[float]] = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(next(self._ids), ids, config))
            times.append([])
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, seen in zip(handles, times, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        seen += [now] * len(output.generated_ids)
        return times


if __name__ == "__main__":
    serve(OpenVINO())
