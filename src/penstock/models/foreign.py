"""Architectures that are not ours: transformers' own modules over our paged keys and values.

Owns the attention function that transformers calls, which writes keys and values to our pages and
reads them there. For models that hand their attention to such a function and hold no state beside
it; of others a sentence says why not. The way of vLLM's and TGI's Transformers backends.

Invariant: no code of a model's repository runs, and no pickle is read. No model is served that has
not computed two short texts over pages as it does by itself.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.attention.base import TorchBatch
from penstock.attention.general import Kind, attend
from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention
from penstock.errors import ModelLoadError, PenstockError, UnsupportedModel, WeightMismatch
from penstock.models.architectures import ARCHITECTURES
from penstock.models.batch import ForwardBatch
from penstock.models.loader import LoadFormat
from penstock.models.spec import ModelSpec
from penstock.models.torch_model import on_tensors

_NAME = "penstock_paged"
# Two texts of nine tokens and the pieces in which both are computed; by how much the scores may be
# off, relative to how they vary. Rounding alone lets routers of many experts choose others.
_TRIAL = (((0, 4), (4, 5), (5, 9)), ((0, 1), (1, 8), (8, 9)))
_TRIAL_LEN = 9
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.4}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_HINT = f"our own are {', '.join(f'`{name}`' for name in sorted(ARCHITECTURES))}."


class ForeignModel:
    """Implements `Model`."""

    choose = None  # the sampler's own way will do

    def __init__(self, spec: ModelSpec, theirs: Any, kv: KVStore) -> None:
        self.spec = spec
        self.kv = kv
        self._theirs = theirs
        self._base: Any = getattr(theirs, theirs.base_model_prefix)
        self._plan = ReferenceAttention()
        self._hidden = torch.empty(0)

    @property
    def description(self) -> str:
        """The backend, whose modules compute, and its threads."""
        name = type(self._theirs).__name__
        return f"torch, {torch.get_num_threads()} threads, {name} of transformers"

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> None:
        """Compute all tokens of the batch and write their keys and values."""
        on_torch = on_tensors(batch, self.kv, self._plan)
        found = self._base(
            input_ids=on_torch.input_ids[None],
            position_ids=on_torch.positions[None],
            use_cache=False,
            return_dict=True,
            penstock_batch=on_torch,
        )
        self._hidden = found.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of the next token, [L, V], after the tokens `rows` [L] of the last batch."""
        hidden = self._hidden[torch.from_numpy(rows)][None]
        # What stands behind the base model differs (scales, caps): theirs is asked with the base
        # model's answer given.
        prefix = self._theirs.base_model_prefix
        given = _Given(hidden)
        self._theirs._modules[prefix] = given
        try:
            scores = self._theirs(input_ids=torch.zeros(1, len(rows), dtype=torch.long)).logits
        finally:
            self._theirs._modules[prefix] = self._base
        logits: NDArray[np.float32] = scores[0].float().numpy()
        return logits

    def hidden(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The last hidden states, [N, hidden], of the tokens `rows` [N] of the last batch."""
        hidden: NDArray[np.float32] = self._hidden[torch.from_numpy(rows)].float().numpy()
        return hidden

    def classify(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Nothing is classified here."""
        raise AssertionError("a generating model")


class _Given(torch.nn.Module):
    """A base model whose answer is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._answer = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer, as base models give it."""
        return _Answer(last_hidden_state=self._answer)


class _Answer(SimpleNamespace):
    """What a base model returns, as far as heads read it."""

    def __getattr__(self, name: str) -> None:
        """What else heads pass on, such as a router's scores: nothing of it is wanted."""

    def __getitem__(self, index: int) -> Any:
        assert index == 0
        return self.last_hidden_state


def load(
    path: Path,
    spec: ModelSpec,
    *,
    dtype: str,
    num_slots: int,
    num_threads: int | None,
    load_format: LoadFormat,
    seed: int,
) -> ForeignModel:
    """Load a model that only transformers knows.

    Raises:
        UnsupportedModel: transformers does not know it either, or it keeps a state, or does not
            let others compute its attention, or computes something else over our pages.
        ModelLoadError: its files cannot be read.
        WeightMismatch: weights are missing.
    """
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = getattr(transformers, spec.architecture)  # `architectures.foreign.is_known` has looked
    if problem := _problem(kind):
        raise _unusable(spec, problem)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    number_type: torch.dtype = getattr(torch, dtype)
    if num_threads:
        torch.set_num_threads(num_threads)
    theirs = _loaded(kind, path, number_type, None if load_format == "auto" else seed).eval()
    try:
        problem = _tried(spec, theirs, number_type)
    except Exception as error:  # whatever their modules raise
        raise _unusable(spec, _reason(error)) from error
    if problem is not None:
        raise _unusable(spec, problem)
    return ForeignModel(spec, theirs, _store(spec, num_slots, number_type))


def _loaded(kind: Any, path: Path, dtype: torch.dtype, seed: int | None) -> Any:
    """A model of transformers with its weights; with a `seed`, with random ones."""
    import transformers

    if (path / "adapter_config.json").exists():  # it names another model, or a pickle
        raise ModelLoadError(
            f"`{path}` has an `adapter_config.json`, which transformers would follow elsewhere.",
            hint="move it away, or merge the adapter into the weights.",
        )
    try:
        if seed is not None:
            torch.manual_seed(seed)
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            config._attn_implementation = _NAME
            return kind(config).to(dtype)
        theirs, info = kind.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=_NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers raises for files that it cannot read
        raise ModelLoadError(
            f"transformers cannot load `{path}` as `{kind.__name__}`: {_reason(error)}."
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise WeightMismatch(
            f"`{len(missing)}` weights of `{kind.__name__}` are missing in `{path}`, such as "
            f"`{missing[0]:.200}`.",
            hint="config and weights must come from the same checkpoint.",
        )
    return theirs


def _store(spec: ModelSpec, num_slots: int, dtype: torch.dtype) -> KVStore:
    num_vectors, size = spec.cached
    return KVStore(spec.num_layers, num_slots, num_vectors, size, dtype)


def _unusable(spec: ModelSpec, problem: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"`{spec.architecture}` is not supported by penstock, and transformers' own modules "
        f"cannot be used: {problem}.",
        hint=_HINT,
    )


def _reason(error: Exception) -> str:
    """The first line of what an exception says."""
    message = error.message if isinstance(error, PenstockError) else str(error)
    lines = message.strip().splitlines() or [type(error).__name__]
    return lines[0][:300].removesuffix(".")


@torch.inference_mode()
def _tried(spec: ModelSpec, theirs: Any, dtype: torch.dtype) -> str | None:
    """Why a model cannot be used, found by two short texts; None if it can.

    Over pages, in pieces and side by side, it must compute what it does with its own attention and
    each text at once. It does not if it has layers that remember (convolutions, recurrences),
    splits its heads in a way of its own, or sees what comes later.
    """
    model = ForeignModel(spec, theirs, _store(spec, len(_TRIAL) * _TRIAL_LEN, dtype))
    texts = (torch.arange(len(_TRIAL) * _TRIAL_LEN) % spec.vocab_size).view(len(_TRIAL), -1)
    ours: list[list[NDArray[np.float32]]] = [[] for _ in texts]
    theirs.set_attn_implementation("eager")
    expected = [theirs(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    theirs.set_attn_implementation(_NAME)
    for cuts in zip(*_TRIAL, strict=True):
        model.forward(_piece(texts, cuts))
        logits = model.logits(np.arange(sum(stop - start for start, stop in cuts)))
        first = 0
        for pieces, (start, stop) in zip(ours, cuts, strict=True):
            pieces.append(logits[first : first + stop - start])
            first += stop - start
    for pieces, scores in zip(ours, expected, strict=True):
        difference = torch.from_numpy(np.concatenate(pieces)) - scores.float()
        spread = (scores.float() - scores.float().mean()).norm()
        if not difference.norm() <= _TOLERANCE[dtype] * spread:  # NaN is not
            return "over pages it computes something else than by itself"
    return None


def _piece(texts: torch.Tensor, cuts: tuple[tuple[int, int], ...]) -> ForwardBatch:
    """A step that computes the tokens [start, stop) of each text, whose block is its number."""
    lengths = [stop - start for start, stop in cuts]
    positions = np.concatenate([np.arange(start, stop) for start, stop in cuts])
    rows = np.repeat(np.arange(len(cuts)), lengths)
    stops = [stop for _, stop in cuts]
    return ForwardBatch(
        input_ids=texts.numpy()[rows, positions],
        positions=positions,
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        context_len=np.array(stops, np.int32),
        slot_mapping=rows * _TRIAL_LEN + positions,
        block_table=np.arange(len(cuts), dtype=np.int32)[:, None],
        block_size=_TRIAL_LEN,
        logit_rows=np.arange(0),
        lengths=lengths,
        context_lens=stops,
    )


def _problem(kind: Any) -> str | None:
    """Why a class of transformers cannot be used; None if it can."""
    if not getattr(kind, "_supports_attention_backend", False):
        return "it does not let others compute its attention"
    if getattr(kind, "_is_stateful", False):
        return "it keeps a state beside keys and values"
    if not hasattr(kind, "generate"):
        return "it does not write text"
    return None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    penstock_batch: TorchBatch | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query [1, H, T, D], key and value [1, Hkv, T, D] to [1, T, H, D]."""
    if penstock_batch is None:
        raise UnsupportedModel(
            f"`{type(module).__name__}` of transformers does not pass on what our attention needs."
        )
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedModel(
            f"`{type(module).__name__}` of transformers decides itself which tokens it sees."
        )
    kv, layer = penstock_batch.kv, module.layer_idx
    if problem := _window_problem(getattr(module, "config", None), layer, sliding_window):
        raise UnsupportedModel(f"`{type(module).__name__}` of transformers {problem}.")
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    if k.shape[1:] != (kv.num_kv_heads, kv.head_dim) or v.shape != k.shape:
        raise UnsupportedModel(
            f"`{type(module).__name__}` of transformers has keys of {list(k.shape[1:])} and values "
            f"of {list(v.shape[1:])} for a token, where the config says "
            f"{[kv.num_kv_heads, kv.head_dim]} of both."
        )
    kind = Kind(
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    kv.write(layer, k.contiguous(), v.contiguous(), penstock_batch.slot_mapping)
    out = attend(q, kv.key(layer), kv.value(layer), kind, penstock_batch)
    return out[None], None


def _window_problem(config: Any, layer: int, window: int | None) -> str | None:
    """What is wrong with a layer that is told to see `window` tokens, as a predicate.

    Some models have windows in their masks alone, which are not made here.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else _FULL
    if kind not in {_FULL, _SLIDING}:
        return f"has layers of the kind `{kind:.80}`"
    limit = getattr(config, "sliding_window", None) or 0
    is_used = getattr(config, "use_sliding_window", True) is not False
    slides = kind == _SLIDING if kinds else is_used
    if slides and not window and 0 < limit < config.max_position_embeddings:
        return "has a window that it does not tell"
    return None
