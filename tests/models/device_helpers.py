"""Models on a device for tests: the GPU if there is one, else the CPU, and batches for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tests.models.helpers import NUM_BLOCKS, Sessions

from penstock.attention.paged import DeviceBatch
from penstock.kernels.gpu import device
from penstock.models import device_model
from penstock.models.device_model import DeviceModel
from penstock.parallel.group import Alone, Group

T = TypeVar("T")


def load_device(path: Path, dtype: str = "float32", **options: Any) -> DeviceModel:
    """The model of a directory, with pages for a `DeviceSessions`."""
    defaults: dict[str, Any] = {
        "quantization": "none",
        "kv_cache_dtype": dtype,
        "num_blocks": NUM_BLOCKS,
        "block_size": 16,
        "group": Alone(),
        "device": device(),
        "attention_backend": "triton",
        "load_format": "auto",
        "seed": 0,
        "phases": {},
    }
    return device_model.load(path, dtype=dtype, **defaults | options)


class DeviceSessions(Sessions):
    """`Sessions` over the pages of a device model."""

    def __init__(self, model: DeviceModel) -> None:
        super().__init__(model, block_size=model.kv.block_size)  # type: ignore[arg-type]
        self.device_model = model

    @torch.inference_mode()
    def step(self, work: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Compute the next tokens of each named row; logits of all of them, [length, V]."""
        model, batch = self.device_model, self.batch(work)

        def there(array: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.from_numpy(array).to(model.device, dtype)

        # Rows of the table are named in another order than they lie in it.
        num_rows = len(batch.lengths)
        rows = torch.arange(num_rows).flip(0)
        on_device = DeviceBatch(
            input_ids=there(batch.input_ids),
            positions=there(batch.positions),
            slots=there(batch.slot_mapping, torch.int64),
            rows=there(rows.numpy()),
            query_start=there(batch.query_start),
            context_len=there(batch.context_len),
            block_table=there(batch.block_table).flip(0),
            logit_rows=there(batch.logit_rows, torch.int64),
            lengths=batch.lengths,
            max_context_len=max(batch.context_lens),
            kv=model.kv,
            attention=model.attention,
            contexts=batch.context_lens,
        )
        logits = model.logits(model.forward(on_device)).float().cpu()
        return dict(zip(work, torch.split(logits, batch.lengths), strict=True))


class Threads:
    """The ranks of a group as threads of this process: each has its view, and all wait for all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[torch.Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def run(self, of_rank: Callable[[Group], T]) -> list[T]:
        """What the function gives for each rank."""
        found: dict[int, T] = {}
        threads = [
            threading.Thread(target=lambda one=one: found.update({one.rank: of_rank(one)}))
            for one in map(self.view, range(self.size))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == self.size, "a rank has failed"
        return [found[rank] for rank in range(self.size)]

    def view(self, rank: int) -> ThreadGroup:
        """The group as a rank has it."""
        return ThreadGroup(self, rank)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What all ranks give, by rank."""
        self.given[rank] = x.clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class ThreadGroup:
    """Implements `Group` for one rank of a `Threads`."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads = threads
        self.rank = rank
        self.size = threads.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        assert x.is_contiguous()
        return x.copy_(torch.stack(self._threads.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Joined along the last dimension."""
        return torch.cat(self._threads.exchange(self.rank, x), -1)
