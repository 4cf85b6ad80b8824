"""Tensors as safetensors files give them, and the reading of some of them as one checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.layers.toolkit import StoredTensor
from penstock.quantization.codes import CodedTensor
from penstock.quantization.stored import StoredPrecision, precision_of

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def stored(name: str, value: torch.Tensor | NDArray[Any]) -> StoredTensor:
    """A tensor as a file has it: read-only, and at any address."""
    tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach()
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    data = np.concatenate([np.zeros(1, np.uint8), octets])[1:]
    data.flags.writeable = False
    return StoredTensor(name, NAMES[tensor.dtype], tuple(tensor.shape), data)


def precision(**config: Any) -> StoredPrecision:
    """Of a `quantization_config`."""
    found = precision_of({"quantization_config": config})
    assert found is not None
    return found


def only(reader: StoredPrecision, module: str, **tensors: Any) -> CodedTensor:
    """The one matrix that the tensors of a module are.

    What the config promised of it is checked on the way.
    """
    given = [stored(f"{module}.{name}", value) for name, value in tensors.items()]
    (found,) = reader.join(given)
    assert isinstance(found, CodedTensor)
    assert found.name == f"{module}.weight"
    assert reader.form(found.name, found.shape) == found.form
    assert found.num_bytes == sum(tensor.data.nbytes for tensor in given)
    return found


def same_in_parts(matrix: CodedTensor) -> NDArray[np.float32]:
    """All numbers, after the parts were compared with the whole."""
    whole = matrix.values()
    assert whole.shape == matrix.shape
    assert whole.dtype == np.float32
    num_rows = matrix.shape[0]
    for first, last in ((0, 1), (num_rows // 3, num_rows // 3 + 3), (num_rows - 1, num_rows)):
        first, last = min(first, num_rows), min(last, num_rows)
        np.testing.assert_array_equal(matrix.values(first, last), whole[first:last])
    assert matrix.values(1, 1).shape == (0, matrix.shape[1])
    rows = matrix.rows(0, num_rows)
    assert rows.codes.dtype == np.uint8
    assert rows.codes.size == 0 or rows.codes.max() < 1 << matrix.form.bits
    assert (rows.minima is not None) == matrix.form.has_minima
    return whole


def message_of(error: ModelLoadError) -> str:
    """One line, whatever the input."""
    assert "\n" not in error.message
    assert len(error.message) < 400
    error.message.encode("ascii")
    return error.message
