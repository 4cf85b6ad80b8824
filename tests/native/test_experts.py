"""The mixture of experts through ctypes against transformers' own layers.

Routing, activations and shared parts are those of Mixtral, Qwen2-MoE, DeepSeek-V3 and GPT-OSS, with
random weights. `csrc/tests/test_experts.cpp` holds the op itself to an oracle in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ops_oracle as oracle
import pytest
import torch
import transformers
from numpy.typing import NDArray
from ops_program import F32, MAX_TOKENS, get, put, step_of
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from penstock.errors import EngineError
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.native.structs import Activation, ExpertsArgs, Isa, OpKind, Scoring
from penstock.native.weights import PackedWeight, Placement, padded_rows
from penstock.quantization.schemes import Format

HIDDEN, SIZE = 72, 40


@dataclass
class Layer:
    """What the op needs of one layer: gate, up [E, SIZE, HIDDEN] and down [E, HIDDEN, SIZE]."""

    gate: F32
    up: F32
    down: F32
    arguments: dict[str, Any]
    gate_bias: F32 | None = None
    up_bias: F32 | None = None
    down_bias: F32 | None = None
    correction: F32 | None = None
    held: list[Any] = field(default_factory=list)  # memory that pointers point into


def numbers(tensor: torch.Tensor) -> F32:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def pack_all(pool: Pool, parts: list[F32], dtype: str, held: list[Any]) -> PackedWeight:
    """The matrices of all experts one after the other, `parts` interleaved by panels."""
    num_experts, num_rows, num_columns = parts[0].shape
    step = len(parts)
    per_expert = step * padded_rows(num_rows)
    shape = num_experts * per_expert, num_columns
    weight = PackedWeight(pool, Format(dtype), *shape, Arena())
    for index, part in enumerate(parts):
        for expert in range(num_experts):
            source = np.ascontiguousarray(part[expert]).view(np.uint8).reshape(-1)
            place = Placement(expert * per_expert + index * 16, step)
            weight.pack(source, "float32", num_rows, place)
    held.append(weight)
    return weight


def spread(parts: list[F32], held: list[Any]) -> int:
    """Biases [E, rows] where the rows of `pack_all` lie; their address."""
    num_experts, num_rows = parts[0].shape
    per_expert = len(parts) * padded_rows(num_rows)
    values = np.zeros(num_experts * per_expert, np.float32)
    for index, part in enumerate(parts):
        for expert in range(num_experts):
            place = Placement(expert * per_expert + index * 16, len(parts))
            values[place.rows(num_rows)] = part[expert]
    held.append(values)
    return values.ctypes.data


def run(
    pool: Pool,
    layer: Layer,
    dtype: str,
    x: F32,
    logits: F32,
    shared: F32 | None = None,
    shared_gate: F32 | None = None,
) -> F32:
    """y [T, HIDDEN] of the op."""
    num_tokens, num_experts = logits.shape
    program = Program(pool, MAX_TOKENS, 1)
    inputs = {"x": (x, dtype), "logits": (logits, "float32")}
    if shared is not None:
        inputs["shared"] = shared, dtype
    if shared_gate is not None:
        inputs["shared_gate"] = shared_gate, dtype
    values = {name: program.value(array.shape[1], d) for name, (array, d) in inputs.items()}
    y = program.value(HIDDEN, dtype)
    args = ExpertsArgs(
        gate_up=pack_all(pool, [layer.gate, layer.up], dtype, layer.held).struct,
        down=pack_all(pool, [layer.down], dtype, layer.held).struct,
        x_stride=HIDDEN,
        logits_stride=num_experts,
        shared_stride=HIDDEN,
        shared_gate_stride=1,
        y_stride=HIDDEN,
        num_experts=num_experts,
        in_size=HIDDEN,
        size=SIZE,
        activation_bits=16,
        dtype=y.dtype_id,
        **{"num_expert_groups": 1, "activation": Activation.SILU, "routed_scale": 1.0}
        | layer.arguments,
    )
    if layer.gate_bias is not None and layer.up_bias is not None:
        args.gate_up_bias = spread([layer.gate_bias, layer.up_bias], layer.held)
    if layer.down_bias is not None:
        args.down_bias = spread([layer.down_bias], layer.held)
    if layer.correction is not None:
        args.correction = layer.correction.ctypes.data
    program.append(OpKind.EXPERTS, args, y=y, **values)
    part = program.end_part()
    program.finish()
    for name, (array, _) in inputs.items():
        put(program, values[name], array)
    program.set_step(step_of(num_tokens))
    program.run(part)
    return get(program, y, num_tokens)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights such that outputs are about 1 and routers decide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
            scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def halves(joined: torch.Tensor) -> tuple[F32, F32]:
    """Gate and up of gate_up_proj [E, 2 * SIZE, HIDDEN]."""
    gate, up = joined.chunk(2, dim=1)
    return numbers(gate), numbers(up)


CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
}
Made = tuple[torch.nn.Module, Layer, Callable[[torch.Tensor], dict[str, torch.Tensor]]]


def mixtral() -> Made:
    config = transformers.MixtralConfig(**CONFIG, intermediate_size=SIZE, num_local_experts=8)
    block = MixtralSparseMoeBlock(config)
    randomize(block, 1)
    gate, up = halves(block.experts.gate_up_proj)
    arguments = {"top_k": 3, "scoring": Scoring.SOFTMAX, "normalise": 1}
    layer = Layer(gate, up, numbers(block.experts.down_proj), arguments)
    return block, layer, lambda x: {"logits": block.gate(x)[0]}


def qwen2_moe() -> Made:
    config = transformers.Qwen2MoeConfig(
        **CONFIG,
        moe_intermediate_size=SIZE,
        shared_expert_intermediate_size=56,
        num_experts=10,
        norm_topk_prob=False,
    )
    block = Qwen2MoeSparseMoeBlock(config)
    randomize(block, 2)
    gate, up = halves(block.experts.gate_up_proj)
    arguments = {"top_k": 3, "scoring": Scoring.SOFTMAX}
    layer = Layer(gate, up, numbers(block.experts.down_proj), arguments)
    return (
        block,
        layer,
        lambda x: {
            "logits": block.gate(x)[0],
            "shared": block.shared_expert(x),
            "shared_gate": block.shared_expert_gate(x),
        },
    )


def deepseek_v3() -> Made:
    config = transformers.DeepseekV3Config(
        **CONFIG,
        moe_intermediate_size=SIZE,
        n_routed_experts=16,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    block = DeepseekV3MoE(config)
    randomize(block, 3)
    gate, up = halves(block.experts.gate_up_proj)
    arguments = {
        "top_k": 3,
        "scoring": Scoring.SIGMOID,
        "normalise": 1,
        "num_expert_groups": 4,
        "top_groups": 2,
        "group_top": 2,
        "routed_scale": 2.5,
    }
    correction = numbers(block.gate.e_score_correction_bias)
    layer = Layer(gate, up, numbers(block.experts.down_proj), arguments, correction=correction)
    return (
        block,
        layer,
        lambda x: {"logits": block.gate(x)[0], "shared": block.shared_experts(x)},
    )


def gpt_oss() -> Made:
    config = transformers.GptOssConfig(**CONFIG, intermediate_size=SIZE, num_local_experts=9)
    block = GptOssMLP(config)
    randomize(block, 4)
    experts = block.experts
    with torch.no_grad():
        experts.gate_up_proj_bias.mul_(15)  # some beyond the clipping at 7
    joined = experts.gate_up_proj.transpose(1, 2)
    layer = Layer(
        numbers(joined[:, ::2]),
        numbers(joined[:, 1::2]),
        numbers(experts.down_proj.transpose(1, 2)),
        {
            "top_k": 3,
            "scoring": Scoring.SOFTMAX_CHOSEN,
            "activation": Activation.SWIGLU_OAI,
        },
        gate_bias=numbers(experts.gate_up_proj_bias[:, ::2]),
        up_bias=numbers(experts.gate_up_proj_bias[:, 1::2]),
        down_bias=numbers(experts.down_proj_bias),
    )
    return block, layer, lambda x: {"logits": block.router(x)[0]}


@pytest.mark.parametrize("num_tokens", [1, 4, MAX_TOKENS])
@pytest.mark.parametrize("make", [mixtral, qwen2_moe, deepseek_v3, gpt_oss])
def test_as_transformers(pool: Pool, isa: Isa, make: Callable[[], Made], num_tokens: int) -> None:
    block, layer, inputs_of = make()
    x = torch.randn(1, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    with torch.no_grad():
        expected = block(x)
        inputs = {name: numbers(value) for name, value in inputs_of(x[0]).items()}
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = run(pool, layer, "float32", numbers(x[0]), **inputs)
    np.testing.assert_allclose(found, numbers(expected[0]), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("make", [mixtral, qwen2_moe])
def test_in_bfloat16(pool: Pool, isa: Isa, make: Callable[[], Made]) -> None:
    """Weights and rows in bfloat16, sums in float: near the same layer in float32."""
    block, layer, inputs_of = make()
    x = torch.randn(1, 20, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    with torch.no_grad():
        for parameter in block.experts.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = numbers(block(x)[0])
        inputs = {name: numbers(value) for name, value in inputs_of(x[0]).items()}
    found = run(pool, layer, "bfloat16", numbers(x[0]), **inputs)
    assert np.abs(found - expected).max() < 0.02 * max(1.0, np.abs(expected).max())


def test_ties_take_the_lower_index(pool: Pool, isa: Isa) -> None:
    """Every expert scores the same: the first two are chosen, half of each."""
    rng = np.random.default_rng(1)
    gate, up = rng.standard_normal((2, 6, SIZE, HIDDEN), np.float32) / 8
    down = rng.standard_normal((6, HIDDEN, SIZE), np.float32) / 8
    layer = Layer(gate, up, down, {"top_k": 2, "scoring": Scoring.SOFTMAX, "normalise": 1})
    x = rng.standard_normal((5, HIDDEN)).astype(np.float32)
    found = run(pool, layer, "float32", x, np.zeros((5, 6), np.float32))
    parts: list[NDArray[np.float64]] = [
        oracle.silu(x.astype(np.float64) @ gate[e].T) * (x @ up[e].T) @ down[e].T for e in (0, 1)
    ]
    np.testing.assert_allclose(found, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_routed_is_told(pool: Pool) -> None:
    _, layer, _ = mixtral()
    layer.arguments["top_k"] = 9
    x = np.zeros((1, HIDDEN), np.float32)
    with pytest.raises(EngineError, match="experts"):
        run(pool, layer, "float32", x, np.zeros((1, 8), np.float32))
