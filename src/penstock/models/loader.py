"""From a directory to a model: config.json and safetensors files, and nothing else.

Owns the reading of weights. Never unpickles and never runs code from the directory.

Invariant: headers are checked before any number is copied, and all missing, unexpected and
misshapen weights are reported in one error: their number, and the first of each kind by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from penstock.errors import ModelLoadError, WeightMismatch
from penstock.layers.weights import Materials, Weight
from penstock.models.blocks import Decoder
from penstock.models.files import read_config, read_json
from penstock.models.registry import builder
from penstock.models.spec import ModelSpec

LoadFormat = Literal["auto", "dummy"]

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}  # as safetensors names them
_NUM_TOLD = 20  # problems of one kind that an error lists


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: LoadFormat = "auto",
    seed: int = 0,
) -> Decoder:
    """Build the model of a directory and fill its weights, converted to `dtype`.

    `load_format` "dummy" reads config.json only and draws the weights (normal, std 0.02) from
    `seed`.

    Raises:
        UnsupportedModel: the config asks for what is not implemented.
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
    """
    directory = Path(path)
    spec = ModelSpec.from_hf(read_config(directory))
    build = builder(spec.architecture)
    # Before memory is taken: a file that is damaged or missing is told at once.
    headers = [] if load_format == "dummy" else _read_headers(_weight_files(directory))
    with torch.inference_mode():
        model = build(spec, Materials(dtype, device))
        weights = [weight for layer in model.layers() for weight in layer.weights()]
        if load_format == "dummy":
            _draw(weights, seed)
        else:
            _fill(weights, headers)
        for layer in model.layers():
            layer.finish()
    return model


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, by its index if it has one."""
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


def _draw(weights: list[Weight], seed: int) -> None:
    """Random matrices. Vectors keep what they were built with: scales 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        if weight.data.dim() > 1 and not weight.duplicate:
            drawn = torch.empty(weight.data.shape, dtype=weight.data.dtype)
            weight.data.copy_(drawn.normal_(std=0.02, generator=generator))


class _Header(NamedTuple):
    """What a file says of one of its tensors."""

    name: str
    shape: list[int]
    dtype: str
    file: Path


def _read_headers(files: list[Path]) -> list[_Header]:
    """Of every tensor. Reads no numbers."""
    headers = []
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a handle is no mapping)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old checkpoints carry; it follows from the config
                header = tensors.get_slice(name)
                headers.append(_Header(name, list(header.get_shape()), header.get_dtype(), file))
    return headers


def _fill(weights: list[Weight], headers: list[_Header]) -> None:
    """Copy every tensor of the files to where it belongs, after all of them were checked."""
    wanted = {weight.name: weight for weight in weights}
    source: dict[str, Path] = {}
    problems: dict[str, list[str]] = {}
    for header in headers:
        for kind, problem in _check(header, wanted.get(header.name), source.get(header.name)):
            problems.setdefault(kind, []).append(problem)
        source[header.name] = header.file
    for weight in weights:
        if weight.name not in source and not weight.duplicate:
            missing = f"`{weight.name}`, {list(weight.data.shape)}"
            problems.setdefault("missing", []).append(missing)
    if problems:
        raise _mismatch(problems)
    for file in sorted(set(source.values())):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if source.get(name) == file and not wanted[name].duplicate:
                    wanted[name].data.copy_(tensors.get_tensor(name))
    _compare_duplicates([weight for weight in weights if weight.duplicate], source)


def _check(
    header: _Header, weight: Weight | None, earlier: Path | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with one tensor of a checkpoint: kind and details."""
    name, shape, dtype, _ = header
    if weight is None:
        yield "unexpected", f"`{name}`, {shape}"
        return
    if shape != list(weight.data.shape):
        yield "misshapen", f"`{name}` is {shape}, the config says {[*weight.data.shape]}"
    if dtype not in _DTYPES:
        yield "unreadable", f"`{name}` is of type {dtype}, not one of {sorted(_DTYPES)}"
    if earlier is not None:
        yield "repeated", f"`{name}` is in `{earlier.name}` too"


def _compare_duplicates(duplicates: list[Weight], source: dict[str, Path]) -> None:
    for weight in duplicates:
        if weight.name not in source:
            continue
        with _open(source[weight.name]) as tensors:
            given = tensors.get_tensor(weight.name).to(weight.data)
        if not torch.equal(given, weight.data):
            raise WeightMismatch(
                f"`{weight.name}` differs from the table that the config ties it to.",
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


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file; what is wrong with it becomes a ModelLoadError."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"`{file}` cannot be read: {error}.",
            hint="the file is damaged or incomplete; download it again.",
        ) from error
