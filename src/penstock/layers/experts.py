"""A mixture of experts in torch, expert by expert: the oracle of the other backends.

Owns the router and the experts' matrices. Invariant: what an expert gives to a token does not
depend on the other tokens of the step, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from penstock.layers.linear import gate
from penstock.layers.materials import Materials, weight
from penstock.layers.specs import ExpertsSpec
from penstock.layers.toolkit import ExpertNames, Weight


class Experts:
    """Gated MLPs of which each token takes the best `top_k`."""

    def __init__(
        self, in_size: int, spec: ExpertsSpec, names: ExpertNames, materials: Materials
    ) -> None:
        count, size = spec.num_experts, spec.size
        self._spec = spec
        self._names = names
        self._router = materials.empty(count, in_size)
        self._router_bias = materials.empty(count).zero_() if spec.has_router_bias else None
        # In fp32: it decides between scores that are close.
        self._correction = torch.zeros(count, device=materials.device)
        self._gate_up = materials.empty(count, 2 * size, in_size)
        self._down = materials.empty(count, in_size, size)
        self._gate_up_bias = materials.empty(count, 2 * size).zero_()
        self._down_bias = materials.empty(count, in_size).zero_()

    def weights(self) -> Iterator[Weight]:
        """Those of the router and of every expert."""
        names, spec, size = self._names, self._spec, self._spec.size
        yield weight(f"{names.router}.weight", self._router)
        if self._router_bias is not None:
            yield weight(f"{names.router}.bias", self._router_bias)
        if spec.has_correction:
            yield weight(names.correction, self._correction)
        for number in range(spec.num_experts):
            for name, matrix, bias in (
                (names.gate, self._gate_up[number, :size], self._gate_up_bias[number, :size]),
                (names.up, self._gate_up[number, size:], self._gate_up_bias[number, size:]),
                (names.down, self._down[number], self._down_bias[number]),
            ):
                yield weight(f"{name.format(number)}.weight", matrix)
                if spec.has_bias:
                    yield weight(f"{name.format(number)}.bias", bias)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(
        self, x: torch.Tensor, shared: torch.Tensor | None, shared_gate: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, size] of x [T, size]."""
        router_bias = None if self._router_bias is None else self._router_bias.float()
        logits = functional.linear(x.float(), self._router.float(), router_bias)
        correction = self._correction if self._spec.has_correction else None
        chosen, factors = route(logits, correction, self._spec)
        out = torch.zeros(x.shape, device=x.device)
        for number in torch.unique(chosen).tolist():
            tokens, places = torch.where(chosen == number)
            gate_up = functional.linear(
                x[tokens], self._gate_up[number], self._gate_up_bias[number]
            )
            middle = gate(gate_up, self._spec.activation)
            given = functional.linear(middle, self._down[number], self._down_bias[number])
            out.index_add_(0, tokens, given.float() * factors[tokens, places, None])
        if shared is not None:
            out += shared if shared_gate is None else shared * torch.sigmoid(shared_gate)
        return out.to(x.dtype)


def route(
    logits: torch.Tensor, correction: torch.Tensor | None, spec: ExpertsSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, and their factors: [T, top_k] both.

    Args:
        logits: [T, num_experts], fp32.
        correction: [num_experts], added to the scores only to choose.
    """
    if spec.scoring == "softmax_chosen":
        best, chosen = torch.topk(logits, spec.top_k, -1)
        return chosen, torch.softmax(best, -1) * spec.scale
    scores = torch.softmax(logits, -1) if spec.scoring == "softmax" else torch.sigmoid(logits)
    rank = scores if correction is None else scores + correction
    if spec.num_groups > 1:
        groups = rank.view(len(rank), spec.num_groups, -1)
        good = groups.topk(spec.group_top, -1).values.sum(-1)
        best_groups = good.topk(spec.top_groups, -1).indices
        is_open = torch.zeros_like(good, dtype=torch.bool).scatter_(1, best_groups, True)
        rank = groups.masked_fill(~is_open[..., None], -torch.inf).view(rank.shape)
    chosen = rank.topk(spec.top_k, -1).indices
    factors = scores.gather(1, chosen)
    if spec.is_normalised:
        factors = factors / (factors.sum(-1, keepdim=True) + 1e-20)
    return chosen, factors * spec.scale
