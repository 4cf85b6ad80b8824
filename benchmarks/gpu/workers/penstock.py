"""penstock's own engine, in process, on token ids."""

from __future__ import annotations

import sys

from benchmarks.gpu.workers.worker import Engine, Job, Work, main


class Penstock(Engine):
    packages = ("torch", "triton", "numpy")

    def load(self, job: Job) -> None:
        from penstock.engine.config import EngineConfig
        from penstock.engine.core import EngineCore

        self._core = EngineCore.from_config(
            EngineConfig(
                model=job.directory,
                backend="triton",
                dtype="bfloat16",
                load_format="dummy",
                enable_prefix_caching=False,
                max_num_seqs=job.max_num_seqs,
                max_num_batched_tokens=job.max_num_batched_tokens,
                max_model_len=job.max_model_len,
                num_blocks=64 if job.toy else None,
            )
        )

    def generate(self, work: Work) -> None:
        from benchmarks.gpu.engines import timed

        timed(self._core, work)


if __name__ == "__main__":
    sys.exit(main(Penstock()))
