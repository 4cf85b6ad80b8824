"""Executes plans on a device, so that the host need not wait before it launches the next one.

Owns the order of a step: what changed goes up in one copy; the model computes, eagerly or as a
graph; what is sampled goes into the device's own token table, where the next step reads it, and
comes down on the side. The state on the host counts along, tokens in flight included, and does not
know what they are. Knows rows, and neither requests nor scheduling.

Invariant: all is in the order of one stream, so that a row may change hands, or a step be given up,
while an earlier one is under way. `DeviceStep.read` alone waits for the device.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.attention.paged import DeviceBatch
from penstock.engine.memory import PROMPT_LOGPROB_ROWS
from penstock.engine.plan import Slice, StepPlan, StepResult
from penstock.engine.runner import Done, Step
from penstock.engine.state import DeviceState
from penstock.kernels import transfer
from penstock.layers.device_tables import DeviceTables
from penstock.models.device_model import DeviceModel
from penstock.models.graphs import DecodeGraphs
from penstock.sampling.device import DeviceSampler, prompt_logprobs, read_logprobs
from penstock.types import TokenLogprobs

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class _Logprobs(NamedTuple):
    """Log-probabilities on their way to the host."""

    rows: list[int]  # [A]
    ks: list[int]  # [A]
    values: torch.Tensor  # [A, ...], as `read_logprobs` reads them

    def download(self) -> _Logprobs:
        """The same, as it will be on the host."""
        return self._replace(values=transfer.download(self.values))

    def read(self) -> list[TokenLogprobs]:
        """What has reached the host."""
        return read_logprobs(self.values.numpy(), self.ks)


class DeviceStep(NamedTuple):
    """Implements `Step`: what is on its way to the host, and when it will be there."""

    rows: list[int]  # those that were sampled
    token_ids: torch.Tensor  # [L], on the host
    logprobs: _Logprobs | None
    prompt_logprobs: list[_Logprobs]
    done: transfer.Event

    def read(self) -> StepResult:
        """Wait for the device; what the step gave."""
        self.done.synchronize()
        token_ids = {
            row: [one] for row, one in zip(self.rows, self.token_ids.tolist(), strict=True)
        }
        result = StepResult(token_ids, {}, {})
        if self.logprobs is not None:
            for row, found in zip(self.logprobs.rows, self.logprobs.read(), strict=True):
                result.logprobs[row] = [found]
        for piece in self.prompt_logprobs:
            result.prompt_logprobs.setdefault(piece.rows[0], []).extend(piece.read())
        return result


class _Slices(NamedTuple):
    """The slices of a step as arrays, and of those that reach the end of their row their place."""

    rows: I32  # [R]
    starts: I32  # [R]
    lengths: I32  # [R]
    ends: I32  # [R] the context of the last token
    is_sampled: NDArray[np.bool_]  # [R]
    sampled_rows: I32  # [L]
    sampled_ends: I32  # [L]
    num_tokens: int

    @classmethod
    def of(cls, slices: list[Slice], state: DeviceState) -> _Slices:
        """At least one slice, of rows that have their blocks."""
        flat = np.fromiter(chain.from_iterable(slices), np.int32, 3 * len(slices))
        rows, starts, lengths = flat.reshape(-1, 3).T.copy()
        ends = starts + lengths
        is_sampled = ends == state.num_tokens[rows]
        num_tokens = int(lengths.sum())
        return cls(
            rows,
            starts,
            lengths,
            ends,
            is_sampled,
            rows[is_sampled],
            ends[is_sampled],
            num_tokens,
        )

    @property
    def is_decode(self) -> bool:
        """Whether each is one token, after which another one is sampled."""
        return self.num_tokens == len(self.rows) == len(self.sampled_rows)


class _Computed(NamedTuple):
    """What a step has computed, on the device: logits, and for which rows."""

    logits: torch.Tensor  # [L, V]
    rows: torch.Tensor  # [L] int32
    num_tokens: torch.Tensor  # [L] int32
    places: torch.Tensor  # [L] int64, of the sampled tokens in the tables
    prompt_logprobs: list[_Logprobs]  # on their way to the host


@final
class DeviceRunner:
    """Implements `Runner` for a model on a device, for one rank of its group."""

    def __init__(
        self,
        model: DeviceModel,
        state: DeviceState,
        eos_token_ids: tuple[int, ...],
        *,
        depth: int,
        enforce_eager: bool,
    ) -> None:
        """Make the tables on the device and capture the graphs.

        Args:
            model: made for this runner alone, as is `state`.
            depth: how many steps may be launched before the first of them is read.
            enforce_eager: no graphs.
        """
        self.model = model
        self.depth = depth
        self._state = state
        num_rows, max_model_len = state.token_ids.shape
        self.tables = tables = DeviceTables(
            num_rows, max_model_len, state.block_size, model.kv.dummy_block, model.device
        )
        vocab_size = model.spec.vocab_size
        self._sampler = DeviceSampler(num_rows + 1, vocab_size, eos_token_ids, model.device)
        hidden = torch.zeros(1, model.spec.hidden_size, dtype=model.dtype, device=model.device)
        self._sampler.warm_up(model.logits(hidden))
        self._graphs = None if enforce_eager else DecodeGraphs(model, tables)

    @property
    def description(self) -> str:
        """That of the model."""
        return self.model.description

    def check(self) -> None:
        """What happens to a device is told by the next step."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Step:
        """Begin the step, behind all that were launched before."""
        state = self._state
        state.apply(plan)
        if plan.admitted:
            self._sampler.admit([admission.row for admission in plan.admitted], state)
        changes = self._changes(plan)
        if not plan.slices:
            if changes:
                self._apply(self.tables.upload(changes, is_fixed=False))
            return Done(StepResult({}, {}, {}))
        slices = _Slices.of(plan.slices, state)
        computed = self._replay(slices, changes) or self._compute(slices, changes)
        rows = slices.sampled_rows
        if not len(rows):
            return self._step([], computed.rows, None, computed.prompt_logprobs)
        token_ids, logprobs = self._sampler.sample(
            computed.logits,
            computed.rows,
            computed.num_tokens,
            rows,
            state,
            self.tables.token_ids,
        )
        self.tables.write(computed.places, token_ids)
        state.num_tokens[rows] += 1
        asked = None if logprobs is None else _Logprobs(*logprobs)
        return self._step(rows.tolist(), token_ids, asked, computed.prompt_logprobs)

    def _step(
        self,
        rows: list[int],
        token_ids: torch.Tensor,
        logprobs: _Logprobs | None,
        prompt_logprobs: list[_Logprobs],
    ) -> DeviceStep:
        """Let the results come down; behind them all is done."""
        step = DeviceStep(
            rows,
            transfer.download(token_ids),
            logprobs and logprobs.download(),
            prompt_logprobs,
            transfer.event(self.model.device),
        )
        step.done.record()
        return step

    def _changes(self, plan: StepPlan) -> list[NDArray[Any]]:
        """What the state has taken over from the plan, for the tables, if there is anything.

        Returns:
            Nothing, or places [n] int64 and what is to be put there, [n] int32.
        """
        state, tables = self._state, self.tables
        places: list[I64] = []
        numbers: list[I64 | I32] = []
        for row, token_ids, *_ in plan.admitted:
            first, num_tokens = tables.place(row, 0), len(token_ids)
            places.append(np.arange(first, first + num_tokens))
            numbers.append(state.token_ids[row, :num_tokens])
        ends: dict[int, int] = {}
        for row, block_ids in reversed(plan.new_blocks):
            end = ends.get(row, int(state.num_blocks[row]))
            start = ends[row] = end - len(block_ids)
            first = tables.block_place(row, start)
            places.append(np.arange(first, first + len(block_ids)))
            numbers.append(state.block_table[row, start:end])
        if not places:
            return []
        return [np.concatenate(places), np.concatenate(numbers).astype(np.int32)]

    def _apply(self, changes: list[torch.Tensor]) -> None:
        """Put into the tables what `_changes` found, if anything."""
        if changes:
            self.tables.write(*changes)

    def _places(self, slices: _Slices) -> I64:
        """Where the sampled tokens belong."""
        return slices.sampled_rows * np.int64(self.tables.max_model_len) + slices.sampled_ends

    def _replay(self, slices: _Slices, changes: list[NDArray[Any]]) -> _Computed | None:
        """Compute the step as a graph, if there is one for such a step."""
        tables, graphs = self.tables, self._graphs
        if graphs is None or not slices.is_decode or len(slices.rows) > graphs.sizes[-1]:
            return None
        padded = graphs.padded(slices.rows, slices.starts)
        arrays: list[NDArray[Any]] = [*padded, self._places(slices), *changes]
        if not tables.fits(arrays):  # prompts, all but a token of which were found in the cache
            return None
        rows, _, ends, places, *written = tables.upload(arrays, is_fixed=True)
        self._apply(written)
        num_rows = len(slices.rows)
        logits = graphs.replay(padded)[:num_rows]
        return _Computed(logits, rows[:num_rows], ends[:num_rows], places, [])

    def _compute(self, slices: _Slices, changes: list[NDArray[Any]]) -> _Computed:
        """Compute the step eagerly."""
        model, tables = self.model, self.tables
        query_start = np.zeros(len(slices.rows) + 1, np.int32)
        np.cumsum(slices.lengths, out=query_start[1:])
        arrays: list[NDArray[Any]] = [
            slices.rows,
            slices.starts,
            slices.ends,
            query_start,
            query_start[1:][slices.is_sampled].astype(np.int64) - 1,
            slices.sampled_rows,
            slices.sampled_ends,
            self._places(slices),
            *changes,
        ]
        found = tables.upload(arrays, is_fixed=False)
        rows, starts, ends, of_queries, logit_rows, sampled_rows, sampled_ends, places = found[:8]
        self._apply(found[8:])
        batch = DeviceBatch(
            input_ids=rows.new_empty(slices.num_tokens),
            positions=rows.new_empty(slices.num_tokens),
            slots=logit_rows.new_empty(slices.num_tokens),
            rows=rows,
            query_start=of_queries,
            context_len=ends,
            block_table=tables.block_table,
            logit_rows=logit_rows,
            lengths=slices.lengths.tolist(),
            max_context_len=int(slices.ends.max()),
            kv=model.kv,
            attention=model.attention,
            contexts=slices.ends.tolist(),
        )
        tables.fill(batch, starts)
        hidden = model.forward(batch)
        asked = self._prompt_logprobs(slices, query_start, hidden)
        if len(logit_rows) < len(hidden):  # else it is all of them, in order
            hidden = hidden.index_select(0, logit_rows)
        logits = model.logits(hidden) if len(hidden) else hidden
        return _Computed(logits, sampled_rows, sampled_ends, places, asked)

    def _prompt_logprobs(
        self, slices: _Slices, query_start: I32, hidden: torch.Tensor
    ) -> list[_Logprobs]:
        """Of prompt tokens start + 1 .. start + length of the slices whose rows ask for it.

        On their way to the host, so that the device holds one piece at a time.
        """
        state = self._state
        found = []
        for index in state.wants_prompt_logprobs[slices.rows].nonzero()[0].tolist():
            row = int(slices.rows[index])
            params = state.params[row]
            assert params is not None
            assert params.prompt_logprobs is not None
            k, start = params.prompt_logprobs, int(slices.starts[index])
            end = min(int(slices.ends[index]) + 1, int(state.num_prompt[row]))
            for position in range(start + 1, end, PROMPT_LOGPROB_ROWS):
                targets = self.tables.token_ids[
                    row, position : min(position + PROMPT_LOGPROB_ROWS, end)
                ]
                at = int(query_start[index]) + position - start - 1
                logits = self.model.logits(hidden[at : at + len(targets)])
                values = prompt_logprobs(logits, targets, k)
                found.append(_Logprobs([row], [k] * len(targets), values).download())
        return found
