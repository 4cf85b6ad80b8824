"""The model of one rank on a device: a decoder of device leaves with its pages and its attention.

Owns the making of these and the loading of weights. Knows neither requests nor rows: a step comes
as tensors that are on the device already.
Invariant: nothing in a forward pass waits for the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from penstock.attention.paged import DeviceBatch, PagedAttention, choose
from penstock.attention.pages import KVPages
from penstock.errors import ConfigError
from penstock.kernels.op import mode
from penstock.layers import shards
from penstock.layers.device_materials import DeviceMaterials, Taken
from penstock.layers.device_toolkit import DeviceToolkit
from penstock.layers.specs import AttentionSpec
from penstock.layers.toolkit import Layer
from penstock.models.blocks import Decoder
from penstock.models.compose import compose
from penstock.models.files import read_config
from penstock.models.load import timed
from penstock.models.loader import DUMMY_STD, LoadFormat, load_weights
from penstock.models.spec import ModelSpec
from penstock.parallel.group import Group
from penstock.quantization.schemes import scheme


class DeviceModel:
    """A decoder whose leaves are those of a `DeviceToolkit`, called from one thread."""

    def __init__(
        self,
        decoder: Decoder,
        materials: DeviceMaterials,
        kv: KVPages,
        attention: PagedAttention,
    ) -> None:
        self.spec = decoder.spec
        self.decoder = decoder
        self.dtype = materials.dtype
        self.device = materials.device
        self.kv = kv
        self.attention = attention
        self._group = materials.group

    @property
    def description(self) -> str:
        """The backend and what it runs on, for people."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type} ({mode()})"
        ranks = f", {self._group.size} ranks" if self._group.size > 1 else ""
        return f"triton, {name}{ranks}, {self.attention.name} attention"

    def forward(self, batch: DeviceBatch) -> torch.Tensor:
        """Compute all tokens of the batch and write their keys and values.

        Returns:
            Hidden states [T, hidden]; `logits` takes those that are asked for.
        """
        batch.meta = self.attention.plan(batch)
        hidden: torch.Tensor = self.decoder.forward(batch)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, [L, V], of hidden states [L, hidden].

        In the model's dtype and on every rank; rows may be padded in memory.
        """
        logits: torch.Tensor = self.decoder.logits(hidden)
        return logits


def load(
    path: Path,
    *,
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    num_blocks: int,
    block_size: int,
    group: Group,
    device: torch.device,
    attention_backend: str,
    load_format: LoadFormat,
    seed: int,
    phases: dict[str, float],
) -> DeviceModel:
    """Build this rank's share of the model of a directory, load its weights and make its pages.

    Args:
        dtype: of activations, and of weights without quantization: float32, bfloat16, float16.
        quantization: a name in `penstock.quantization.schemes`.
        kv_cache_dtype: one of `penstock.attention.pages.PAGE_DTYPES`.
        num_blocks: that requests may use.
        block_size: tokens in a block.
        group: the ranks; each calls this with the same arguments but for `device`.
        attention_backend: "auto" or the name of one.
        load_format: "dummy" reads config.json only and draws the weights, on the device.
        seed: of these.
        phases: takes the seconds of "kv" and "load".

    Raises:
        UnsupportedModel: the config asks for what is not implemented.
        WeightMismatch: weights are missing, unexpected, misshapen or contradictory.
        ModelLoadError: a file is missing, damaged or of a kind that is not read.
        ConfigError: no attention can serve the model so, or the ranks cannot share it.
    """
    spec = ModelSpec.from_hf(read_config(path))
    heads = shards.heads(spec.num_heads, spec.num_kv_heads, group.size)
    attention = choose(
        attention_backend, Share(*heads, spec.head_dim), kv_cache_dtype, block_size, device
    )
    check_attention(spec, attention.name)
    with timed(phases, "load"), torch.inference_mode():
        materials = DeviceMaterials(
            getattr(torch, dtype), device, group, scheme(quantization, dtype)
        )
        decoder = compose(spec, DeviceToolkit(materials))
        layers = list(decoder.layers())
        if load_format == "dummy":
            _draw(layers, seed, materials)
        else:
            load_weights(layers, path, names=spec.names)
        if device.type == "cuda":  # what drawing and quantizing took is planned for the pages
            torch.cuda.empty_cache()
    with timed(phases, "kv"):
        kv = KVPages(
            spec.num_layers,
            num_blocks,
            block_size,
            heads.num_kv_heads,
            spec.head_dim,
            kv_cache_dtype,
            device,
        )
    return DeviceModel(decoder, materials, kv, attention)


def check_attention(spec: ModelSpec, name: str) -> None:
    """Refuse an attention backend that has not what the layers of a model ask for.

    Raises:
        ConfigError: it says what.
    """
    has_sinks = any(
        isinstance(layer.attention, AttentionSpec) and layer.attention.has_sinks
        for layer in spec.layers
    )
    if has_sinks and name != "triton":
        raise ConfigError(
            f"`attention_backend` is `{name}`, which has no attention sinks, and this model has.",
            hint="use `--attention-backend triton`",
        )


class Share(NamedTuple):
    """Implements `AttentionShape`: the heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def _draw(layers: Iterable[Layer], seed: int, materials: DeviceMaterials) -> None:
    """Random matrices, each from its own name: ranks draw the same and keep their shares.

    On the device, because the host would take minutes for billions of numbers.
    """
    for layer in layers:
        for weight in layer.weights():
            if len(weight.shape) > 1 and weight.duplicate_of is None:
                generator = torch.Generator(materials.device)
                # Of a seed, generators of a CPU take 32 bits.
                generator.manual_seed(zlib.crc32(f"{seed} {weight.name}".encode()))
                drawn = torch.randn(
                    weight.shape,
                    generator=generator,
                    dtype=materials.dtype,
                    device=materials.device,
                )
                assert isinstance(weight.load, Taken), "a leaf of another toolkit"
                weight.load.take(weight.name, drawn.mul_(DUMMY_STD))
        layer.finish()
