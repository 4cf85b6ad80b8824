"""A model in a GGUF file, as the checkpoint that it was made of: config, weights, formats.

Owns what llama.cpp's converter (`conversion/` of https://github.com/ggml-org/llama.cpp) did to the
weights, and undoes it: reordered rows, norms stored as 1 + w, joined experts, DeepSeek's split
latent map. Knows no toolkit. Invariant: names, shapes and numbers are those of the checkpoint, but
for two: a matrix of codes is always [out, in], also where transformers has [in, out] (GPT-2); and
experts are apart, also where transformers joins them (GPT-OSS: "....mlp.experts.{}.gate_proj").

Weights stay mapped. Coded ones are decoded when they are asked for, and plain ones whose rows have
to be reordered are copied then; only Falcon's joined maps and DeepSeek's are copied at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.gguf.header import shown
from penstock.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from penstock.models.gguf.architectures import config_of
from penstock.models.gguf.names import Layout, Place, layout_of, place_of
from penstock.quantization import ggml
from penstock.quantization.codes import CodedTensor, CodeForm, CutTensor, Found, StoredTensor

Order = NDArray[np.int64]
U8 = NDArray[np.uint8]
_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ROPE_FACTORS = {"rope_freqs", "rope_factors_long", "rope_factors_short"}  # are in the config
_INTERLEAVED = {  # llama.cpp pairs neighbours in the heads of these, transformers halves
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
}
_SHIFTED_NORMS = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"}
_LATENT_PARTS = {"attn_k_b", "attn_v_b"}
_MAX_EXPERTS = 2**18  # matrices of experts in a file; the largest published has 70 thousand


class _Turn(NamedTuple):
    """Rows that lie as an array of these sizes, two axes of which are to be exchanged."""

    sizes: tuple[int, int, int]
    axes: tuple[int, int]

    def order(self) -> Order:
        """Which of the rows as they lie is each row."""
        rows = np.arange(int(np.prod(self.sizes)))
        return rows.reshape(self.sizes).swapaxes(*self.axes).reshape(-1)


class _Piece(NamedTuple):
    """One weight of the checkpoint, and what to do with the bytes that the file has of it."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: U8
    turn: _Turn | None = None
    order: Order | None = None  # which of the file's rows is each row
    is_transposed: bool = False  # the checkpoint has it as [in, out]
    shift: float = 0.0  # is subtracted


class _Told(NamedTuple):
    """What a file's headers say, as far as it is asked for more than once."""

    config: dict[str, Any]
    forms: dict[str, CodeForm]
    type_names: list[str]  # of the coded weights
    files: list[Path]


def read_config(path: Path | str) -> dict[str, Any]:
    """The config of the model in a GGUF file, as Hugging Face has it; bos and eos ids included.

    Raises:
        ModelLoadError: the file is damaged, a key is missing or of the wrong type, or a tensor is
            of a type that is not read, or has no place in the architecture.
        UnsupportedModel: the architecture is not known.
    """
    return copy.deepcopy(_told(Path(path)).config)


def forms(path: Path | str) -> dict[str, CodeForm]:
    """By the names of the weights that are codes, what their codes mean. Reads headers only.

    Raises:
        ModelLoadError, UnsupportedModel: as `read_config`.
    """
    return dict(_told(Path(path)).forms)


def precision_name(path: Path | str) -> str:
    """What most weights are stored as, for people: "GGUF, Q4_K and Q6_K"; "" of plain numbers.

    Raises:
        ModelLoadError, UnsupportedModel: as `read_config`.
    """
    *others, last = ["", *_told(Path(path)).type_names]
    names = ", ".join(others[1:])
    return "" if not last else f"GGUF, {names} and {last}" if names else f"GGUF, {last}"


def weight_files(path: Path | str) -> list[Path]:
    """The file, or all parts of a split one.

    Raises:
        ModelLoadError, UnsupportedModel: as `read_config`.
    """
    return list(_told(Path(path)).files)


def open_tensors(path: Path | str) -> list[tuple[Path, list[Found]]]:
    """All weights of a GGUF file, or of all parts of one, by file, as the checkpoint has them.

    Raises:
        ModelLoadError, UnsupportedModel: as `read_config`.
    """
    file = open_gguf(path)
    config = config_of(file)
    found: dict[Path, list[Found]] = {part: [] for part in file.files}
    for tensor, piece in _pieces(file, config):
        if piece is not None:
            found[tensor.file].append(_found(piece))
    for name, keys, values in _split_latents(file, config):
        found[values.file].append(_joined_latent(name, keys, values))
    return list(found.items())


def _told(path: Path) -> _Told:
    try:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        stamp = (0, 0, 0)  # opening it will say why
    return _told_once(path, stamp)


