"""penstock's own engine, in process and without a server, on token ids."""

from __future__ import annotations

import threading
import time
from itertools import count
from typing import Any

from benchmarks.peers.protocol import Engine, Options, serve

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


class Penstock(Engine):
    packages = ("penstock", "torch", "numpy")

    def prepare(self, options: Options) -> None:
        # What is quantized is kept behind the first requests; later starts read it.
        self.load(options)
        for thread in threading.enumerate():
            if thread.name == "weight-cache":
                thread.join()

    def load(self, options: Options) -> None:
        from penstock.engine.config import EngineConfig
        from penstock.engine.core import EngineCore

        settings: dict[str, Any] = {
            "model": options.checkpoint,
            "max_model_len": options.max_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_batched_tokens,
            "kv_cache_memory_bytes": options.kv_bytes,
            "num_threads": options.num_threads,
            **PRECISIONS[options.precision],
            **options.extra,
        }
        if "quantization" in settings:  # else there is nothing to keep
            settings.setdefault("weight_cache", options.directory)
        self._core = EngineCore.from_config(EngineConfig(**settings))
        self._ids = count()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        from penstock.types import EngineRequest, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            request_id = str(next(self._ids))
            times[request_id] = []
            self._core.add(
                EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)
            )
        while self._core.has_work:
            events = self._core.step()
            now = time.perf_counter()
            for event in events:
                times[event.request_id] += [now] * len(event.token_ids)
        return list(times.values())


if __name__ == "__main__":
    serve(Penstock())
