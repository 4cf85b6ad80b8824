"""16 clients of a running server against transformers' `generate` on the same weights.

The same requests for both: random prompts, answer lengths from 16 to 128 tokens, greedy, no end of
sequence. penstock: 16 clients, each asks for its next answer when the last is done. transformers:
the same order in static batches of 16, each as long as its longest answer, as one has to without
continuous batching; a request's time to first token counts from when a client would have asked.
Rounds alternate between the two; the ratio is taken within a round.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import httpx
import torch

from benchmarks.common import environment, summary, write
from benchmarks.serving import serving, stream
from penstock import builtin

NUM_CLIENTS = 16
NUM_REQUESTS = 96
PROMPT_LENS = (32, 256)
OUTPUT_LENS = (16, 128)
NUM_ROUNDS = 3
DTYPE = "float32"


class Work(NamedTuple):
    prompt: list[int]
    num_output: int


class Round(NamedTuple):
    duration_s: float
    num_tokens: int
    ttft_s: list[float]

    def figures(self) -> dict[str, Any]:
        return {
            "output_tokens_per_s": self.num_tokens / self.duration_s,
            "ttft_s": summary(self.ttft_s),
            "duration_s": self.duration_s,
        }


def make_work(seed: int, vocab_size: int) -> list[Work]:
    rng = random.Random(seed)
    return [
        Work(
            [rng.randrange(16, vocab_size) for _ in range(rng.randint(*PROMPT_LENS))],
            rng.randint(*OUTPUT_LENS),
        )
        for _ in range(NUM_REQUESTS)
    ]


async def ask_penstock(url: str, work: Sequence[Work]) -> Round:
    """All work through `NUM_CLIENTS` clients over HTTP."""
    ttft_s: list[float] = []
    num_tokens = 0
    queue = list(reversed(work))

    async def client_of(client: httpx.AsyncClient) -> None:
        nonlocal num_tokens
        while queue:
            prompt, num_output = queue.pop()
            body = {
                "model": "brook",
                "prompt": prompt,
                "max_tokens": num_output,
                "temperature": 0,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
            asked_s, first_s, usage = time.perf_counter(), 0.0, None
            async for arrived_s, chunk in stream(client, body):
                first_s = first_s or arrived_s
                usage = chunk.get("usage") or usage
            assert usage is not None
            assert usage["completion_tokens"] == num_output
            ttft_s.append(first_s - asked_s)
            num_tokens += usage["completion_tokens"]

    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        started_s = time.perf_counter()
        await asyncio.gather(*(client_of(client) for _ in range(NUM_CLIENTS)))
        return Round(time.perf_counter() - started_s, num_tokens, ttft_s)


def ask_transformers(model: Any, pad_id: int, work: Sequence[Work]) -> Round:
    """All work in static batches, padded on the left."""
    ttft_s: list[float] = []
    started_s = time.perf_counter()
    for start in range(0, len(work), NUM_CLIENTS):
        batch = work[start : start + NUM_CLIENTS]
        asked_s = time.perf_counter()  # its clients have only now their last answers
        width = max(len(item.prompt) for item in batch)
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1
        first_s = _generate(model, ids, mask, max(item.num_output for item in batch))
        ttft_s += [first_s - asked_s] * len(batch)
    num_tokens = sum(item.num_output for item in work)
    return Round(time.perf_counter() - started_s, num_tokens, ttft_s)


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, num_output: int) -> float:
    """Run one static batch; when its first token was there."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class FirstToken(StoppingCriteria):
        first_s = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.first_s = self.first_s or time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    noted = FirstToken()
    with torch.inference_mode():
        done = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=num_output,
            max_new_tokens=num_output,
            stopping_criteria=StoppingCriteriaList([noted]),
        )
    assert done.shape[1] == ids.shape[1] + num_output
    return noted.first_s


def main() -> None:
    from transformers import AutoModelForCausalLM

    before = environment()
    work = make_work(0, 2000)
    rounds: dict[str, list[Round]] = {"penstock": [], "transformers": []}
    with serving("brook", "--dtype", DTYPE) as server:
        torch.set_num_threads(2)
        model = AutoModelForCausalLM.from_pretrained(
            builtin.path("brook"), dtype=getattr(torch, DTYPE)
        )
        ask_transformers(model, 0, work[:NUM_CLIENTS])
        asyncio.run(ask_penstock(server.url, work[:NUM_CLIENTS]))
        for number in range(NUM_ROUNDS):
            work = make_work(number + 1, 2000)  # fresh, so that no prefix is cached
            rounds["penstock"].append(asyncio.run(ask_penstock(server.url, work)))
            rounds["transformers"].append(ask_transformers(model, 0, work))
    pairs = list(zip(rounds["penstock"], rounds["transformers"], strict=True))
    ours_over_theirs = [theirs.duration_s / ours.duration_s for ours, theirs in pairs]
    ttft = [median(ours.ttft_s) / median(theirs.ttft_s) for ours, theirs in pairs]
    figures = {
        "dtype": DTYPE,
        "rounds": {name: [each.figures() for each in some] for name, some in rounds.items()},
        "throughput_ratio": summary(ours_over_theirs),
        "median_ttft_ratio": summary(ttft),
    }
    write("concurrent", figures, before)


if __name__ == "__main__":
    main()
