"""From the safetensors files of a directory into the leaves of a model, and nothing else.

Owns which files belong to a checkpoint and that they fit the model. Knows neither tensors nor
backends: a leaf takes bytes. Never unpickles and never runs code from the directory.

Invariant: headers are checked before any number is loaded, and all missing, unexpected and
misshapen weights are reported in one error: their number, and the first of each kind by name.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from penstock.errors import ModelLoadError, WeightMismatch
from penstock.hardware import TERMINAL
from penstock.layers.toolkit import Layer, StoredTensor, Weight
from penstock.models.files import read_json
from penstock.models.safetensors import in_turn, map_tensors, shown

LoadFormat = Literal["auto", "dummy"]

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}  # as safetensors names them
_NUM_TOLD = 20  # problems of one kind that an error lists
DUMMY_STD = 0.02
_SHOWN_AFTER_S = 1.0


def load_weights(
    layers: Iterable[Layer], path: Path | str, load_format: LoadFormat = "auto", seed: int = 0
) -> None:
    """Load every weight of a model's leaves from the directory `path`, then finish the leaves.

    `load_format` "dummy" reads no file and draws the weights (normal, std 0.02, fp32) from `seed`
    and their names; vectors keep what they were made with.

    Raises:
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
    """
    layers = list(layers)
    weights = [weight for layer in layers for weight in layer.weights()]
    if load_format == "dummy":
        _draw(weights, seed)
    else:
        _load(weights, [(file, _tensors(file)) for file in weight_files(Path(path))])
    del weights  # they hold memory that `finish` may give up
    for layer in layers:
        layer.finish()


def _draw(weights: list[Weight], seed: int) -> None:
    """Random matrices, each from its own name, so that they do not hang on order or backend."""
    for weight in weights:
        if len(weight.shape) > 1 and weight.duplicate_of is None:
            generator = np.random.default_rng((seed, zlib.crc32(weight.name.encode())))
            drawn = generator.standard_normal(weight.shape, np.float32)
            drawn *= np.float32(DUMMY_STD)
            data = drawn.reshape(-1).view(np.uint8)
            weight.load(StoredTensor(weight.name, "F32", weight.shape, data))


def _tensors(file: Path) -> list[StoredTensor]:
    """What a file holds, without a buffer of old checkpoints that follows from the config."""
    return [
        tensor for tensor in map_tensors(file) if not tensor.name.endswith("rotary_emb.inv_freq")
    ]


def _load(weights: list[Weight], files: list[tuple[Path, list[StoredTensor]]]) -> None:
    """Load all tensors in the order of the files, after all of them were checked."""
    wanted = {weight.name: weight for weight in weights}
    _check(wanted, files)
    copies = {weight.name: weight.duplicate_of for weight in weights if weight.duplicate_of}
    _compare(copies, files)
    with _progress(sum(tensor.data.nbytes for _, tensors in files for tensor in tensors)) as done:
        while files:  # a file that was loaded is unmapped before the next one
            _, tensors = files.pop(0)
            for tensor in in_turn(tensors):
                if tensor.name not in copies:
                    wanted[tensor.name].load(tensor)
                done(tensor.data.nbytes)


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


def _check(wanted: dict[str, Weight], files: list[tuple[Path, list[StoredTensor]]]) -> None:
    """Raise one error for all tensors that are not what is wanted."""
    source: dict[str, Path] = {}
    problems: dict[str, list[str]] = {}
    for file, tensors in files:
        for tensor in tensors:
            found = _problems(tensor, wanted.get(tensor.name), source.get(tensor.name))
            for kind, problem in found:
                problems.setdefault(kind, []).append(problem)
            source[tensor.name] = file
    for weight in wanted.values():
        if weight.name not in source and weight.duplicate_of is None:
            missing = f"`{weight.name}`, {list(weight.shape)}"
            problems.setdefault("missing", []).append(missing)
    if problems:
        raise _mismatch(problems)


def _problems(
    tensor: StoredTensor, weight: Weight | None, earlier: Path | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with one tensor of a checkpoint: kind and details."""
    name, shape = shown(tensor.name), list(tensor.shape)
    if weight is None:
        yield "unexpected", f"`{name}`, {shape}"
        return
    if tensor.shape != weight.shape:
        yield "misshapen", f"`{name}` is {shape}, the config says {list(weight.shape)}"
    if tensor.dtype not in _DTYPES:
        yield (
            "unreadable",
            f"`{name}` is of type {shown(tensor.dtype)}, not one of {sorted(_DTYPES)}",
        )
    if earlier is not None:
        yield "repeated", f"`{name}` is in `{earlier.name}` too"


def _compare(copies: dict[str, str], files: list[tuple[Path, list[StoredTensor]]]) -> None:
    """Refuse a copy, by name, that has not the bytes of what it is a copy of."""
    if not copies:
        return
    stored = {tensor.name: tensor for _, tensors in files for tensor in tensors}
    for name, original in copies.items():
        if name in stored and not (
            stored[name].dtype == stored[original].dtype
            and np.array_equal(stored[name].data, stored[original].data)
        ):
            raise WeightMismatch(
                f"`{name}` differs from the table that the config ties it to.",
                hint="if it is a table of its own, `tie_word_embeddings` must be false.",
            )


def _mismatch(problems: dict[str, list[str]]) -> WeightMismatch:
    lines = []
    for kind, found in sorted(problems.items()):
        lines += [f"{kind}: {problem}" for problem in sorted(found)[:_NUM_TOLD]]
        if len(found) > _NUM_TOLD:
            lines.append(f"{kind}: and {len(found) - _NUM_TOLD} more")
    return WeightMismatch(
        f"`{sum(map(len, problems.values()))}` weights do not fit the model's config:\n  "
        + "\n  ".join(lines),
        hint="config.json and the safetensors files must come from the same checkpoint.",
    )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, by its index if it has one.

    Raises:
        ModelLoadError: there are none, or some that its index names are missing.
    """
    index = read_json(directory / _INDEX)
    if index is None:
        files = sorted(directory.glob("*.safetensors"))
        if len(files) == 1:
            return files
        if (directory / "model.safetensors") in files:
            return [directory / "model.safetensors"]
        raise _no_weights(directory, len(files))
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelLoadError(f"`{directory / _INDEX}` has no `weight_map` of file names.")
    present = {file.name for file in directory.iterdir()}
    for name in names.values():
        if name not in present:  # a name that no file can have is never given to the system
            raise ModelLoadError(
                f"`{_INDEX}` names `{ascii(name)[1:-1][:100]}`, which is not a file of "
                f"`{directory}`.",
                hint="the download may be incomplete.",
            )
    return [directory / name for name in sorted(set(names.values()))]


def _no_weights(directory: Path, num_files: int) -> ModelLoadError:
    if num_files:
        return ModelLoadError(
            f"`{directory}` has `{num_files}` safetensors files and no `{_INDEX}`.",
            hint="the index says which of them belong together; it comes with the checkpoint.",
        )
    pickles = [
        file.name
        for file in sorted(directory.iterdir())
        if file.suffix in {".bin", ".pt", ".pth", ".ckpt"}
    ]
    if pickles:
        return ModelLoadError(
            f"`{directory}` has its weights in `{pickles[0]}`, a pickle, which can run code when "
            "it is read.",
            hint="convert it with `save_pretrained(..., safe_serialization=True)`.",
        )
    return ModelLoadError(f"`{directory}` has no safetensors file.")
