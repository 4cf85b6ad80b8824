"""EngineConfig: every field described, every wrong value refused, "auto" resolved once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from penstock import builtin
from penstock.builtin import resolve_model
from penstock.engine.config import EngineConfig
from penstock.engine.policy import POLICIES
from penstock.errors import ConfigError


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda field: field.name)
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
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is `{value!r}`|`{name}` is `{value}`"):
        EngineConfig(model="m", **{name: value})  # type: ignore[arg-type]


def test_the_pool_has_one_size() -> None:
    with pytest.raises(ConfigError, match="`num_blocks` and `kv_cache_memory_bytes`"):
        EngineConfig(model="m", num_blocks=1, kv_cache_memory_bytes=1)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")],
)
def test_auto_is_what_the_checkpoint_has(stored: str, computed: str) -> None:
    resolved = resolve(checkpoint_dtype=stored)
    assert (resolved.dtype, resolved.max_model_len) == (computed, 128)
    assert resolved.kv_cache_dtype == computed


def resolve(
    *, checkpoint_dtype: str = "bfloat16", native_problem: str | None = None, **settings: Any
) -> EngineConfig:
    return EngineConfig(model="m", **settings).resolve(
        max_context_len=128, checkpoint_dtype=checkpoint_dtype, native_problem=native_problem
    )


def test_the_backend_is_native_where_it_can_be() -> None:
    assert resolve().backend == "native"
    assert resolve(native_problem="no library").backend == "torch"
    assert resolve(backend="torch").backend == "torch"
    with pytest.raises(ConfigError, match="cannot be used: no library"):
        resolve(backend="native", native_problem="no library")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "int8"),
        ("quantization", "int4-g128-a16"),
        ("kv_cache_dtype", "int8"),
        ("kv_cache_dtype", "float32"),
    ],
)
def test_what_torch_has_not_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is `{value}`, which only") as error:
        resolve(backend="torch", **{name: value})
    assert error.value.hint == "leave it out, or leave out `--backend torch`"
    with pytest.raises(ConfigError) as error:
        resolve(native_problem="no library", **{name: value})
    assert "no library" in str(error.value.hint)
    assert getattr(resolve(**{name: value}), name) == value


def test_a_kv_cache_of_the_models_own_type_is_no_demand() -> None:
    assert resolve(backend="torch", kv_cache_dtype="bfloat16").kv_cache_dtype == "bfloat16"


def test_policies_are_those_of_the_scheduler() -> None:
    for policy in POLICIES:
        assert EngineConfig(model="m", scheduling_policy=policy).scheduling_policy == policy


def test_given_values_win() -> None:
    given = {"dtype": "float32", "max_model_len": 10, "backend": "torch"}
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
