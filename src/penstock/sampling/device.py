"""Logits to token ids on the device: what `sampling.host` means, without a round trip to the host.

Owns the sampling settings of every row as tensors on the device. Knows rows, neither requests nor
the model. The host says which rows there are and what they ask for, the device alone knows the
newest tokens; nothing here waits for it.
Invariant: a row's token and log-probabilities never depend on the other rows, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.draws import draw, relative_weights, truncate
from penstock.kernels.sample import sample
from penstock.kernels.transfer import upload
from penstock.sampling.rows import SamplingRows
from penstock.sampling.shaping import Constraints, constrain, keep_typical, token_logprobs
from penstock.types import TokenLogprobs

# Logits that are sorted at once, one row at least, or twice as many that are only shaped, which
# takes half as much for each: this bounds the memory for what few rows ask for.
PIECE = 2**20


class DeviceLogprobs(NamedTuple):
    """Log-probabilities on the device: copy `values` to the host, then `read_logprobs`."""

    rows: list[int]  # [A], of the rows that asked
    ks: list[int]  # [A], how many of the most likely tokens each asked for
    values: Tensor  # [A, 3 + 2 K] float64, K = max(ks)


class Sampled(NamedTuple):
    """The sampled tokens, and what rows with `params.logprobs` asked for: all on the device."""

    token_ids: Tensor  # [L] int32
    logprobs: DeviceLogprobs | None


class _Shaped(NamedTuple):
    """Rows of a step that ask for more than `kernels.sample` alone gives them."""

    host_rows: NDArray[np.integer]  # [S]
    places: Tensor  # [S] int64, their places in the step
    constraints: Constraints | None
    is_typical: bool  # all of them, or none


class _Step(NamedTuple):
    """What the host says of a step; the same for all steps with the same requests."""

    has_plain: bool
    num_searches: int | None  # see `kernels.sample`
    shaped: list[_Shaped]
    asked: list[int]  # places of the rows that ask for log-probabilities
    ks: list[int]
    asked_index: list[Tensor]  # int64, in pieces


class DeviceSampler:
    """Samples for rows of a `SamplingRows`, whose settings it mirrors on the device."""

    def __init__(
        self, num_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        """All rows are greedy until they are admitted.

        Args:
            num_rows: those of the device's tables, dummy rows included.
            eos_token_ids: end-of-sequence tokens, for `min_tokens`.
        """
        self._device = device
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._settings = torch.zeros((5, num_rows), dtype=torch.int32, device=device)
        self._temperature, self._top_p, self._min_p, self._typical_p = self._settings[:4].view(
            torch.float32
        )
        self._top_k = self._settings[4]
        self._seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._last: tuple[bytes, _Step] | None = None

    def admit(self, rows: Sequence[int], state: SamplingRows) -> None:
        """Copy the settings of rows that `state` has just admitted; before the next `sample`.

        One copy for all of them that waits for nothing. Released rows need no call.
        """
        if not rows:
            return
        self._last = None
        index = np.array(rows, np.int64)
        temperature = np.where(state.greedy, 0, state.temperature)  # which is rounded
        floats = temperature, state.top_p, state.min_p, state.typical_p
        settings = np.stack([*(one[index].view(np.int32) for one in floats), state.top_k[index]])
        where, packed, seeds = upload(
            [index, settings.ravel(), state.seed[index].view(np.int64)], self._device
        )
        self._settings.index_copy_(1, where, packed.view(settings.shape))
        self._seeds.index_copy_(0, where, seeds)

    def warm_up(self, logits: Tensor) -> None:
        """Compile all that rows may ask for, so that none waits.

        Args:
            logits: [L, V] as an eager step gives them. What a graph gives, and what is shaped, has
                its rows side by side; kernels differ if that makes rows begin elsewhere.
        """
        place = torch.zeros(1, dtype=torch.int32, device=self._device)
        alone = logits.index_select(0, place)
        for like in (logits[:1], alone, alone.float()):
            self._choose(like, place, place, 2, torch.empty_like(place))

    def sample(
        self,
        logits: Tensor,
        rows: Tensor,
        num_tokens: Tensor,
        host_rows: NDArray[np.integer],
        state: SamplingRows,
        token_table: Tensor,
    ) -> Sampled:
        """The next token of each of `rows`, with the meaning and order of `sampling.host.sample`.

        Args:
            logits: [L, V] float32, bfloat16 or float16, row stride free; not changed.
            rows: [L] int32 on the device, without repeats.
            num_tokens: [L] int32 on the device: how many tokens each row holds, those in flight
                included; which of the seed's random numbers is drawn. It is
                `state.num_tokens[rows]` before the token that is sampled here is counted.
            host_rows: [L], the same as `rows`.
            state: read for what the rows ask for, and for `num_tokens` as a bound.
            token_table: [N, max_model_len] int32 on the device, by row: the first `num_tokens` of
                each row are there when this is computed. Read for penalties only.
        """
        step = self._step(host_rows, state)
        token_ids = torch.empty(len(rows), dtype=torch.int32, device=logits.device)
        if step.has_plain:
            self._choose(logits, rows, num_tokens, step.num_searches, token_ids)
        for shaped in step.shaped:
            inputs = logits, rows, num_tokens
            found = self._choose_shaped(shaped, step, inputs, state, token_table)
            token_ids.index_copy_(0, shaped.places, found)
        if not step.asked:
            return Sampled(token_ids, None)
        k = max(step.ks)
        values = [
            token_logprobs(logits.index_select(0, i).float(), token_ids.index_select(0, i), k)
            for i in step.asked_index
        ]
        asked_rows = host_rows[step.asked].tolist()
        return Sampled(token_ids, DeviceLogprobs(asked_rows, step.ks, torch.cat(values)))

    def _step(self, rows: NDArray[np.integer], state: SamplingRows) -> _Step:
        """What the rows ask for: found in the step before, if these are the same requests."""
        key = rows.tobytes()
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # before the next is made, because its masks are large
        is_drawn = ~state.greedy[rows]
        top_k, top_p = state.top_k[rows], state.top_p[rows]
        searches = is_drawn * (((top_k > 0) & (top_k < self._vocab_size)).astype(int) + (top_p < 1))
        is_typical = is_drawn & (state.typical_p[rows] != 1)
        special = np.flatnonzero(state.constrained[rows] | is_typical)
        asked = np.flatnonzero(state.num_logprobs[rows] >= 0)
        step = _Step(
            len(special) < len(rows),
            int(searches.max()) if is_drawn.any() else None,
            [
                self._shaped(places, rows[places], state)
                for group, size in ((~is_typical, 2 * PIECE), (is_typical, PIECE))
                for places in self._pieces(special[group[special]], size)
            ],
            asked.tolist(),
            state.num_logprobs[rows[asked]].tolist(),
            upload(self._pieces(asked, PIECE), self._device),
        )
        self._last = key, step
        return step

    def _pieces(self, places: NDArray[np.intp], size: int) -> list[NDArray[np.intp]]:
        """Of rows with `size` logits at most, or of one."""
        num_rows = max(1, size // self._vocab_size)
        return [places[start : start + num_rows] for start in range(0, len(places), num_rows)]

    def _shaped(
        self, places: NDArray[np.intp], rows: NDArray[np.integer], state: SamplingRows
    ) -> _Shaped:
        constraints = None
        if state.constrained[rows].any():
            constraints = Constraints.of(
                rows, state, self._eos_token_ids, self._vocab_size, self._device
            )
        is_typical = bool(state.typical_p[rows[0]] != 1 and not state.greedy[rows[0]])
        return _Shaped(rows, upload([places], self._device)[0], constraints, is_typical)

    def _choose(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        num_searches: int | None,
        out: Tensor,
    ) -> None:
        """What temperature, min-p, top-k and top-p give."""
        sample(
            logits,
            rows,
            positions,
            self._temperature,
            self._top_k,
            self._top_p,
            self._min_p,
            self._seeds,
            out,
            num_searches=num_searches,
        )

    def _choose_shaped(
        self,
        shaped: _Shaped,
        step: _Step,
        inputs: tuple[Tensor, Tensor, Tensor],
        state: SamplingRows,
        token_table: Tensor,
    ) -> Tensor:
        """The tokens of some rows, whose logits are copied; `inputs` are those of `sample`."""
        logits, rows, num_tokens = (x.index_select(0, shaped.places) for x in inputs)
        logits = logits.float()
        if shaped.constraints is not None:
            width = int(state.num_tokens[shaped.host_rows].max())
            tokens = token_table[:, :width].index_select(0, rows)
            constrain(logits, shaped.constraints, tokens, num_tokens)
        token_ids = torch.empty(len(rows), dtype=torch.int32, device=logits.device)
        self._choose(logits, rows, num_tokens, step.num_searches, token_ids)
        if not shaped.is_typical:
            return token_ids
        # Without a finite peak there is no distribution; the kernel took the largest.
        has_peak = logits.amax(1).isfinite()
        return torch.where(has_peak, self._choose_typical(logits, rows, num_tokens), token_ids)

    def _choose_typical(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """What typical-p leaves of what min-p, top-k and top-p leave. [S, V], [S] -> [S] int32"""
        weights = relative_weights(logits, self._temperature[rows])
        truncate(weights, self._top_k[rows], self._top_p[rows], self._min_p[rows])
        keep_typical(weights, self._typical_p[rows])
        return draw(weights, self._seeds[rows], positions).int()


def prompt_logprobs(logits: Tensor, target_ids: Tensor, k: int) -> Tensor:
    """What the model gave each token that was to come: values for `read_logprobs`.

    Args:
        logits: [N, V].
        target_ids: [N] integers on the device, the token after each position.
        k: how many of the most likely tokens to report as well.

    Returns:
        [N, 3 + 2 k] float64 on the device.
    """
    size = max(1, PIECE // logits.shape[1])
    return torch.cat(
        [
            token_logprobs(
                logits[start : start + size].float(), target_ids[start : start + size], k
            )
            for start in range(0, len(logits), size)
        ]
    )


def read_logprobs(values: NDArray[np.float64], ks: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities that have reached the host.

    Args:
        values: [A, 3 + 2 K]: token id, log-probability, rank, then the K most likely token ids,
            then their log-probabilities.
        ks: [A], how many of the most likely each asked for, K at most.
    """
    most = (values.shape[1] - 3) // 2
    found = []
    for row, k in zip(values, ks, strict=True):
        token_id, logprob, rank = row[:3].tolist()
        top_ids = row[3 : 3 + k].astype(int).tolist()
        top = zip(top_ids, row[3 + most : 3 + most + k].tolist(), strict=True)
        found.append(TokenLogprobs(int(token_id), logprob, int(rank), tuple(top)))
    return found
