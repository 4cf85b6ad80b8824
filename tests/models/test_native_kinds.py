"""Every kind of model: the native toolkit records what the torch toolkit computes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.models.helpers import MAX_BLOCK_SIZE, MAX_TOKENS, NUM_BLOCKS, Sessions
from tests.models.kinds import KINDS, Coded, fill

from penstock.attention.kv_store import KVStore
from penstock.attention.reference import ReferenceAttention
from penstock.layers.materials import Materials
from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.layers.torch_toolkit import TorchToolkit
from penstock.models.batch import ForwardBatch
from penstock.models.compose import compose
from penstock.models.native_model import NativeModel
from penstock.models.spec import ModelSpec
from penstock.models.torch_model import TorchModel
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.quantization.codes import CodeForm
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import scheme

pytestmark = [
    pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native library here"),
    pytest.mark.usefixtures("batch_invariant_isa"),
]

FORMS = [
    CodeForm("int8", 16),
    CodeForm("nf4", 32, "float16"),
    CodeForm("uint4", 32, "int8", has_minima=True),  # Q4_K of ggml
]
NUM_SLOTS = NUM_BLOCKS * MAX_BLOCK_SIZE
LEN = 37
IDS = np.random.default_rng(1).integers(0, 67, (2, LEN)).tolist()


def on_torch(spec: ModelSpec, precision: Coded | None = None) -> TorchModel:
    with torch.inference_mode():
        decoder = compose(spec, TorchToolkit(Materials(torch.float32)))
        fill(decoder, precision)
    kv = KVStore(spec.num_layers, NUM_SLOTS, *spec.cached, torch.float32)
    return TorchModel(decoder, kv, ReferenceAttention())


def on_native(
    spec: ModelSpec,
    dtype: str = "float32",
    quantization: str = "none",
    num_threads: int = 2,
    precision: Coded | None = None,
) -> NativeModel:
    materials = NativeMaterials(
        program=Program(Pool(library.load(), num_threads), MAX_TOKENS, MAX_TOKENS),
        arena=Arena(),
        dtype=dtype,
        formats=Formats(scheme(quantization, dtype), precision),
        kv=KVMemory(spec.num_layers, NUM_SLOTS, *spec.cached, dtype),
    )
    decoder = compose(spec, NativeToolkit(materials))
    fill(decoder, precision)
    return NativeModel(decoder, materials)


class Steps(NamedTuple):
    """What two rows of tokens are cut into."""

    steps: list[dict[str, tuple[int, int]]]

    def of(self, model: TorchModel | NativeModel) -> dict[str, torch.Tensor]:
        """Logits of every token by row, [LEN, V]; of an encoder hidden states, [LEN, hidden]."""
        sessions = Sessions(model, block_size=3)
        rows = dict(zip("ab", IDS, strict=True))
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
        for step in self.steps:
            work = {name: rows[name][first:last] for name, (first, last) in step.items()}
            if model.spec.is_encoder:
                batch = sessions.batch(work)
                model.forward(batch)
                found = dict(
                    zip(work, torch.split(hidden(model, batch), batch.lengths), strict=True)
                )
            else:
                found = sessions.step(work)
            for name, part in found.items():
                parts[name].append(part)
        return {name: torch.cat(pieces) for name, pieces in parts.items()}


WHOLE = Steps([{"a": (0, LEN)}, {"b": (0, LEN)}])
TOGETHER = Steps([{"b": (0, LEN), "a": (0, LEN)}])
RAGGED = Steps(
    [
        {"a": (0, 9)},
        {"b": (0, 20), "a": (9, 10)},
        {"a": (10, 11), "b": (20, 21)},
        {"b": (21, LEN), "a": (11, 30)},
        *({"a": (index, index + 1)} for index in range(30, LEN)),
    ]
)


def hidden(model: TorchModel | NativeModel, batch: ForwardBatch) -> torch.Tensor:
    if isinstance(model, TorchModel):
        return model._hidden
    values = model.program.view(model._hidden)[: len(batch.input_ids)].copy()
    return torch.from_numpy(values)


def cuts(spec: ModelSpec) -> list[Steps]:
    """An encoder sees its whole text at once."""
    return [WHOLE, TOGETHER] if spec.is_encoder else [WHOLE, TOGETHER, RAGGED]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_what_torch_computes(kind: str) -> None:
    spec = KINDS[kind]
    expected = WHOLE.of(on_torch(spec))
    model = on_native(spec)
    for steps in cuts(spec):
        for name, found in steps.of(model).items():
            spread = expected[name].std()
            assert spread > 0.1  # outputs that hardly vary would agree with anything
            assert (found - expected[name]).abs().max() < 1e-4 * max(1.0, spread.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.code)
def test_codes_are_what_torch_takes_them_for(kind: str, form: CodeForm) -> None:
    spec = KINDS[kind]
    precision = Coded(form, spec.names.is_transposed)
    expected = WHOLE.of(on_torch(spec, precision))
    model = on_native(spec, precision=precision)
    for steps in cuts(spec):
        for name, found in steps.of(model).items():
            spread = expected[name].std()
            assert spread > 0.1
            assert (found - expected[name]).abs().max() < 2e-4 * max(1.0, spread.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "quantization", "bound"),
    [("bfloat16", "none", 0.05), ("float32", "int8", 0.1), ("bfloat16", "int8-a16", 0.1)],
)
def test_a_row_is_the_same_in_any_batch(
    kind: str, dtype: str, quantization: str, bound: float
) -> None:
    """To the last bit, on one thread or two; and near what torch computes in float32."""
    spec = KINDS[kind]
    models = [on_native(spec, dtype, quantization, num_threads) for num_threads in (1, 2)]
    expected, exact = WHOLE.of(models[0]), WHOLE.of(on_torch(spec))
    for model in models:
        for steps in cuts(spec):
            for name, found in steps.of(model).items():
                assert torch.equal(found, expected[name])
    for name in exact:
        # Of a token whose experts are others than in float32, everything is: the median.
        error = (expected[name] - exact[name]).square().mean(1).sqrt().median() / exact[name].std()
        assert 1e-4 < error < bound, error
