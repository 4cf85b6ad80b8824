"""Quantized checkpoints of Hugging Face models: from the config and the tensors to coded matrices.

Owns which format a config names. Knows none of them: each is a file of this package. Imports no
torch.

Invariant: the form of a weight follows from the config alone, before a file is read, so that memory
can be planned; what is in the files is checked against it. A format, or a value in its part of the
config, that is not implemented is refused by the name of its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from penstock.quantization.awq import Awq
from penstock.quantization.codes import CodeForm, Found, StoredTensor
from penstock.quantization.compressed import Compressed
from penstock.quantization.fp8 import Fp8
from penstock.quantization.gptq import Gptq
from penstock.quantization.modules import Keys
from penstock.quantization.mxfp4 import Mxfp4
from penstock.quantization.nf4 import BitsAndBytes


class StoredPrecision(Protocol):
    """How the weights of a checkpoint are stored."""

    @property
    def name(self) -> str:
        """For people: "GPTQ, 4 bits in groups of 128"."""

    @property
    def activation_bits(self) -> int:
        """8: the checkpoint asks for activations of 8-bit integers, found as they come; else 16."""

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of the weight `name` ("model.layers.0.self_attn.q_proj.weight"), [N, K].

        None: it is stored plainly. Where a config leaves open which modules are quantized, this
        is what the tools that write such checkpoints do; the files may differ, and `join` tells.
        """

    def join(self, tensors: Sequence[StoredTensor]) -> list[Found]:
        """All tensors of a checkpoint, where those of a coded module are one named "....weight".

        Only shapes, types and what is small is read; numbers when `CodedTensor.rows` is called,
        which can raise ModelLoadError as well.

        Raises:
            ModelLoadError: a tensor of a coded module is missing or is not what it must be.
        """


_METHODS: dict[str, Callable[[Keys], StoredPrecision]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": Compressed,
    "fp8": Fp8,
    "gptq": Gptq,
    "mxfp4": Mxfp4,
}


def precision_of(config: Mapping[str, Any]) -> StoredPrecision | None:
    """How the weights of the model with this config.json are stored; None: plainly.

    Raises:
        UnsupportedModel: in a format, or with a value, that is not implemented.
    """
    for section in ("quantization_config", "compression_config"):
        keys = Keys(config, "").part(section)
        if keys is None or not keys.config:
            continue
        default = "compressed-tensors" if section == "compression_config" else None
        if keys.config.get("load_in_4bit") or keys.config.get("load_in_8bit"):
            default = "bitsandbytes"  # configs of 2023 name no method
        return _METHODS[keys.choice("quant_method", _METHODS, default)](keys)
    return None
