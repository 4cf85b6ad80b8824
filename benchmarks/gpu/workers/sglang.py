"""SGLang's offline engine on token ids: random weights, no tokenizer, no cache of prefixes."""

from __future__ import annotations

import sys

from benchmarks.gpu.workers.worker import Engine, Job, Work, main


class SGLang(Engine):
    packages = ("sglang", "torch", "triton")

    def load(self, job: Job) -> None:
        import sglang

        self._engine = sglang.Engine(
            model_path=job.directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            context_length=job.max_model_len,
            max_running_requests=job.max_num_seqs,
            chunked_prefill_size=job.max_num_batched_tokens,
            mem_fraction_static=0.85,
            disable_radix_cache=True,
        )

    def generate(self, work: Work) -> None:
        params = [
            {"temperature": 0.0, "max_new_tokens": num_output, "ignore_eos": True}
            for _, num_output in work
        ]
        outputs = self._engine.generate(
            input_ids=[prompt for prompt, _ in work], sampling_params=params
        )
        came = [output["meta_info"]["completion_tokens"] for output in outputs]
        if came != [num_output for _, num_output in work]:
            raise RuntimeError(f"{sum(came)} tokens came")


if __name__ == "__main__":
    sys.exit(main(SGLang()))
