"""From the tensors of a checkpoint into the leaves of a model, and nothing else.

Owns that they fit the model, and the picking of rows where a leaf wants some of a tensor. Knows
neither files nor backends: a leaf takes bytes, or codes.

Invariant: headers are checked before any number is loaded, and all missing, unexpected and
misshapen weights are reported in one error: their number, and the first of each kind by name.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from penstock.errors import WeightMismatch
from penstock.hardware import TERMINAL
from penstock.layers.toolkit import Layer, RowMap, Weight
from penstock.models.checkpoint import Files, open_checkpoint
from penstock.models.safetensors import in_turn, shown
from penstock.models.spec import Names
from penstock.quantization.codes import (
    CodedTensor,
    CodeForm,
    CutTensor,
    Found,
    Stored,
    StoredTensor,
)
from penstock.quantization.drawn import drawn

LoadFormat = Literal["auto", "dummy"]
Forms = Callable[[str, tuple[int, int]], CodeForm | None]

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes, by safetensors' names
# Buffers of old checkpoints that follow from the config.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
            ".attention.masked_bias", ".position_ids")  # fmt: skip
_OLD_ENDS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_NUM_TOLD = 20  # problems of one kind that an error lists
DUMMY_STD = 0.02
_PLAIN = Names()
_SHOWN_AFTER_S = 1.0


def load_weights(
    layers: Iterable[Layer],
    path: Path | str,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    names: Names = _PLAIN,
    form: Forms | None = None,
) -> None:
    """Load every weight of a model's leaves from the directory `path`, then finish the leaves.

    `names` says under which other names a checkpoint may have them, and what it may have besides.

    `load_format` "dummy" reads no file and draws the weights (normal, std 0.02, fp32) from `seed`
    and their names; vectors keep what they were made with. `form` says which matrices, by name and
    shape, are drawn as codes, because a checkpoint has them so.

    Raises:
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
    """
    layers = list(layers)
    weights = [weight for layer in layers for weight in layer.weights()]
    if load_format == "dummy":
        _draw(weights, seed, form)
    else:
        files = [
            (file, [tensor for tensor in tensors if not tensor.name.startswith(names.ignored)])
            for file, tensors in open_checkpoint(Path(path))
        ]
        stored = {tensor.name for _, tensors in files for tensor in tensors}
        _load(_as_stored(weights, stored, names), files)
    del weights  # they hold memory that `finish` may give up
    for layer in layers:
        layer.finish()


def _as_stored(weights: list[Weight], stored: set[str], names: Names) -> list[Weight]:
    """The weights under the names that these files have them by."""

    def found(name: str) -> str:
        spelled = [name] + [
            theirs + name.removeprefix(ours)
            for ours, theirs in names.prefixes
            if name.startswith(ours)
        ]
        for new, old in _OLD_ENDS.items():  # BERT's first checkpoints
            spelled += [other.removesuffix(new) + old for other in spelled if other.endswith(new)]
        return next((other for other in spelled if other in stored), name)

    return [
        weight._replace(
            name=found(weight.name),
            duplicate_of=None if weight.duplicate_of is None else found(weight.duplicate_of),
        )
        for weight in weights
    ]


def _draw(weights: list[Weight], seed: int, form: Forms | None) -> None:
    """Random matrices, each from its own name, so that they do not hang on order or backend."""
    for weight in weights:
        if len(weight.shape) > 1 and weight.duplicate_of is None:
            own_seed = (seed, zlib.crc32(weight.name.encode()))
            if form and len(weight.shape) == 2 and (code := form(weight.name, weight.shape)):
                weight.load(drawn(weight.name, code, weight.shape, own_seed, DUMMY_STD))
                continue
            numbers = np.random.default_rng(own_seed).standard_normal(weight.shape, np.float32)
            numbers *= np.float32(DUMMY_STD)
            data = numbers.reshape(-1).view(np.uint8)
            weight.load(StoredTensor(weight.name, "F32", weight.shape, data))


def _load(weights: list[Weight], files: Files) -> None:
    """Load all tensors in the order of the files, after all of them were checked."""
    wanted: dict[str, list[Weight]] = {}
    for weight in weights:
        wanted.setdefault(weight.name, []).append(weight)
    coded = {
        tensor.name.removesuffix(".weight")
        for _, tensors in files
        for tensor in tensors
        if isinstance(tensor, CodedTensor)
    }
    files = [
        (file, [tensor for tensor in tensors if not _is_needless(tensor, wanted, coded)])
        for file, tensors in files
    ]
    files = [(file, tensors) for file, tensors in files if tensors]
    _check(wanted, files)
    copies = {weight.name: weight.duplicate_of for weight in weights if weight.duplicate_of}
    _compare(copies, files)
    with _progress(sum(tensor.num_bytes for _, tensors in files for tensor in tensors)) as done:
        while files:  # a file that was loaded is unmapped before the next one
            _, tensors = files.pop(0)
            for tensor in in_turn(tensors):
                if tensor.name not in copies:
                    whole = tensor.copied() if isinstance(tensor, CutTensor) else tensor
                    for weight in wanted[tensor.name]:
                        weight.load(arranged(_flat(whole, weight), weight.rows))
                done(tensor.num_bytes)


def _flat(tensor: Stored, weight: Weight) -> Stored:
    """The tensor; if a vector is wanted, as one."""
    if len(weight.shape) == 1 and len(tensor.shape) == 2 and isinstance(tensor, StoredTensor):
        return tensor._replace(shape=(math.prod(tensor.shape),))
    return tensor


def arranged(tensor: Stored, rows: RowMap | None) -> Stored:
    """The rows that a part is of a tensor, [num_rows, ...]; without a map the tensor itself."""
    if rows is None:
        return tensor
    taken = rows.taken
    if isinstance(tensor, CodedTensor):  # [out, in], whatever plain checkpoints have
        return tensor if taken is None else tensor.arranged(taken)
    size = _DTYPES[tensor.dtype]
    numbers = tensor.data.view().reshape(*tensor.shape, size)
    if rows.is_transposed and numbers.ndim == 3:
        numbers = numbers.swapaxes(0, 1)
    if taken is not None:
        is_run = len(taken) > 0 and np.array_equal(
            taken, np.arange(taken[0], taken[0] + len(taken))
        )
        numbers = numbers[taken[0] : taken[0] + len(taken)] if is_run else numbers[taken]
    data = np.ascontiguousarray(numbers)
    return StoredTensor(tensor.name, tensor.dtype, data.shape[:-1], data.reshape(-1))


def _is_vector(tensor: Found, expected: tuple[int, ...]) -> bool:
    """Whether a vector is wanted and its numbers are stored in more dimensions (Command-R)."""
    if len(expected) != 1 or len(tensor.shape) != 2 or isinstance(tensor, CodedTensor):
        return False
    return math.prod(tensor.shape) == expected[0]


def _is_needless(tensor: Found, wanted: dict[str, list[Weight]], coded: set[str]) -> bool:
    """Whether a tensor may be there and says nothing.

    A buffer that follows from the config, or the bias of zeros that old tools write beside every
    matrix that they quantize.
    """
    if tensor.name in wanted:
        return False
    if tensor.name.endswith(_BUFFERS):
        return True
    is_bias = tensor.name.endswith(".bias") and tensor.name.removesuffix(".bias") in coded
    return is_bias and isinstance(tensor, StoredTensor) and not tensor.data.any()


@contextlib.contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], object]]:
    """What to call with bytes that are loaded: it shows them, on a terminal, if it takes longer."""
    with contextlib.ExitStack() as stack:
        terminal = sys.stderr
        if name := os.environ.get(TERMINAL):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.stat(name).st_mode):  # to open another file could change it
                    fd = os.open(name, os.O_WRONLY | os.O_NOCTTY)
                    terminal = stack.enter_context(open(fd, "w"))
        if not terminal.isatty():
            yield lambda num_bytes: None
            return
        from tqdm import tqdm

        bar = tqdm(
            desc="loading weights",
            total=num_bytes,
            unit="B",
            unit_scale=True,
            delay=_SHOWN_AFTER_S,
            leave=False,
            file=terminal,
        )
        with bar:
            yield bar.update


def _check(wanted: dict[str, list[Weight]], files: Files) -> None:
    """Raise one error for all tensors that are not what is wanted."""
    source: dict[str, Path] = {}
    problems: dict[str, list[str]] = {}
    for file, tensors in files:
        for tensor in tensors:
            found = _problems(tensor, wanted.get(tensor.name), source.get(tensor.name))
            for kind, problem in found:
                problems.setdefault(kind, []).append(problem)
            source[tensor.name] = file
    for name, (weight, *_) in wanted.items():
        if name not in source and weight.duplicate_of is None:
            missing = f"`{name}`, {list(weight.stored_shape)}"
            problems.setdefault("missing", []).append(missing)
    if problems:
        raise _mismatch(problems)


def _problems(
    tensor: Found, weights: list[Weight] | None, earlier: Path | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with one tensor of a checkpoint: kind and details."""
    name, shape = shown(tensor.name), list(tensor.shape)
    if weights is None:
        yield "unexpected", f"`{name}`, {shape}"
        return
    expected = weights[0].stored_shape
    if isinstance(tensor, CodedTensor) and weights[0].rows and weights[0].rows.is_transposed:
        expected = expected[::-1]
    if tuple(tensor.shape) != expected and not _is_vector(tensor, expected):
        yield "misshapen", f"`{name}` is {shape}, the config says {list(expected)}"
    if not isinstance(tensor, CodedTensor) and tensor.dtype not in _DTYPES:
        yield (
            "unreadable",
            f"`{name}` is of type {shown(tensor.dtype)}, not one of {sorted(_DTYPES)}",
        )
    if earlier is not None:
        yield "repeated", f"`{name}` is in `{earlier.name}` too"


