"""transformers' `generate` in static batches, its scaled dot product attention.

A batch is padded on the left to its longest prompt and goes on until its longest answer is done, as
one has to without continuous batching.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.workers.worker import Engine, Job, Work, main

BATCH = 64  # of a trace, in its order
MAX_REQUESTS = 64  # all of them would take minutes


class Transformers(Engine):
    packages = ("transformers", "torch")
    max_requests = MAX_REQUESTS

    def load(self, job: Job) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self._device = torch.device("cpu" if job.toy else "cuda")
        self._most = job.max_num_seqs
        config = AutoConfig.from_pretrained(job.directory)
        make: Any = AutoModelForCausalLM.from_config
        with self._device:
            self._model = make(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._model.generation_config.pad_token_id = 0

    def generate(self, work: Work) -> None:
        lengths = {len(prompt) for prompt, _ in work}
        size = self._most if len(lengths) == 1 else BATCH
        for start in range(0, len(work), size):
            self._batch(work[start : start + size])

    def _batch(self, work: Work) -> None:
        import torch

        width = max(len(prompt) for prompt, _ in work)
        num_output = max(num_output for _, num_output in work)
        padded = [[0] * (width - len(prompt)) + prompt for prompt, _ in work]
        known = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in work]
        with torch.inference_mode():
            done = self._model.generate(
                torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(known, device=self._device),
                do_sample=False,
                min_new_tokens=num_output,
                max_new_tokens=num_output,
            )
        if done.shape[1] != width + num_output:
            raise RuntimeError(f"{done.shape[1] - width} tokens came, not {num_output}")
        done[0, -1].item()  # waits


if __name__ == "__main__":
    sys.exit(main(Transformers()))
