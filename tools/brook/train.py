"""Trains brook or its draft on the CPU, one single-threaded process a core.

Two processes that each own a core and average their gradients once a step lose much less to other
work on the machine than two threads that meet at every operation.

Optimisers: Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks";
Liu et al. 2025, arXiv:2502.16982, for the scale of its update) for the matrices of the layers,
AdamW for embeddings and norms. Schedule: warm-up, constant, linear decay (WSD, Hu et al. 2024,
arXiv:2404.06395), so that the clock may say when to decay.

Run: python -m brook.train CONFIG.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from .data import LENGTHS, Mixture, batches
from .model import Llama, ModelConfig


@dataclass
class TrainConfig:
    """Everything a run needs. Times are seconds of wall clock, counted over resumed runs."""

    out: str
    tokenizer: str
    model: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, float] = field(
        default_factory=lambda: {str(k): v for k, v in LENGTHS.items()}
    )
    mixture: dict[str, float] = field(default_factory=dict)  # weights other than the table's
    teacher: str = ""
    tokens: int = 4096
    workers: int = 2
    seed: int = 0
    warmup: int = 150
    train_s: float = 5400.0
    decay_share: float = 0.25
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.02
    save_s: float = 180.0
    log_steps: int = 25


def orthogonal(grad: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    done: Tensor = x.T if tall else x
    return done.float()


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of one long vector, in the shapes of `like`."""
    out, start = [], 0
    for tensor in like:
        out.append(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
    return out


class Optimiser:
    """Muon and AdamW over fp32 master weights of a bf16 model.

    Each worker orthogonalises its share of the matrices; the updates are summed over the workers.
    """

    def __init__(self, model: Llama, config: TrainConfig) -> None:
        self.config = config
        self.params = list(model.parameters())
        self.matrix = [n.startswith("layers") and p.ndim == 2 for n, p in model.named_parameters()]
        self.master = [p.detach().float().clone() for p in self.params]
        self.first = [torch.zeros_like(p) for p in self.master]
        self.second = [
            torch.zeros(0) if m else torch.zeros_like(p)
            for m, p in zip(self.matrix, self.master, strict=True)
        ]
        self.step_count = 0

    def state(self) -> dict[str, Any]:
        return {
            "master": self.master,
            "first": self.first,
            "second": self.second,
            "step": self.step_count,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.master, self.first, self.second = state["master"], state["first"], state["second"]
        self.step_count = state["step"]
        self.publish()

    def publish(self) -> None:
        """Copy the master weights into the model."""
        for param, master in zip(self.params, self.master, strict=True):
            param.data.copy_(master)

    def muon_updates(self, grads: list[Tensor], rank: int, size: int) -> list[Tensor]:
        """The updates of all matrices, each worked out by one worker."""
        mine = [i for i, matrix in enumerate(self.matrix) if matrix]
        out = [torch.zeros_like(grads[i]) for i in mine]
        for slot, i in enumerate(mine):
            self.first[i].mul_(0.95).add_(grads[i])
            if slot % size == rank:
                update = orthogonal(grads[i] + 0.95 * self.first[i])
                out[slot] = update * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        if size > 1:
            flat = torch.cat([u.flatten() for u in out])
            dist.all_reduce(flat)
            out = unflatten(flat, out)
        return out

    def step(self, grads: list[Tensor], scale: float, rank: int, size: int) -> None:
        """One update with learning rates times `scale`."""
        self.step_count += 1
        updates = iter(self.muon_updates(grads, rank, size))
        for i, weight in enumerate(self.master):
            if self.matrix[i]:
                rate = self.config.muon_lr * scale
                weight.mul_(1 - rate * self.config.weight_decay).sub_(next(updates), alpha=rate)
                continue
            self.first[i].lerp_(grads[i], 0.1)
            self.second[i].lerp_(grads[i].square(), 0.05)
            mean = self.first[i] / (1 - 0.9**self.step_count)
            spread = (self.second[i] / (1 - 0.95**self.step_count)).sqrt() + 1e-8
            weight.sub_(mean / spread, alpha=self.config.adam_lr * scale)
        self.publish()


class Trainer:
    """One worker's view of a run."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.out = Path(config.out)
        torch.manual_seed(config.seed)
        self.model = Llama(ModelConfig(**config.model)).bfloat16()
        self.optimiser = Optimiser(self.model, config)
        self.elapsed, self.seen, self.losses = 0.0, 0, [0.0, 0.0]
        self.resume()
        self.body = torch.compile(self.model.hidden, dynamic=False)
        self.teacher = self.load_teacher()
        lengths = {int(length): share for length, share in config.lengths.items()}
        tokenizer = Tokenizer.from_file(config.tokenizer)
        seed = f"{config.seed} {rank} {self.optimiser.step_count}"
        self.batches = batches(tokenizer, seed, config.tokens, lengths, Mixture(config.mixture))

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        path = self.out / "last.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.optimiser.load(saved["optimiser"])
            self.elapsed, self.seen = saved["elapsed"], saved["seen"]

    def load_teacher(self) -> tuple[Llama, Callable[[Tensor], Tensor]] | None:
        """The model whose distribution the draft learns, and its compiled body."""
        if not self.config.teacher:
            return None
        saved = torch.load(self.config.teacher, weights_only=True)
        teacher = Llama(ModelConfig(**saved["model"])).bfloat16()
        teacher.load_state_dict(saved["weights"])
        teacher.requires_grad_(False)
        return teacher, torch.compile(teacher.hidden, dynamic=False)

    def save(self) -> None:
        """Weights, optimiser and counters, replaced in one step."""
        state = {
            "optimiser": self.optimiser.state(),
            "elapsed": self.elapsed,
            "seen": self.seen,
            "model": self.config.model,
            "weights": self.model.state_dict(),
        }
        torch.save(state, self.out / "last.partial")
        os.replace(self.out / "last.partial", self.out / "last.pt")

    def rate(self) -> float:
        """Warm-up by steps; then constant; then linear decay by the clock."""
        warm = min(1.0, (self.optimiser.step_count + 1) / self.config.warmup)
        left = 1.0 - self.elapsed / self.config.train_s
        return warm * max(0.0, min(1.0, left / self.config.decay_share))

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean cross entropy of the learnt tokens, against the text or the teacher."""
        inputs, flat = ids[:, :-1].contiguous(), weights[:, 1:].flatten()
        keep = flat.nonzero().squeeze(1)
        share = flat[keep] / flat.sum()
        hidden = self.body(inputs).flatten(0, 1)[keep]
        logits = self.model.logits(hidden).float()
        hard = share @ F.cross_entropy(logits, ids[:, 1:].flatten()[keep], reduction="none")
        if self.teacher is None:
            return hard
        teacher, body = self.teacher
        with torch.no_grad():
            aim = teacher.logits(body(inputs).flatten(0, 1)[keep]).float()
        return 0.1 * hard - 0.9 * share @ (aim.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    def step(self) -> float:
        """One step on one batch a worker; returns the mean loss."""
        ids, weights = next(self.batches)
        loss = self.loss(torch.from_numpy(ids), torch.from_numpy(weights))
        torch.autograd.backward(loss)
        flat = torch.cat(
            [p.grad.flatten().float() for p in self.optimiser.params if p.grad is not None]
        )
        flat = torch.cat((flat, loss.detach().view(1)))
        if self.config.workers > 1:
            dist.all_reduce(flat)
        flat /= self.config.workers
        flat[:-1] *= min(1.0, 1.0 / (float(flat[:-1].norm()) + 1e-6))
        grads = unflatten(flat[:-1], self.optimiser.params)
        self.optimiser.step(grads, self.rate(), self.rank, self.config.workers)
        self.model.zero_grad(set_to_none=True)
        self.seen += ids.shape[0] * (ids.shape[1] - 1) * self.config.workers
        return float(flat[-1])

    def run(self) -> None:
        """Train until the clock says stop."""
        saved = last = self.clock()
        total, count = 0.0, 0
        while self.elapsed < self.config.train_s:
            total, count = total + self.step(), count + 1
            now = self.clock()
            self.elapsed, last = self.elapsed + now - last, now
            if self.rank == 0 and self.optimiser.step_count % self.config.log_steps == 0:
                self.log(total / count)
                total, count = 0.0, 0
            if self.rank == 0 and now - saved > self.config.save_s:
                self.save()
                saved = now
        if self.rank == 0:
            self.save()

    def clock(self) -> float:
        """The time on worker 0, so that all workers decay and stop at the same step."""
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
        if self.config.workers > 1:
            dist.broadcast(now, 0)
        return float(now)

    def log(self, loss: float) -> None:
        """One JSON line."""
        line = {
            "step": self.optimiser.step_count,
            "tokens": self.seen,
            "loss": round(loss, 4),
            "rate": round(self.rate(), 4),
            "elapsed_s": round(self.elapsed, 1),
        }
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def work(rank: int, config: TrainConfig) -> None:
    """One worker process."""
    torch.set_num_threads(1)
    if config.workers > 1:
        rendezvous = f"file://{Path(config.out).resolve()}/rendezvous"
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=config.workers
        )
    Trainer(config, rank).run()


def main() -> None:
    """Read the configuration and start the workers."""
    config = TrainConfig(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    spawn(work, (config,), nprocs=config.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
