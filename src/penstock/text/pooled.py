"""Between texts and an engine that pools: what is tokenized of them, and what a vector becomes.

Owns what the server and the offline API share: prompts, limits, truncation, pairs, the cut of
embeddings and their similarity. Knows neither of the two, and no engine. Imports numpy when a
vector comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from penstock.errors import ContextTooLong, EngineError, InvalidField
from penstock.text.tokenizer import Tokenizer
from penstock.types import EngineInfo, PoolingInfo

if TYPE_CHECKING:  # a server that generates lives without numpy
    import numpy as np
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]


class Ids(NamedTuple):
    """One text for the engine, or a pair."""

    token_ids: list[int]
    second_start: int = 0  # of a pair: where the second text begins; 0: the model sees no types


def check_truncation(num_tokens: int | None, info: EngineInfo) -> int | None:
    """How many tokens of a text to keep at most; None: a longer one is refused.

    Raises:
        InvalidField: it is no number of tokens that this engine computes.
    """
    if num_tokens == -1:
        return info.max_model_len
    if num_tokens is not None and not 1 <= num_tokens <= info.max_model_len:
        raise InvalidField(
            f"`truncate_prompt_tokens` is `{num_tokens}`; it must be in [1, {info.max_model_len}], "
            "or -1 for as many as fit.",
            field="truncate_prompt_tokens",
        )
    return num_tokens


def check_dimensions(dimensions: int | None, pooling: PoolingInfo) -> None:
    """Whether an embedding may be cut to so many numbers.

    Raises:
        InvalidField: the model was not made for it.
    """
    if dimensions is None:
        return
    if pooling.dimensions is None:
        raise InvalidField(
            f"`dimensions` is `{dimensions}`, and the model's config does not say that its "
            "embeddings can be cut.",
            field="dimensions",
            hint=f"leave it out: they have `{pooling.size}` numbers",
        )
    allowed = pooling.dimensions
    is_one = dimensions in allowed if allowed else 1 <= dimensions <= pooling.size
    if not is_one:
        named = ", ".join(map(str, allowed[:20])) if allowed else f"1 to {pooling.size}"
        raise InvalidField(
            f"`dimensions` is `{dimensions}`; it must be one of {named}.", field="dimensions"
        )


def prompt_of(name: str | None, pooling: PoolingInfo) -> str:
    """What is put before a text: the prompt of that name, or the usual one.

    Raises:
        InvalidField: the checkpoint has none of that name.
    """
    if name is None:
        return pooling.prompts.get(pooling.default_prompt or "", "")
    if name not in pooling.prompts:
        known = ", ".join(f"`{known}`" for known in list(pooling.prompts)[:20]) or "none"
        raise InvalidField(
            f"`prompt_name` is `{name[:100]}`; the checkpoint has {known}.", field="prompt_name"
        )
    return pooling.prompts[name]


def text_ids(
    tokenizer: Tokenizer,
    info: EngineInfo,
    first: str,
    second: str | None = None,
    *,
    keep: int | None = None,
    field: str,
) -> Ids:
    """Tokenize one text or a pair.

    Args:
        keep: tokens to keep, special ones included.
        field: what brought it, for sentences.

    Raises:
        InvalidField: it is empty.
        ContextTooLong: it is too long.
    """
    if info.pooling is not None and info.pooling.is_lowercased:
        first, second = first.lower(), None if second is None else second.lower()
    ids = Ids(*tokenizer.encode_pair(first, second, max_tokens=keep))
    check_length(ids, info, field)
    return ids


def given_ids(token_ids: list[int], info: EngineInfo, *, keep: int | None, field: str) -> Ids:
    """A text that came as token ids; like vLLM, the last ones are kept of it.

    Raises:
        InvalidField: it is empty, or an id is not in the vocabulary.
        ContextTooLong: it is too long.
    """
    ids = Ids(token_ids if keep is None else token_ids[-keep:])
    check_length(ids, info, field)
    for token_id in (min(ids.token_ids), max(ids.token_ids)):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidField(
                f"`{field}` holds the token `{token_id}`; the vocabulary has `{info.vocab_size}`.",
                field=field,
            )
    return ids


def check_length(ids: Ids, info: EngineInfo, field: str) -> None:
    """Whether a text can be computed.

    Raises:
        InvalidField: it is empty.
        ContextTooLong: it is too long.
    """
    if not ids.token_ids:
        raise InvalidField(f"`{field}` is empty.", field=field, hint="give at least one token")
    if len(ids.token_ids) > info.max_model_len:
        raise ContextTooLong(
            f"`{field}` has `{len(ids.token_ids)}` tokens; at most `{info.max_model_len}` are "
            "computed, and no text is cut unless you ask for it.",
            field=field,
            hint="shorten it, or set `truncate_prompt_tokens` to -1",
        )


def num_pairs(num_first: int, num_second: int, names: tuple[str, str]) -> int:
    """How many pairs: one to one, one to many, or each to its own.

    Raises:
        InvalidField: the numbers do not fit.
    """
    if not num_first or not num_second:
        name = names[1] if num_first else names[0]
        raise InvalidField(f"`{name}` is empty.", field=name)
    if num_first not in (1, num_second):
        raise InvalidField(
            f"`{names[0]}` has `{num_first}` texts and `{names[1]}` has `{num_second}`.",
            field=names[0],
            hint="give one of the first, or as many as of the second",
        )
    return num_second


def check_scores(pooling: PoolingInfo) -> None:
    """Whether the model gives a pair one score.

    Raises:
        InvalidField: it has several labels.
    """
    if pooling.is_classifier and pooling.size != 1:
        raise InvalidField(
            f"The model has `{pooling.size}` labels; a score of a pair needs one with `1`.",
            field="model",
            hint="use /classify",
        )


def vector_of(data: bytes | None, field: str) -> F32:
    """What the engine has sent of one text.

    Raises:
        EngineError: it is not finite: JSON could not even say it.
    """
    import numpy as np

    vector = np.frombuffer(data or b"", "<f4")
    if not len(vector) or not np.isfinite(vector).all():
        raise EngineError(
            f"The model's answer to `{field}` is not finite.",
            hint="its weights may be damaged, or its dtype too narrow: try `--dtype float32`",
        )
    return vector


def cut(vector: F32, dimensions: int | None, pooling: PoolingInfo) -> F32:
    """The first numbers of an embedding; of length 1 again, if the whole one is."""
    import numpy as np

    if dimensions is None or dimensions == len(vector):
        return vector
    shorter = vector[:dimensions]
    if not pooling.is_normalised:
        return shorter
    length = math.sqrt(float(np.square(shorter, dtype=np.float64).sum()))
    return (shorter / max(length, 1e-12)).astype(np.float32)


def similarity(first: F32, second: F32) -> float:
    """The cosine between two embeddings; of one without length 0."""
    import numpy as np

    one, other = first.astype(np.float64), second.astype(np.float64)
    lengths = float(np.sqrt(one @ one) * np.sqrt(other @ other))
    return float(one @ other) / lengths if lengths else 0.0


def pair_scores(firsts: Sequence[F32], seconds: Sequence[F32]) -> list[float]:
    """Similarities of pairs of embeddings; one first text stands in all of them."""
    if len(firsts) == 1:
        firsts = list(firsts) * len(seconds)
    return [similarity(*pair) for pair in zip(firsts, seconds, strict=True)]