def _compare(copies: dict[str, str], files: Files) -> None:
    """Refuse a copy, by name, that has not the bytes of what it is a copy of."""
    if not copies:
        return
    stored = {tensor.name: tensor for _, tensors in files for tensor in tensors}
    for name, original in copies.items():
        if name in stored and not _are_equal(stored[name], stored[original]):
            raise WeightMismatch(
                f"`{name}` differs from the table that the config ties it to.",
                hint="if it is a table of its own, `tie_word_embeddings` must be false.",
            )


def _are_equal(one: Found, other: Found) -> bool:
    """Whether two tensors of one shape hold the same; of codes, the same numbers."""
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return one.dtype == other.dtype and np.array_equal(one.data, other.data)
    if isinstance(one, CodedTensor) and isinstance(other, CodedTensor):
        return np.array_equal(one.values(), other.values(), equal_nan=True)
    return False


def _mismatch(problems: dict[str, list[str]]) -> WeightMismatch:
    lines = []
    for kind, found in sorted(problems.items()):
        lines += [f"{kind}: {problem}" for problem in sorted(found)[:_NUM_TOLD]]
        if len(found) > _NUM_TOLD:
            lines.append(f"{kind}: and {len(found) - _NUM_TOLD} more")
    return WeightMismatch(
        f"`{sum(map(len, problems.values()))}` weights do not fit the model's config:\n  "
        + "\n  ".join(lines),
        hint="config and weights must come from the same checkpoint.",
    )
