"""vLLM's offline LLM on token ids: random weights, no tokenizer, no cache of prefixes."""

from __future__ import annotations

import os
import sys

from benchmarks.gpu.workers.worker import Engine, Job, Work, main


class VLLM(Engine):
    packages = ("vllm", "torch", "triton")

    def load(self, job: Job) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self._llm = LLM(
            model=job.directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=job.max_model_len,
            max_num_seqs=job.max_num_seqs,
            max_num_batched_tokens=job.max_num_batched_tokens,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
        )

    def generate(self, work: Work) -> None:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False
            )
            for _, num_output in work
        ]
        given = [{"prompt_token_ids": prompt} for prompt, _ in work]
        outputs = self._llm.generate(given, params, use_tqdm=False)
        came = [len(output.outputs[0].token_ids) for output in outputs]
        if came != [num_output for _, num_output in work]:
            raise RuntimeError(f"{sum(came)} tokens came")


if __name__ == "__main__":
    sys.exit(main(VLLM()))
