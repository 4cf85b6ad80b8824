"""Quantized weights come back from disk bit by bit, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from penstock.errors import ConfigError
from penstock.models import native_model, weight_cache
from penstock.models.batch import ForwardBatch
from penstock.models.load import load_model
from penstock.models.weight_cache import directory_of
from penstock.native import library

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
QUANTIZATIONS = ["int8", "int4", "int4-g128"]
# The bytes of all weights of `checkpoint` in the arena. When this differs, LAYOUT_VERSION in
# penstock.models.native_model must become another: what users have kept is not that any more.
LAYOUT = 2
DIGESTS = {
    "int8": "dce3a83fc3f45ed6",
    "int4": "70deb178423670d4",
    "int4-g128": "b0803a99592f818a",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (41, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (41, 64),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        found |= {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
        for name, rows in {"q": 64, "k": 32, "v": 32, "o": 64}.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, 64)
            found[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        found |= {f"{layer}.mlp.{name}_proj.weight": (136, 64) for name in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (64, 136)
    return found


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Numbers that look random and are the same everywhere."""
    path.mkdir(exist_ok=True)
    tensors, first = {}, seed * 10**6
    for name, shape in shapes().items():
        size = int(np.prod(shape))
        mixed = np.arange(first, first + size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        numbers = (mixed >> np.uint64(44)).astype(np.float32) / np.float32(2**20) - np.float32(0.5)
        tensors[name] = numbers.reshape(shape)
        first += size
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / "model.safetensors")
    long_ago = time.time() - 60
    os.utime(path / "model.safetensors", (long_ago, long_ago))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(path: Path, cache: Path | str, quantization: str = "int4") -> native_model.NativeModel:
    """The model, once the cache is written."""
    model = load_model(
        path,
        backend="native",
        dtype="float32",
        quantization=quantization,
        num_slots=32,
        max_num_tokens=8,
        max_num_logit_rows=8,
        num_threads=2,
        weight_cache=str(cache),
    )
    for thread in threading.enumerate():
        if thread.name == "weight-cache":
            thread.join()
    assert isinstance(model, native_model.NativeModel)
    return model


def logits(model: native_model.NativeModel) -> NDArray[np.float32]:
    """Of five tokens."""
    ids = np.arange(1, 6)
    batch = ForwardBatch(
        input_ids=ids,
        positions=ids - 1,
        query_start=np.array([0, 5], np.int32),
        context_len=np.array([5], np.int32),
        slot_mapping=ids,
        block_table=np.arange(32, dtype=np.int32)[None],
        block_size=1,
        logit_rows=ids - 1,
        lengths=[5],
        context_lens=[5],
    )
    model.forward(batch)
    return model.logits(ids - 1).copy()


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, weights can only come from the cache."""

    def forbid(*_: object) -> None:
        raise AssertionError("the checkpoint was read")

    return lambda: monkeypatch.setattr(native_model, "load_weights", forbid)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_was_kept_is_what_was_loaded(
    checkpoint: Path, cache: Path, quantization: str, no_checkpoint: Callable[[], None]
) -> None:
    fresh = logits(load(checkpoint, "off", quantization))
    assert not cache.exists()
    np.testing.assert_array_equal(logits(load(checkpoint, cache, quantization)), fresh)
    no_checkpoint()
    np.testing.assert_array_equal(logits(load(checkpoint, cache, quantization)), fresh)
    # How activations are rounded is no matter of the weights.
    load(checkpoint, cache, f"{quantization}-a16")


def test_only_its_owner_can_read_it(checkpoint: Path, cache: Path) -> None:
    load(checkpoint, cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(list(cache.iterdir())) == 2
    assert {file.stat().st_mode & 0o777 for file in cache.iterdir()} == {0o600}


def flipped(position: int) -> Callable[[Path], None]:
    """Turns over one bit."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position] ^= 16
        file.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "magic": flipped(0),
    "identity": flipped(20),
    "size": flipped(41),
    "checksum": flipped(49),
    "first weight": flipped(4096),
    "last weight": flipped(-1),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 64),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 64),
    "empty": lambda file: os.truncate(file, 0),
    "writable by others": lambda file: file.chmod(0o666),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_not_used_and_is_replaced(
    checkpoint: Path,
    cache: Path,
    damage: Callable[[Path], Any],
    caplog: pytest.LogCaptureFixture,
    no_checkpoint: Callable[[], None],
) -> None:
    fresh = logits(load(checkpoint, cache))
    (kept,) = cache.glob("*.weights")
    damage(kept)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(logits(load(checkpoint, cache)), fresh)
    assert "is not used, and written anew" in caplog.text
    no_checkpoint()
    np.testing.assert_array_equal(logits(load(checkpoint, cache)), fresh)


