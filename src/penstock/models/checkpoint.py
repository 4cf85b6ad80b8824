"""A model's files, whichever form they have: a directory of safetensors, or a GGUF file.

Owns which files belong to a checkpoint, and that what they hold comes under one set of names, the
ones that Hugging Face's have. Knows no backend. Never unpickles and never runs code from a
directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import ModelLoadError
from penstock.models.files import is_consolidated, is_gguf, read_config, read_json
from penstock.models.safetensors import map_tensors, shown
from penstock.models.spec import Names
from penstock.quantization.codes import CodedTensor, CodeForm, Found, StoredTensor

if TYPE_CHECKING:  # what few models need is imported where it is needed
    from penstock.quantization.stored import StoredPrecision

Files = Sequence[tuple[Path, Sequence[Found]]]

# All experts of a layer in one tensor, as GPT-OSS has them.
_ALL_EXPERTS = tuple(
    f".mlp.experts.{name}{suffix}"
    for name in ("gate_up_proj", "down_proj")
    for suffix in ("", "_bias")
)


class GGUFPrecision:
    """The formats of a GGUF file's matrices, each its own: a `StoredPrecision`."""

    activation_bits = 16

    def __init__(self, path: Path) -> None:
        from penstock.models import gguf_model

        self._forms = gguf_model.forms(path)
        self.name = gguf_model.precision_name(path)

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of one weight; None: it is stored plainly."""
        return self._forms.get(name)

    def join(self, tensors: Sequence[StoredTensor]) -> list[Found]:
        """They are whole already."""
        return list(tensors)


class FilePrecision:
    """The formats that a checkpoint's files have, whatever its config promises."""

    def __init__(self, told: StoredPrecision, path: Path, names: Names) -> None:
        self.name = told.name
        self.activation_bits = told.activation_bits
        self.join = told.join
        self._prefixes = names.prefixes
        self._forms = {
            tensor.name: tensor.form
            for _, tensors in open_checkpoint(path)
            for tensor in tensors
            if isinstance(tensor, CodedTensor)
        }

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of one weight; None: it is stored plainly."""
        others = (
            theirs + name.removeprefix(ours)
            for ours, theirs in self._prefixes
            if name.startswith(ours)
        )
        return next((self._forms[other] for other in (name, *others) if other in self._forms), None)


def precision(path: Path, config: Mapping[str, Any]) -> StoredPrecision | None:
    """In which codes a checkpoint has its matrices; None: they are plain numbers.

    Only configs and headers are read.

    Raises:
        UnsupportedModel: it says that it is quantized in a way that is not read.
    """
    if is_gguf(path):
        found = GGUFPrecision(path)
        return found if found.name else None
    if not any(config.get(key) for key in ("quantization_config", "compression_config")):
        return None
    from penstock.quantization.stored import precision_of

    return precision_of(config)


def open_checkpoint(path: Path) -> Files:
    """Every tensor of a model, by file in the order of the bytes, mapped and not read.

    Raises:
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
    """
    if is_gguf(path):
        from penstock.models import gguf_model

        return gguf_model.open_tensors(path)
    if is_consolidated(path):
        from penstock.models import consolidated

        return consolidated.open_tensors(weight_files(path), read_config(path))
    files = [(file, map_tensors(file)) for file in weight_files(path)]
    stored = precision(path, read_json(path / "config.json") or {})
    if stored is None:
        return [(file, _split(tensors)) for file, tensors in files]
    # The pieces of one matrix may lie in different files.
    joined = stored.join([tensor for _, tensors in files for tensor in tensors])
    return [(files[0][0], _split(joined))]


def _split(tensors: Sequence[Found]) -> list[Found]:
    """The tensors, where a plain one that holds all experts of a layer is one for each."""
    if not any(tensor.name.endswith(_ALL_EXPERTS) for tensor in tensors):
        return list(tensors)
    from penstock.quantization.mxfp4 import split_experts
    from penstock.quantization.pieces import check_parts

    found: list[Found] = []
    for tensor in tensors:
        found += split_experts([tensor]) if isinstance(tensor, StoredTensor) else [tensor]
        check_parts(len(found))
    return found


def weight_files(path: Path) -> list[Path]:
    """The files with a model's weights: of a directory its safetensors, by its index if it has one.

    Raises:
        ModelLoadError: there are none, or some that its index names are missing.
    """
    if is_gguf(path):
        from penstock.models import gguf_model

        return gguf_model.weight_files(path)
    stem = "consolidated" if is_consolidated(path) else "model"
    index_name = f"{stem}.safetensors.index.json"
    index = read_json(path / index_name)
    if index is None:
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files
        if (path / f"{stem}.safetensors") in files:
            return [path / f"{stem}.safetensors"]
        raise _no_weights(path, len(files), index_name)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelLoadError(f"`{path / index_name}` has no `weight_map` of file names.")
    present = {file.name for file in path.iterdir()}
    for name in names.values():
        if name not in present:  # a name that no file can have is never given to the system
            raise ModelLoadError(
                f"`{index_name}` names `{shown(name)}`, which is not a file of `{path}`.",
                hint="the download may be incomplete.",
            )
    return [path / name for name in sorted(set(names.values()))]


def _no_weights(directory: Path, num_files: int, index_name: str) -> ModelLoadError:
    if num_files:
        return ModelLoadError(
            f"`{directory}` has `{num_files}` safetensors files and no `{index_name}`.",
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
    return ModelLoadError(
        f"`{directory}` has no safetensors file.",
        hint="a GGUF file is named itself; `--load-format dummy` takes random weights.",
    )