@lru_cache(maxsize=2)  # a model and its draft; a vocabulary takes a quarter of a second to read
def _told_once(path: Path, stamp: tuple[int, int, int]) -> _Told:
    file = open_gguf(path)
    config = config_of(file)
    found: dict[str, CodeForm] = {}
    num_bytes: dict[str, int] = {}
    for _, piece in _pieces(file, config):
        if piece is not None and (form := ggml.form_of(piece.type_name)) is not None:
            found[piece.name] = form
            num_bytes[piece.type_name] = num_bytes.get(piece.type_name, 0) + piece.data.size
    list(_split_latents(file, config))  # refuses what does not fit
    names = sorted(num_bytes, key=lambda name: -num_bytes[name])
    return _Told(config, found, names, file.files)


def _pieces(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[GGUFTensor, _Piece | None]]:
    """The weights in each tensor; None for one that is told otherwise."""
    architecture = config["architectures"][0]
    places = [_place(tensor) for tensor in file.tensors]
    layout = layout_of(architecture, {place.part for place in places})
    arrange = _ARRANGERS.get(architecture, _as_it_is)
    num_experts = 0
    for tensor, place in zip(file.tensors, places, strict=True):
        if place.block is None and place.part in _ROPE_FACTORS:
            yield tensor, None
            continue
        ggml.check(tensor.name, tensor.type_name)
        if place.part in _LATENT_PARTS:
            yield tensor, None
            continue
        name = layout.name(place)
        if name is None or (place.block or 0) >= config["num_hidden_layers"]:
            raise ModelLoadError(
                f"`{shown(tensor.name)}` in `{tensor.file}` has no place in the architecture "
                f"`{architecture}`."
            )
        if "{}" not in name:
            yield tensor, arrange(_whole(tensor, name), place, config)
            continue
        num_experts += tensor.shape[0]
        if num_experts > _MAX_EXPERTS:  # each is an object, however small it is
            raise ModelLoadError(
                f"`{shown(tensor.name)}` in `{tensor.file}` is of shape `{tensor.shape}`; there "
                f"may be `{_MAX_EXPERTS}` matrices of experts in all."
            )
        for piece in _experts(tensor, name):
            yield tensor, arrange(piece, place, config)


def _place(tensor: GGUFTensor) -> Place:
    place = place_of(tensor.name)
    if place is None:
        raise ModelLoadError(
            f"`{shown(tensor.name)}` in `{tensor.file}` is no name of a weight or a bias."
        )
    return place


def _whole(tensor: GGUFTensor, name: str) -> _Piece:
    return _Piece(name, tensor.type_name, tensor.shape, tensor.data)


def _experts(tensor: GGUFTensor, name: str) -> Iterator[_Piece]:
    """A stack of matrices, or of biases, one for each expert."""
    num_dims = 2 if name.endswith(".bias") else 3
    if len(tensor.shape) != num_dims:
        raise ModelLoadError(
            f"`{shown(tensor.name)}` in `{tensor.file}` is of shape `{tensor.shape}`; of experts, "
            f"it must have `{num_dims}` dimensions."
        )
    for number, data in enumerate(tensor.data.reshape(tensor.shape[0], -1)):
        yield _Piece(name.format(number), tensor.type_name, tensor.shape[1:], data)


def _found(piece: _Piece) -> Found:
    """As it is mapped, or what undoes what was done when it is asked for."""
    order = piece.order
    if piece.type_name not in ggml.PLAIN:
        if piece.shift:  # no converter quantizes a norm
            raise ModelLoadError(f"`{shown(piece.name)}` is of type `{piece.type_name}`: a norm.")
        order = order if piece.turn is None else piece.turn.order()
        return ggml.coded(piece.name, piece.type_name, piece.shape, piece.data, order)
    numbers = piece.data.view(_KINDS[piece.type_name]).reshape(piece.shape)
    if piece.turn is not None:
        turned = numbers.reshape(*piece.turn.sizes, *piece.shape[1:]).swapaxes(*piece.turn.axes)
        return CutTensor(piece.name, piece.type_name, piece.shape, turned)
    if piece.is_transposed:
        return CutTensor(piece.name, piece.type_name, piece.shape[::-1], numbers.T)
    plain = StoredTensor(piece.name, piece.type_name, piece.shape, piece.data, True)
    if order is not None:
        data = numbers[order].reshape(-1).view(np.uint8)
        return plain._replace(data=data, is_mapped=False)
    if piece.shift:
        shifted = _numbers(plain) - np.float32(piece.shift)
        data = shifted.reshape(-1).view(np.uint8)
        return plain._replace(dtype="F32", data=data, is_mapped=False)
    return plain


