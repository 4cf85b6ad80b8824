"""EngineConfig: every field described, every wrong value refused, "auto" resolved once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.engine.helpers_backends import FakeBackends

from penstock import builtin
from penstock.engine.config import EngineConfig
from penstock.engine.policy import POLICIES
from penstock.errors import ConfigError
from penstock.hub import resolve_model

SHOWN = [field for field in dataclasses.fields(EngineConfig) if not field.metadata.get("hidden")]


@pytest.mark.parametrize("field", SHOWN, ids=lambda field: field.name)
def test_every_field_tells_its_flag_and_help(field: dataclasses.Field[Any]) -> None:
    assert field.metadata["flag"].startswith("--")
    assert 10 < len(field.metadata["help"]) < 90
    choices = field.metadata["choices"]
    assert choices is None or field.default in choices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int3"),
        ("backend", "mlx"),
        ("quantization", "int5"),
        ("kv_cache_dtype", "int4"),
        ("load_format", "pickle"),
        ("scheduling_policy", "lottery"),
        ("block_size", 0),
        ("block_size", True),
        ("block_size", 1.5),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("long_prefill_token_threshold", -1),
        ("max_model_len", 1),
        ("kv_cache_memory_bytes", 0),
        ("num_blocks", 0),
        ("num_threads", 0),
        ("seed", -1),
        ("kv_cache_memory_bytes", 10**400),
        ("num_blocks", 10**30),
        ("block_size", 2**63),
        ("block_size", None),
        ("num_threads", 1025),
        ("tensor_parallel_size", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.5),
        ("gpu_memory_utilization", float("nan")),
        ("gpu_memory_utilization", True),
        ("attention_backend", "flash"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is `{value!r}`|`{name}` is `{value}`"):
        EngineConfig(model="m", **{name: value})  # type: ignore[arg-type]


def test_the_pool_has_one_size() -> None:
    with pytest.raises(ConfigError, match="`num_blocks` and `kv_cache_memory_bytes`"):
        EngineConfig(model="m", num_blocks=1, kv_cache_memory_bytes=1)


def resolve(
    *,
    checkpoint_dtype: str = "bfloat16",
    backends: FakeBackends = FakeBackends(triton="no GPU"),  # noqa: B008  # nobody changes it
    **settings: Any,
) -> EngineConfig:
    return EngineConfig(model="m", **settings).resolve(
        max_context_len=128, checkpoint_dtype=checkpoint_dtype, backends=backends
    )


@pytest.mark.parametrize(
    ("stored", "on_host", "on_gpu"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float32", "float16"),
        ("float32", "float32", "float32"),
    ],
)
def test_auto_is_what_the_checkpoint_has(stored: str, on_host: str, on_gpu: str) -> None:
    resolved = resolve(checkpoint_dtype=stored)
    assert (resolved.dtype, resolved.max_model_len) == (on_host, 128)
    assert resolved.kv_cache_dtype == on_host
    resolved = resolve(checkpoint_dtype=stored, backends=FakeBackends(num_gpus=1))
    assert (resolved.dtype, resolved.kv_cache_dtype) == (on_gpu, on_gpu)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_on_the_host_nothing_of_a_gpu_is_open(backend: str) -> None:
    resolved = resolve(backend=backend)
    assert resolved.async_scheduling is False
    assert resolved.gpu_memory_utilization is None
    assert (resolved.tensor_parallel_size, resolved.enforce_eager) == (1, False)


def test_on_a_gpu_steps_overlap_and_memory_is_shared_out() -> None:
    one = FakeBackends(num_gpus=1)
    resolved = resolve(backends=one)
    assert (resolved.backend, resolved.async_scheduling) == ("triton", True)
    assert resolved.gpu_memory_utilization == 0.9
    told = {"async_scheduling": False, "gpu_memory_utilization": 0.5, "enforce_eager": True}
    resolved = resolve(backends=one, **told)
    assert {name: getattr(resolved, name) for name in told} == told


def test_on_a_cpu_triton_shares_out_no_gpu_memory() -> None:
    resolved = resolve(backend="triton", backends=FakeBackends(), tensor_parallel_size=4)
    assert (resolved.gpu_memory_utilization, resolved.async_scheduling) == (None, True)
    assert resolved.tensor_parallel_size == 4, "ranks on the CPU, over gloo"


def test_a_kv_cache_of_the_models_own_type_is_no_demand() -> None:
    assert resolve(backend="torch", kv_cache_dtype="bfloat16").kv_cache_dtype == "bfloat16"


def test_policies_are_those_of_the_scheduler() -> None:
    for policy in POLICIES:
        assert EngineConfig(model="m", scheduling_policy=policy).scheduling_policy == policy


def test_given_values_win() -> None:
    given: dict[str, Any] = {"dtype": "float32", "max_model_len": 10, "backend": "torch"}
    given["async_scheduling"] = False
    config = EngineConfig(model="m", **given, kv_cache_dtype="float32")
    assert resolve(**given) == config


def test_a_model_is_not_stretched() -> None:
    with pytest.raises(ConfigError, match="`max_model_len` is `129`, more than the model's `128`"):
        resolve(max_model_len=129)


def test_a_model_is_a_directory_or_built_in(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="neither a directory nor a built-in model"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_directory_of_the_same_name_does_not_hide_a_built_in_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brook").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("brook") == builtin.path("brook")
    assert resolve_model("./brook") == Path("brook")
