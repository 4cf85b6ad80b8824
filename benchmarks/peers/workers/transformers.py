"""transformers: its model and its cache in a plain greedy loop, a static batch at a time.

A cache of the last first prompt is kept, as its documentation shows for a shared prefix: prompts
that begin alike are not computed again.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from benchmarks.peers.protocol import Engine, Options, num_equal, serve


class Transformers(Engine):
    packages = ("transformers", "torch")

    def load(self, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.num_threads)
        torch.set_grad_enabled(False)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa", **options.extra
        )
        self._held: list[int] = []  # tokens that `_cache` knows
        self._cache: Any = None

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        import torch

        cache, num_known = self._prefix(prompts)
        ids = torch.tensor(prompts)
        times: list[float] = []
        logits = self._model(
            ids[:, num_known:], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        for _ in range(num_tokens - 1):
            token_ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            times.append(time.perf_counter())
            logits = self._model(token_ids, past_key_values=cache, use_cache=True).logits
        logits[:, -1].argmax(dim=-1).tolist()
        times.append(time.perf_counter())
        if len(prompts) == 1:
            self._held, self._cache = prompts[0], cache
            _shorten(cache, len(prompts[0]))
        return [list(times) for _ in prompts]

    def _prefix(self, prompts: list[list[int]]) -> tuple[Any, int]:
        """A cache to go on with, and how many tokens of every prompt it knows."""
        from transformers import DynamicCache

        limit = min(len(prompt) for prompt in prompts) - 1  # one token gives the logits
        num_known = min(num_equal(self._held, prompt) for prompt in prompts)
        num_known = min(num_known, limit)
        if num_known == 0:
            self._held, self._cache = [], None
            return DynamicCache(config=self._model.config), 0
        cache = self._cache if len(prompts) == 1 else copy.deepcopy(self._cache)
        _shorten(cache, num_known)
        if len(prompts) > 1:
            cache.batch_repeat_interleave(len(prompts))
        return cache, num_known


def _shorten(cache: Any, num_tokens: int) -> None:
    """Forget all but the first tokens."""
    if surplus := cache.get_seq_length() - num_tokens:
        cache.crop(-surplus)


if __name__ == "__main__":
    serve(Transformers())