def _numbers(stored: StoredTensor) -> NDArray[np.float32]:
    """The numbers of a plain tensor, in its shape."""
    if stored.dtype == "BF16":
        wide = stored.data.view("<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(stored.shape)
    kind = {"F32": "<f4", "F16": "<f2"}[stored.dtype]
    return stored.data.view(kind).astype(np.float32).reshape(stored.shape)


# What the converter did, by architecture: a piece as the checkpoint has it.

_Arranger = Callable[[_Piece, Place, dict[str, Any]], _Piece]


def _as_it_is(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    return piece


def _halves(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    """Queries and keys whose heads have the two halves of each pair side by side."""
    if place.part not in {"attn_q", "attn_k"}:
        return piece
    key = "num_attention_heads" if place.part == "attn_q" else "num_key_value_heads"
    num_rows, num_heads = piece.shape[0], config[key]
    _check(piece, num_heads and num_rows % (2 * num_heads) == 0, f"`{num_heads}` heads")
    return piece._replace(turn=_Turn((num_heads, num_rows // num_heads // 2, 2), (1, 2)))


def _shifted_norms(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    """Scales of norms that have 1 added."""
    return piece._replace(shift=1.0) if place.part.endswith("norm") else piece


def _conv1d(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    """Matrices of blocks that transformers has as [in, out]."""
    is_matrix = place.block is not None and len(piece.shape) == 2
    return piece._replace(is_transposed=True) if is_matrix else piece


def _by_heads(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    """All queries, all keys, all values; the checkpoint has each head's three together."""
    if place.part != "attn_qkv":
        return piece
    num_heads, num_rows = config["num_attention_heads"], piece.shape[0]
    _check(piece, num_rows % (3 * num_heads) == 0, f"`{num_heads}` heads")
    return piece._replace(turn=_Turn((3, num_heads, num_rows // num_heads // 3), (0, 1)))


def _by_groups(piece: _Piece, place: Place, config: dict[str, Any]) -> _Piece:
    """All queries, all keys, all values; the checkpoint has each KV head's together."""
    if place.part != "attn_qkv":
        return piece
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_kv_heads"]
    num_rows, num_runs = piece.shape[0], num_heads + 2 * num_kv_heads
    is_good = num_kv_heads and num_heads % num_kv_heads == 0 and num_rows % num_runs == 0
    _check(piece, is_good, f"`{num_heads}` and `{num_kv_heads}` heads")
    rows = np.arange(num_rows).reshape(num_runs, num_rows // num_runs)
    queries, keys, values = np.split(rows, [num_heads, num_heads + num_kv_heads])
    queries = queries.reshape(num_kv_heads, num_heads // num_kv_heads, -1)
    groups = np.concatenate([queries, keys[:, None], values[:, None]], axis=1)
    return piece._replace(order=groups.reshape(-1))


def _check(piece: _Piece, is_good: Any, wanted: str) -> None:
    if not is_good:
        raise ModelLoadError(
            f"`{shown(piece.name)}` is of shape `{piece.shape}`, which {wanted} do not divide."
        )


_ARRANGERS: dict[str, _Arranger] = {
    **dict.fromkeys(_INTERLEAVED, _halves),
    **dict.fromkeys(_SHIFTED_NORMS, _shifted_norms),
    "GPT2LMHeadModel": _conv1d,
    "GPTNeoXForCausalLM": _by_heads,
    "FalconForCausalLM": _by_groups,
}


def _split_latents(
    file: GGUFFile, config: dict[str, Any]
) -> Iterator[tuple[str, GGUFTensor, GGUFTensor]]:
    """DeepSeek's maps from the latent up to keys and values, which the file has as two tensors."""
    layout: Layout = layout_of(config["architectures"][0], set())
    by_place = {_place(tensor): tensor for tensor in file.tensors}
    for place, tensor in by_place.items():
        if place.part in _LATENT_PARTS:
            pair = [by_place.get(place._replace(part=part)) for part in sorted(_LATENT_PARTS)]
            name = layout.name(place)
            if name is None or any(one is None or len(one.shape) != 3 for one in pair):
                raise ModelLoadError(
                    f"`{shown(tensor.name)}` in `{tensor.file}` has no place in the architecture "
                    f"`{config['architectures'][0]}`."
                )
            keys, values = pair
            assert keys is not None
            assert values is not None
            if keys.shape[:2] != (values.shape[0], values.shape[-1]):
                raise ModelLoadError(
                    f"`{shown(keys.name)}` and `{shown(values.name)}` in `{keys.file}` are of "
                    f"shapes `{keys.shape}` and `{values.shape}`, which do not fit together."
                )
            if tensor is values:
                yield name, keys, values


def _joined_latent(name: str, keys: GGUFTensor, values: GGUFTensor) -> StoredTensor:
    """One matrix of numbers, [heads * (key + value), rank]: keys are transposed, so no codes."""
    num_heads, rank, key_dim = keys.shape
    joined = np.concatenate([_decoded(keys).swapaxes(1, 2), _decoded(values)], axis=1)
    numbers = np.ascontiguousarray(joined).reshape(-1)
    shape = (num_heads * (key_dim + values.shape[1]), rank)
    return StoredTensor(name, "F32", shape, numbers.view(np.uint8))


def _decoded(tensor: GGUFTensor) -> NDArray[np.float32]:
    """The numbers of a tensor of any type that is read, in its shape."""
    rows = (int(np.prod(tensor.shape[:-1])), tensor.shape[-1])
    found = ggml.tensor(tensor.name, tensor.type_name, rows, tensor.data)
    values = found.values() if isinstance(found, CodedTensor) else _numbers(found)
    return values.reshape(tensor.shape)
