"""Safetensors files as they come: whole ones are mapped, all others refused by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penstock.errors import ModelLoadError
from penstock.models.safetensors import MAX_HEADER_BYTES, map_tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: Any, body: bytes = bytes(24), length: int | None = None) -> Path:
    """A file of a header, as JSON or as it is, and the bytes that follow it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file = path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + text + body)
    return file


def refusal(file: Path) -> str:
    """The one line that says why a file is not read."""
    with pytest.raises(ModelLoadError) as caught:
        map_tensors(file)
    message = caught.value.message
    assert message.startswith(f"`{file}` cannot be read: ")
    assert "\n" not in message
    assert len(message) < len(str(file)) + 500
    message.encode()  # it can be printed
    assert caught.value.hint is not None
    return message


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    content = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2, 3).bfloat16(),
        "scalar": torch.tensor(4),
        "empty": torch.zeros(0, 9),
        "ключ.weight": torch.randn(1),
    }
    file = tmp_path / "a.safetensors"
    save_file(content, file, metadata={"format": "pt"})
    tensors = map_tensors(file)
    assert {tensor.name for tensor in tensors} == set(content)
    for tensor in tensors:
        assert tensor.data.dtype == np.uint8
        assert tensor.data.ndim == 1
        expected = load_file(file)[tensor.name]
        read = torch.from_numpy(tensor.data).view(DTYPES[tensor.dtype]).view(tensor.shape)
        assert torch.equal(read, expected)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "b": entry("I8", [4], [20, 24]),
        "__metadata__": {"format": "pt"},
        "c": entry("I8", [0], [20, 20]),
        "a": entry("F32", [5], [0, 20]),
    }
    tensors = map_tensors(write(tmp_path, header, bytes(range(24))))
    assert [tensor.name for tensor in tensors] == ["a", "c", "b"]
    assert [tensor.data.tolist() for tensor in tensors] == [
        list(range(20)),
        [],
        list(range(20, 24)),
    ]


