"""The memory plan: its arithmetic, its refusals, and that following a hint helps."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.helpers_backends import FakeBackends

from penstock.engine import memory
from penstock.engine.config import EngineConfig
from penstock.engine.memory import MemoryPlan, available_bytes, check_rank, plan_memory
from penstock.errors import NotEnoughMemory
from penstock.models.device_footprint import GROUP_BYTES
from penstock.models.footprint import NATIVE_BYTES, TORCH_BYTES
from penstock.models.spec import ModelSpec
from penstock.quantization.schemes import packed_bytes, scheme

GIB, MIB = 2**30, 2**20
CHECKPOINT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SPEC = ModelSpec.from_hf(CHECKPOINT)  # TinyLlama: 1,100,048,384 parameters
KV_BYTES = 22 * 2 * 4 * 64 * 2  # a token in bfloat16


def plan(
    available_bytes: int, *, backend: str = "torch", num_gpus: int = 0, **settings: Any
) -> MemoryPlan:
    config = EngineConfig(model="m", backend=backend, **settings)
    resolved = config.resolve(
        max_context_len=SPEC.max_context_len,
        checkpoint_dtype="bfloat16",
        backends=FakeBackends(num_gpus=num_gpus),
    )
    return plan_memory(SPEC, resolved, available_bytes)


def test_the_arithmetic_is_shown() -> None:
    found = plan(64 * GIB)
    assert found.weight_bytes == 2 * 1_100_048_384
    assert found.block_bytes == 16 * KV_BYTES
    assert found.num_blocks == 64 * 2048 // 16, "room for every request at full length"
    assert found.total_bytes == (
        TORCH_BYTES + found.weight_bytes + found.workspace_bytes + found.kv_bytes
    )
    text = "\n".join(found.lines)
    assert "1,100,048,384 parameters x 2 bytes (bfloat16)" in text
    assert f"8,192 blocks x 16 tokens x {KV_BYTES:,} bytes" in text
    assert re.search(r"total +[\d.]+ GiB of +64.00 GiB available", text)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_native_backend_takes_what_it_packs(quantization: str) -> None:
    found = plan(64 * GIB, backend="native", quantization=quantization, kv_cache_dtype="int8")
    linear, table, _ = scheme(quantization, "bfloat16")
    block = [(40 * 64, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    packed = 22 * sum(packed_bytes(linear, *shape) for shape in block)
    packed += 2 * packed_bytes(table, 32_000, 2048)
    assert found.weight_bytes == packed + 4 * 2048 * (2 * 22 + 1)
    assert found.block_bytes == 16 * 22 * 2 * 4 * (64 + 4)
    assert found.total_bytes == (
        NATIVE_BYTES + found.weight_bytes + found.workspace_bytes + found.kv_bytes
    )
    text = "\n".join(found.lines)
    assert f"in {'bfloat16' if quantization == 'none' else quantization}, packed" in text
    assert "bytes (int8)" in text


def test_weights_that_do_not_fit_are_to_be_quantized() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        plan(2 * GIB, backend="native")
    assert "`--quantization int8`" in str(error.value.hint)
    assert plan(2 * GIB, backend="native", quantization="int8").num_blocks


def test_a_pool_that_chooses_its_size_takes_half_of_what_is_left() -> None:
    found = plan(6 * GIB)
    left = 6 * GIB - found.total_bytes + found.kv_bytes
    assert found.num_blocks == left // 2 // found.block_bytes
    tight = plan(found.total_bytes - found.kv_bytes + 2048 * KV_BYTES)
    assert tight.num_blocks == 2048 // 16, "one request, though it is more than half"


def test_a_pool_is_as_large_as_asked() -> None:
    assert plan(6 * GIB, num_blocks=200).num_blocks == 200
    assert plan(6 * GIB, kv_cache_memory_bytes=GIB).num_blocks == GIB // (16 * KV_BYTES)
    assert plan(6 * GIB, max_model_len=17, num_blocks=2).num_blocks == 2


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"num_blocks": 127}, "--num-blocks 128"),
        ({"kv_cache_memory_bytes": 1}, f"--kv-cache-memory-bytes {2048 * KV_BYTES}"),
        ({"num_blocks": 127}, "`--max-model-len` of at most 2032"),
    ],
)
def test_a_pool_smaller_than_one_request(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(NotEnoughMemory, match="too small for one request of `2048`") as error:
        plan(64 * GIB, **settings)
    assert error.value.hint is not None
    assert hint in error.value.hint


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(NotEnoughMemory, match=r"weights +4\.10 GiB") as error:
        plan(4 * GIB, dtype="float32")
    assert "--dtype bfloat16" in str(error.value.hint)
    with pytest.raises(NotEnoughMemory) as error:
        plan(2 * GIB)
    assert "smaller model" in str(error.value.hint)


@given(
    available_bytes=st.integers(1, 12 * GIB),
    pool=st.sampled_from([{}, {"num_blocks": 60_000}, {"kv_cache_memory_bytes": 3 * GIB}]),
    batch=st.sampled_from([64, 2048, 100_000]),
    max_num_seqs=st.sampled_from([1, 64, 1000]),
)
def test_a_plan_fits_or_its_hint_does(
    available_bytes: int, pool: dict[str, int], batch: int, max_num_seqs: int
) -> None:
    settings: dict[str, Any] = {
        "max_num_batched_tokens": batch,
        "max_num_seqs": max_num_seqs,
        **pool,
    }
    try:
        found = plan(available_bytes, **settings)
    except NotEnoughMemory as error:
        hint = error.hint or ""
    else:
        assert found.total_bytes <= available_bytes
        assert found.num_blocks >= 2048 // 16
        return
    named = re.search(r"`--([\w-]+) (\d+)`", hint)
    if named is None:
        assert "lower `--max-num-batched-tokens`" in hint or "smaller model" in hint
        return
    if "leave the size" in hint:
        settings = {name: settings[name] for name in settings if name not in pool}
    settings[named[1].replace("-", "_")] = int(named[2])
    assert plan(available_bytes, **settings).total_bytes <= available_bytes


def on_gpus(available_bytes: int, **settings: Any) -> MemoryPlan:
    return plan(available_bytes, backend="triton", num_gpus=8, **settings)


def test_on_a_gpu_the_pool_takes_all_that_is_left() -> None:
    found = on_gpus(5 * GIB)
    assert found.weight_bytes == 2 * 1_100_048_384 + 4 * 32  # the frequencies of the rotation
    assert 0 <= 5 * GIB - found.total_bytes < found.block_bytes
    assert found.total_bytes == found.kv_bytes + found.block_bytes + sum(
        (found.weight_bytes, found.workspace_bytes, found.runtime_bytes)
    ), "with a block for padding"
    text = "\n".join(found.lines)
    assert re.search(r"total +[\d.]+ GiB of +5.00 GiB available: 0.9 of what is free on the", text)
    assert "CUDA graphs" in text
    assert f"{found.num_blocks:,} + 1 blocks x 16 tokens" in text
    assert on_gpus(200 * GIB).num_blocks == 64 * 2048 // 16, "every request at full length"


def test_without_graphs_there_is_no_memory_for_them() -> None:
    settings = {"num_blocks": 200}
    graphs, eager = on_gpus(16 * GIB, **settings), on_gpus(16 * GIB, enforce_eager=True, **settings)
    assert eager.runtime_bytes < graphs.runtime_bytes
    assert "graphs" not in "\n".join(eager.lines)


def test_bytes_that_are_given_hold_the_block_for_padding() -> None:
    found = on_gpus(16 * GIB, kv_cache_memory_bytes=GIB)
    assert found.kv_bytes + found.block_bytes <= GIB < found.kv_bytes + 2 * found.block_bytes
    needed = 2048 // 16 + 1
    block_bytes = 16 * KV_BYTES
    assert on_gpus(16 * GIB, kv_cache_memory_bytes=needed * block_bytes).num_blocks == needed - 1
    for too_little in (1, needed * block_bytes - 1):
        with pytest.raises(NotEnoughMemory) as error:
            on_gpus(16 * GIB, kv_cache_memory_bytes=too_little)
        assert f"`--kv-cache-memory-bytes {needed * block_bytes}` or more" in str(error.value.hint)


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [
        (0, "    0.00 MiB"),
        (2**30 - 1, " 1024.00 MiB"),
        (5 * 2**30, "    5.00 GiB"),
        (1023 * 2**30, " 1023.00 GiB"),
        (3 * 2**39, "    1.50 TiB"),
        (10**5 * 2**40, "1.00e+05 TiB"),
        (2**80, "1.10e+12 TiB"),
    ],
)
def test_sizes_have_a_column(num_bytes: int, told: str) -> None:
    assert memory._size(num_bytes) == told


def test_each_rank_has_its_share() -> None:
    one, four, eight = (
        on_gpus(16 * GIB, tensor_parallel_size=size, num_blocks=200) for size in (1, 4, 8)
    )
    assert four.block_bytes == one.block_bytes // 4
    assert eight.block_bytes == four.block_bytes, "four heads of keys and values, each held twice"
    assert one.weight_bytes // 4 < four.weight_bytes < one.weight_bytes // 4 * 1.01
    assert four.lines[0] == "ranks      4, each of which takes:"
    assert "parameters in bfloat16, its share of them" in four.lines[1]
    assert "on each GPU" in four.lines[-1]
    assert not any("ranks" in line or "share" in line for line in one.lines)


def test_tried_out_on_a_cpu_it_takes_half_of_what_is_left() -> None:
    found = plan(6 * GIB, backend="triton")
    left = 6 * GIB - found.total_bytes + found.kv_bytes
    assert found.num_blocks == left // 2 // found.block_bytes
    assert "GPU" not in "\n".join(found.lines)


def test_weights_that_do_not_fit_a_gpu() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        on_gpus(2 * GIB)
    assert "`--quantization int8-a16` or `int4-a16`" in str(error.value.hint)
    with pytest.raises(NotEnoughMemory) as error:
        on_gpus(GIB // 2, quantization="fp8")
    assert "`--tensor-parallel-size`" in str(error.value.hint)


def test_the_share_of_a_gpu_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.kernels import gpu

    asked = []

    def memory_bytes(device: object) -> tuple[int, int]:
        asked.append(device)
        return 100 * GIB, 140 * GIB

    monkeypatch.setattr(gpu, "memory_bytes", memory_bytes)
    config = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert available_bytes(config, 0) == 50 * GIB
    assert asked == [gpu.device(0)]
    assert available_bytes(EngineConfig(model="m")) < 2**50, "without: the memory of the machine"
    assert len(asked) == 1


def test_a_rank_whose_gpu_has_less_free_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less by a little, and by what the group has taken, is in the share that is left unused."""
    from penstock.kernels import gpu

    free = {0: 5 * GIB}
    monkeypatch.setattr(gpu, "device", lambda rank: rank)
    monkeypatch.setattr(gpu, "memory_bytes", lambda rank: (free[rank], 5 * GIB))
    config = EngineConfig(
        model="m", backend="triton", tensor_parallel_size=4, max_num_seqs=512
    ).resolve(max_context_len=2048, checkpoint_dtype="bfloat16", backends=FakeBackends(num_gpus=4))
    first = plan_memory(SPEC, config, available_bytes(config, 0))
    assert 0 <= first.available_bytes - first.total_bytes < first.block_bytes
    for less in (0, MIB, 300 * MIB):
        free[1] = 5 * GIB - less
        check_rank(SPEC, config, first.num_blocks, 1)
    needed = first.total_bytes - GROUP_BYTES  # which the group has taken already
    free[2] = needed
    check_rank(SPEC, config, first.num_blocks, 2)
    for less in (1, 10 * first.block_bytes):
        free[2] = needed - less
        with pytest.raises(NotEnoughMemory, match="The GPU of rank `2` has no room") as error:
            check_rank(SPEC, config, first.num_blocks, 2)
        text, hint = str(error.value), str(error.value.hint)
        for line in (
            rf"KV cache +[\d.]+ GiB = {first.num_blocks:,} \+ 1 blocks",
            rf"total +{first.total_bytes / GIB:.2f} GiB: the group has +256.00 MiB of it now",
            rf"free +{free[2] / GIB:.2f} GiB: {less / MIB:.2f} MiB too little",
        ):
            assert re.search(line, text), text
        fits = re.search(r"`--num-blocks (\d+)` or less", hint)
        assert fits, hint
        assert int(fits[1]) == first.num_blocks - -(-less // first.block_bytes)
        check_rank(SPEC, config, int(fits[1]), 2)
    free[2] = first.weight_bytes
    with pytest.raises(NotEnoughMemory) as error:
        check_rank(SPEC, config, first.num_blocks, 2)
    assert error.value.hint == "free memory on the GPU of rank `2`"


def test_ranks_on_the_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 8 * GIB)
    assert available_bytes(EngineConfig(model="m", tensor_parallel_size=4)) == 2 * GIB


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tensor_parallel_size": 2},
        {"num_blocks": 5000},
        {"kv_cache_memory_bytes": 10 * GIB, "max_model_len": 64},
    ],
)
@pytest.mark.parametrize("available", [3 * GIB, 4 * GIB, 12 * GIB])
def test_a_plan_for_gpus_fits_or_its_hint_does(available: int, settings: dict[str, int]) -> None:
    hint = ""
    try:
        assert on_gpus(available, **settings).total_bytes <= available
    except NotEnoughMemory as error:
        hint = error.hint or ""
    if hint:
        name, number = re.findall(r"`--([\w-]+) (\d+)`", hint)[0]
        settings = {**settings, name.replace("-", "_"): int(number)}
        assert on_gpus(available, **settings).total_bytes <= available