def test_a_file_under_the_name_of_another_is_not_used(
    tmp_path: Path, checkpoint: Path, cache: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    load(other, cache)
    (theirs,) = cache.glob("*.weights")
    fresh = logits(load(checkpoint, cache))
    (ours,) = set(cache.glob("*.weights")) - {theirs}
    theirs.replace(ours)
    np.testing.assert_array_equal(logits(load(checkpoint, cache)), fresh)


def test_another_checkpoint_at_the_same_path_has_weights_of_its_own(
    checkpoint: Path, cache: Path
) -> None:
    first = logits(load(checkpoint, cache))
    stat = (checkpoint / "model.safetensors").stat()
    write_checkpoint(checkpoint, seed=1)  # of the same size, and made to look as old
    os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = logits(load(checkpoint, cache))
    np.testing.assert_array_equal(second, logits(load(checkpoint, "off")))
    assert not np.array_equal(first, second)
    assert len(list(cache.glob("*.weights"))) == 2


def test_the_same_checkpoint_elsewhere_is_found_and_hashed_once(
    tmp_path: Path,
    checkpoint: Path,
    cache: Path,
    no_checkpoint: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(checkpoint, cache)
    moved = checkpoint.rename(tmp_path / "moved")
    no_checkpoint()
    load(moved, cache)
    monkeypatch.delattr(weight_cache, "_sha256")
    load(moved, cache)


def test_a_file_that_was_just_written_is_not_remembered(checkpoint: Path, cache: Path) -> None:
    os.utime(checkpoint / "model.safetensors")
    load(checkpoint, cache)
    assert [file.suffix for file in cache.iterdir()] == [".weights"]


@pytest.mark.parametrize("index", ["", "[]", "{}", "[[1, 2]]", '[["a"', "[" * 10**5])
def test_a_damaged_index_is_not_used(
    checkpoint: Path, cache: Path, index: str, no_checkpoint: Callable[[], None]
) -> None:
    load(checkpoint, cache)
    (cache / "checkpoints.json").write_text(index)
    no_checkpoint()
    load(checkpoint, cache)


def test_a_checkpoint_that_changes_while_it_is_loaded_is_not_kept(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    really = native_model.load_weights

    def load_and_change(*arguments: Any) -> None:
        really(*arguments)
        os.utime(checkpoint / "model.safetensors")

    monkeypatch.setattr(native_model, "load_weights", load_and_change)
    load(checkpoint, cache)
    assert "has been changed meanwhile" in caplog.text
    assert not list(cache.iterdir())


@pytest.mark.parametrize("is_linked", [False, True])
def test_nor_is_one_whose_digest_was_known(
    tmp_path: Path,
    checkpoint: Path,
    cache: Path,
    is_linked: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else the weights of the new content would be found under the name of the old one."""
    stored = checkpoint / "model.safetensors"
    if is_linked:
        stored.symlink_to(stored.rename(tmp_path / "blob"))
    load(checkpoint, cache)
    assert json.loads((cache / "checkpoints.json").read_bytes())
    (kept,) = cache.glob("*.weights")
    kept.unlink()
    other = write_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    really = native_model.load_weights

    def change_and_load(*arguments: Any) -> None:
        if is_linked:
            stored.unlink()
            stored.symlink_to(other)
        else:
            other.replace(stored)
        really(*arguments)

    monkeypatch.setattr(native_model, "load_weights", change_and_load)
    load(checkpoint, cache)
    assert "has been changed meanwhile" in caplog.text
    assert [file.name for file in cache.iterdir()] == ["checkpoints.json"]


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path,
    checkpoint: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_checkpoint: Callable[[], None],
) -> None:
    load(checkpoint, cache)
    moved = checkpoint.rename(tmp_path / "moved")  # the index does not know it by this name
    no_checkpoint()

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(weight_cache, "_replacing", fail)
    load(moved, cache)


def test_an_interpreter_that_ends_has_kept_the_weights(checkpoint: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from penstock.models.load import load_model;"
        "load_model(Path(sys.argv[1]), backend='native', dtype='float32', quantization='int4',"
        "num_slots=32, max_num_tokens=8, max_num_logit_rows=8, weight_cache=sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(cache)], check=True)
    assert len(list(cache.glob("*.weights"))) == 1
    assert not list(cache.glob(".*.unfinished"))


def test_no_directory_is_a_warning(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    logits(load(checkpoint, tmp_path / "file" / "below"))
    assert "The weights are not kept" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("function", ["posix_fallocate", "open", "fsync", "replace"])
def test_what_cannot_be_written_is_a_warning(
    checkpoint: Path,
    cache: Path,
    number: int,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weight_cache.os, function, fail)
    logits(load(checkpoint, cache))
    assert os.strerror(number) in caplog.text
    assert {file.name for file in cache.iterdir()} <= {"checkpoints.json"}


def test_leftovers_are_removed(checkpoint: Path, cache: Path) -> None:
    cache.mkdir()
    old, new = cache / ".a.unfinished", cache / ".b.unfinished"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    load(checkpoint, cache)
    assert not old.exists()
    assert new.exists()


def test_what_an_older_version_has_kept_is_removed(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_model, "LAYOUT_VERSION", -1)
    load(checkpoint, cache)
    load(checkpoint, cache, "int8")
    before = set(cache.glob("*.weights"))
    monkeypatch.undo()
    load(checkpoint, cache)
    after = set(cache.glob("*.weights"))
    assert len(before) == len(after) == 2
    assert len(before & after) == 1


def test_processes_that_start_at_once(checkpoint: Path, cache: Path) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from tests.models import test_weight_cache;"
        "model = test_weight_cache.load(Path(sys.argv[1]), sys.argv[2]);"
        "print(hashlib.sha256(test_weight_cache.logits(model)).hexdigest())"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(checkpoint), str(cache)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    fresh = hashlib.sha256(logits(load(checkpoint, "off"))).hexdigest()
    assert [start.communicate()[0].strip() for start in starts] == [fresh] * 4
    names = [file.name for file in cache.iterdir()]
    assert len([name for name in names if name.endswith(".weights")]) == 1
    assert not [name for name in names if name.endswith(".unfinished")]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_layout_is_the_one_that_has_this_number(checkpoint: Path, quantization: str) -> None:
    memory = load(checkpoint, "off", quantization)._materials.arena.memory
    found = hashlib.sha256(memory).hexdigest()[:16], native_model.LAYOUT_VERSION
    assert found == (DIGESTS[quantization], LAYOUT), "see DIGESTS"


@pytest.mark.parametrize(
    "settings",
    [{}, {"backend": "torch"}, {"quantization": "int8", "load_format": "dummy"}],
)
def test_one_that_nothing_would_be_kept_in_is_refused(
    checkpoint: Path, cache: Path, settings: dict[str, Any]
) -> None:
    sizes = {"num_slots": 32, "max_num_tokens": 8, "max_num_logit_rows": 8}
    asked: dict[str, Any] = {"backend": "native", "dtype": "float32", **sizes, **settings}
    with pytest.raises(ConfigError, match=f"`weight_cache` is `{cache}`, and nothing would be"):
        load_model(checkpoint, weight_cache=str(cache), **asked)
    assert load_model(checkpoint, weight_cache="off", **asked)


def test_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert directory_of("off") is None
    assert directory_of("/here") == Path("/here")
    monkeypatch.setenv("PENSTOCK_CACHE", "/cache")
    assert directory_of(None) == Path("/cache/weights")
    monkeypatch.setenv("PENSTOCK_CACHE", "here")
    assert directory_of(None) == Path.cwd() / "here/weights"
    monkeypatch.delenv("PENSTOCK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert directory_of(None) == Path("/xdg/penstock/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as its specification has it
    assert directory_of(None) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert directory_of(None) == Path.home() / ".cache/penstock/weights"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # who has no home
    assert directory_of(None) is None