def test_a_mapping_outlives_the_file_and_does_not_change_it(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": entry()}, b"\x01" * 24)
    whole = file.read_bytes()
    (tensor,) = map_tensors(file)
    tensor.data[:] = 2
    assert file.read_bytes() == whole
    (tensor,) = map_tensors(file)
    file.unlink()
    assert tensor.data.tolist() == [1] * 24


def test_an_unknown_dtype_is_left_to_the_loader(tmp_path: Path) -> None:
    (tensor,) = map_tensors(write(tmp_path, {"a": entry("F4", [48], [0, 24])}))
    assert (tensor.dtype, tensor.shape, len(tensor.data)) == ("F4", (48,), 24)


def test_no_tensors(tmp_path: Path) -> None:
    assert map_tensors(write(tmp_path, {}, b"")) == []
    assert map_tensors(write(tmp_path, b'{"__metadata__":{}}   ', b"")) == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (entry(offsets=(0, 20)), "`24` bytes; its `data_offsets` give it `20`"),
        (entry(shape=(2, 4)), "`32` bytes; its `data_offsets` give it `24`"),
        (entry("F16"), "`12` bytes; its `data_offsets` give it `24`"),
        (entry("I8", (2**63 - 1,) * 8), "takes"),
        (entry(shape=(), offsets=(0, 4)), "end at byte `4` of its data, which has `24`"),
        (entry(shape=(2**40,), offsets=(0, 2**42)), "ends at byte `4398046511104` of its data"),
        (entry(shape=(7,), offsets=(0, 28)), "`x` ends at byte `28` of its data, which has `24`"),
        (entry(shape=(5,), offsets=(4, 24)), "`x` starts at byte `4`"),
        (entry(shape=(0,), offsets=(8, 8)), "`x` starts at byte `8`"),
        (entry(shape=(0,), offsets=(0, 0)), "end at byte `0` of its data"),
        (entry(offsets=(24, 0)), "`x` has no `data_offsets`"),
        (entry(offsets=(-24, 0)), "`x` has no `data_offsets`"),
        (entry(offsets=(0, 24, 48)), "`x` has no `data_offsets`"),
        (entry(offsets=(0,)), "`x` has no `data_offsets`"),
        (entry(offsets=(0, 24.0)), "`x` has no `data_offsets`"),
        (entry(offsets=(False, 24)), "`x` has no `data_offsets`"),
        (entry(offsets=(0, 2**64)), "`x` has no `data_offsets`"),
        (entry(offsets="ab"), "`x` has no `data_offsets`"),
        (entry(shape=(-2, -3)), "`x` has no `shape`"),
        (entry(shape=(2.0, 3)), "`x` has no `shape`"),
        (entry(shape=("2", 3)), "`x` has no `shape`"),
        (entry(shape=(True, 6)), "`x` has no `shape`"),
        (entry(shape=(2, 3, *[1] * 100_000)), "`x` has no `shape`"),
        (entry(shape=(0, 10**400), offsets=(0, 0)), "`x` has no `shape`"),
        (entry(shape=None), "`x` has no `shape`"),
        (entry(dtype=None), "`x` has no `dtype`"),  # type: ignore[arg-type]
        (entry(dtype=["F32"]), "`x` has no `dtype`"),  # type: ignore[arg-type]
        ({"shape": [2, 3], "data_offsets": [0, 24]}, "`x` has no `dtype`"),
        ([], "`x` is not described by a JSON object"),
        (None, "`x` is not described by a JSON object"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path: Path, told: Any, reason: str) -> None:
    message = refusal(write(tmp_path, {"x": told}))
    assert reason in message
    assert "`x`" in message or "tensors end" in message


def test_overlaps_and_gaps_are_refused(tmp_path: Path) -> None:
    overlap = {"x": entry(shape=(4,), offsets=(0, 16)), "y": entry(shape=(3,), offsets=(12, 24))}
    assert "`y` starts at byte `12`" in refusal(write(tmp_path, overlap))
    same = {"x": entry(), "y": entry()}
    assert "`y` starts at byte `0`" in refusal(write(tmp_path, same))
    gap = {"x": entry(shape=(2,), offsets=(0, 8)), "y": entry(shape=(3,), offsets=(12, 24))}
    assert "`y` starts at byte `12`" in refusal(write(tmp_path, gap))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"x":', "not JSON"),
        (b'{"x": 1} {}', "not JSON"),
        (b'{"\xff": {}}', "not JSON"),
        (b'{"x": ' + b"[" * 100_000, "not JSON"),
        (b'{"x": ' + b'{"a":' * 100_000, "not JSON"),
        (b'{"x": ' + b"9" * 100_000 + b"}", "not JSON"),
        (b'{"x": {}, "x": {}}', "`x` twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "`a` twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F16"}}', "`dtype` twice"),
        (b'{"\\ud800\\n": {}}', "`\\ud800\\n` has no `dtype`"),
        (b'{"' + b"long" * 5000 + b'": {}}', "has no `dtype`"),
        ("{}".encode("utf-16"), "not JSON"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    assert reason in refusal(write(tmp_path, header))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, 10_000, 80])
def test_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    file = write(tmp_path, {"x": entry()}, b"", length)
    assert f"its header is said to be `{length}` bytes long" in refusal(file)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    file = write(tmp_path, {"x": entry(), "y": entry("I8", (1,), (24, 25))}, bytes(25))
    whole = file.read_bytes()
    assert len(map_tensors(file)) == 2
    for num_bytes in range(len(whole)):
        file.write_bytes(whole[:num_bytes])
        refusal(file)
    file.write_bytes(whole + b"\0")
    refusal(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path)
    refusal(tmp_path / "nowhere")


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Whatever the bytes: an error of ours, or tensors that lie within the file."""
    file = write(
        tmp_path_factory.getbasetemp(),
        {"x": entry(), "y": entry("BF16", (1, 4), (24, 32))},
        bytes(32),
    )
    content = bytearray(file.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    file.write_bytes(content)
    try:
        tensors = map_tensors(file)
    except ModelLoadError:
        return
    assert sum(len(tensor.data) for tensor in tensors) == 32


def test_a_file_that_may_not_be_read_is_not_to_be_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, {"a": entry()})

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelLoadError, match="Permission denied") as error:
        map_tensors(file)
    assert "may not read it" in str(error.value.hint)
    assert "download" not in str(error.value.hint)


def test_a_config_without_a_type_takes_that_of_the_weights(tmp_path: Path) -> None:
    """As `--dtype auto` says; GPT-OSS's config has no `dtype`."""
    import torch
    from safetensors.torch import save_file

    from penstock.models.files import read_config

    (tmp_path / "config.json").write_text("{}")
    assert "dtype" not in read_config(tmp_path)
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_config(tmp_path)["dtype"] == "bfloat16"
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    assert "dtype" not in read_config(tmp_path)