def test_the_pool_is_what_was_asked_for() -> None:
    found = plan(64 * GIB, max_model_len=64, num_blocks=5)
    assert found.kv_bytes == 5 * 16 * KV_BYTES


@pytest.mark.parametrize(
    ("max_num_seqs", "logit_rows"), [(64, 256), (1000, 1000)], ids=["prompt", "decode"]
)
def test_the_workspace_is_the_sum_of_its_terms(max_num_seqs: int, logit_rows: int) -> None:
    """By hand for TinyLlama in bfloat16: 1000 tokens a step, a context of 512."""
    settings = {"max_num_batched_tokens": 1000, "max_model_len": 512, "max_num_seqs": max_num_seqs}
    qkv = (32 + 2 * 4) * 64  # one token's query, key and value
    widths = (
        3 * 2048  # the residual, its norm, a block's output
        + 2 * qkv  # as projected, and rotated
        + 3 * 5632  # gate and up, and their product
    )
    row = (
        2 * 4 * 64  # a token's keys and values, gathered
        + 256  # what the queries of a piece see of it
        + 32 * 256  # their scores, by head
    )
    state = 512 * 8 + 32 * 4 + 64  # a request's tokens, its blocks of 16, its settings
    terms = (
        1000 * widths * 2,
        512 * row * 3 // 2 * 2,  # buffers grow by half
        logit_rows * 32_000 * 28,
        max_num_seqs * state,
    )
    assert plan(64 * GIB, **settings).workspace_bytes == sum(terms)
