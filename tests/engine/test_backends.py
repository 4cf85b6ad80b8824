"""Which backend computes, and that what it has not is refused with something that helps."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engine.helpers_backends import FakeBackends

from penstock.attention import paged
from penstock.engine import backends as table
from penstock.engine.backends import NAMES, choose, passed_over
from penstock.engine.config import DTYPES, KV_CACHE_DTYPES, EngineConfig
from penstock.errors import ConfigError
from penstock.quantization import schemes

ALL = FakeBackends()
GPU = FakeBackends(num_gpus=2)
OFFERS: list[tuple[str, Any, set[str]]] = [  # a setting, a value, and who has it
    ("dtype", "float16", {"triton"}),
    ("dtype", "float32", {"triton", "native", "torch"}),
    ("kv_cache_dtype", "float32", {"triton", "native"}),
    ("kv_cache_dtype", "float16", {"triton"}),
    ("kv_cache_dtype", "int8", {"triton", "native"}),
    ("kv_cache_dtype", "fp8", {"triton"}),
    ("quantization", "int8", {"native"}),
    ("quantization", "int4-g128", {"native"}),
    ("quantization", "int8-a16", {"triton", "native"}),
    ("quantization", "int4-g128-a16", {"triton", "native"}),
    ("quantization", "fp8", {"triton"}),
    ("quantization", "fp8-block", {"triton"}),
    ("tensor_parallel_size", 2, {"triton"}),
    ("enforce_eager", True, {"triton"}),
    ("async_scheduling", True, {"triton"}),
    ("async_scheduling", False, {"triton", "native", "torch"}),
    ("attention_backend", "flashinfer", {"triton"}),
    ("gpu_memory_utilization", 0.5, {"triton"}),
    ("num_threads", 2, {"native", "torch"}),
    ("weight_cache", "/somewhere", {"native"}),
    ("weight_cache", "off", {"triton", "native", "torch"}),
]


def resolve(backends: FakeBackends, **settings: Any) -> EngineConfig:
    return EngineConfig(model="m", **settings).resolve(
        max_context_len=128, checkpoint_dtype="bfloat16", backends=backends
    )


def test_auto_takes_a_gpu_then_the_native_kernels_then_torch() -> None:
    assert choose("auto", GPU) == "triton"
    assert choose("auto", ALL) == "native", "without a GPU Triton is for trying out"
    assert choose("auto", FakeBackends(triton="too old", num_gpus=1)) == "native"
    assert choose("auto", FakeBackends(triton="no GPU", native="no library")) == "torch"


def test_without_a_gpu_nobody_asks_for_triton() -> None:
    """To answer may take the import of torch."""
    machine = FakeBackends()
    assert resolve(machine).backend == "native"
    assert passed_over("auto", "native", machine) == ""
    assert "triton" not in machine.asked


def test_a_wish_of_the_environment_is_not_passed_over() -> None:
    """With a GPU there, what is said to compute on it and cannot be had ends the start."""

    class Wrong(FakeBackends):
        def problem(self, name: str) -> str | None:
            if name == "triton":
                raise ConfigError("`PENSTOCK_KERNELS` is `cutlass`.")
            return None

    for num_gpus in (0, 1):
        with pytest.raises(ConfigError, match="cutlass"):
            choose("auto", Wrong(num_gpus=num_gpus, shows_gpu=True))
    assert choose("auto", Wrong()) == "native"


@pytest.mark.parametrize("name", NAMES)
def test_who_is_asked_for_computes(name: str) -> None:
    assert choose(name, ALL) == name


@pytest.mark.parametrize(("name", "other"), [("native", "torch"), ("triton", "auto")])
def test_who_cannot_is_refused_with_the_reason(name: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`, which cannot be used: a reason") as error:
        choose(name, FakeBackends(**{name: "a reason"}))
    assert f"`--backend {other}`" in str(error.value.hint)
    told = FakeBackends(**{name: "a reason"}, remedies={name: "do this"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        choose(name, told)
    assert error.value.hint == "do this"


def test_why_a_better_backend_was_not_chosen() -> None:
    no_library = FakeBackends(native="no library")
    assert passed_over("auto", "torch", no_library) == "; not native: no library"
    old = FakeBackends(triton="too old", native="no library", shows_gpu=True)
    assert passed_over("auto", "torch", old) == "; not triton: too old; not native: no library"
    assert passed_over("auto", "native", old) == "; not triton: too old"
    assert passed_over("auto", "triton", GPU) == ""


def test_who_chose_for_himself_is_told_nothing() -> None:
    machine = FakeBackends(triton="too old", shows_gpu=True)
    assert passed_over("native", "native", machine) == ""
    assert not machine.asked


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("name", "value", "owners"), OFFERS)
def test_a_setting_is_had_or_refused(backend: str, name: str, value: Any, owners: set[str]) -> None:
    if backend in owners:
        assert getattr(resolve(GPU, backend=backend, **{name: value}), name) == value
        return
    why = "which only the"
    if (backend, name) == ("torch", "kv_cache_dtype"):
        why = "and the torch backend has it as `dtype` only, `bfloat16`"
    with pytest.raises(ConfigError, match=f"`{name}` is `{value}`, {why}") as error:
        resolve(GPU, backend=backend, **{name: value})
    hint = str(error.value.hint)
    named = hint.rpartition("--backend ")[2].rstrip("`")
    assert named in owners
    assert resolve(GPU, backend=named, **{name: value}).backend == named, "the hint helps"


def test_every_value_of_every_choice_has_an_owner() -> None:
    for name, values in (
        ("quantization", schemes.NAMES),
        ("dtype", DTYPES[1:]),
        ("kv_cache_dtype", KV_CACHE_DTYPES[1:]),
    ):
        for value in values:
            owned = [
                backend
                for backend in NAMES
                if value in table.has(backend, "bfloat16").get(name, (value,))
            ]
            assert owned, f"{name} {value}"


def test_a_refusal_says_why_the_owner_would_not_do() -> None:
    with pytest.raises(ConfigError, match="`quantization` is `fp8`, which only") as error:
        resolve(FakeBackends(triton="no GPU"), quantization="fp8")
    assert error.value.hint == "leave it out; triton cannot run here: no GPU"
    with pytest.raises(ConfigError, match="only the backends triton and native have") as error:
        resolve(FakeBackends(triton="no GPU"), backend="torch", quantization="int8-a16")
    assert error.value.hint == "leave it out, or use `--backend native`"
    remedies = {"triton": "buy one"}
    with pytest.raises(ConfigError) as error:
        resolve(FakeBackends(triton="no GPU", remedies=remedies), tensor_parallel_size=2)
    assert error.value.hint == "leave it out; triton cannot run here: no GPU; buy one"


def test_blocks_that_attention_has_not_are_refused() -> None:
    """But by FlashInfer, which is looked at when it is there."""
    assert table.MAX_BLOCK_SIZE == paged.MAX_BLOCK_SIZE
    for attention in ("auto", "triton"):
        assert resolve(GPU, block_size=256, attention_backend=attention).block_size == 256
        with pytest.raises(ConfigError, match="`block_size` is `257`, and attention on") as error:
            resolve(GPU, block_size=257, attention_backend=attention)
        assert error.value.hint == "use `--block-size 256` or less"
    assert resolve(GPU, block_size=512, attention_backend="flashinfer").block_size == 512
    assert resolve(ALL, block_size=512).backend == "native"


def test_ranks_need_a_gpu_each() -> None:
    assert resolve(GPU, tensor_parallel_size=2).tensor_parallel_size == 2
    with pytest.raises(ConfigError, match="is `3`, and the GPUs here are `2`") as error:
        resolve(GPU, tensor_parallel_size=3)
    assert error.value.hint == "use `--tensor-parallel-size 2` or less"


def test_a_share_of_no_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="and there is no GPU"):
        resolve(ALL, backend="triton", gpu_memory_utilization=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization", "fp8"), ("quantization", "fp8-block"), ("kv_cache_dtype", "fp8")],
)
def test_an_older_gpu_has_no_fp8(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is `{value}`, and the A100 is old") as error:
        resolve(FakeBackends(num_gpus=1, fp8="the A100 is old"), **{name: value})
    instead = str(error.value.hint).split("`")[1]
    assert resolve(GPU, **{name: instead})
