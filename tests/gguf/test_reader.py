"""GGUF files as they come: whole ones are mapped, all others refused by name and at once."""

from __future__ import annotations

import functools
import math
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gguf.files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf,
    info,
    key,
    small,
    string,
    write,
)

from gguf import GGUFReader, GGUFWriter
from penstock.errors import ModelLoadError
from penstock.gguf import header
from penstock.gguf.metadata import Metadata
from penstock.gguf.reader import GGUFFile, is_gguf, open_gguf
from penstock.gguf.types import TENSOR_TYPES

MAX_S = 2.0


def refusal(file: Path) -> str:
    """The one line that says why a file is not read."""
    with pytest.raises(ModelLoadError) as caught:
        open_gguf(file)
    message = caught.value.message
    assert str(file) in message
    assert "\n" not in message.replace(str(file), "")
    assert len(message) < len(str(file)) + 500
    message.encode()  # it can be printed
    return message


def test_types_are_those_of_the_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    known = {
        kind.value: (kind.name, sizes[0], sizes[1]) for kind, sizes in GGML_QUANT_SIZES.items()
    }
    assert {number: tuple(kind) for number, kind in TENSOR_TYPES.items()} == known


def test_a_small_file(tmp_path: Path) -> None:
    found = open_gguf(write(tmp_path, small()))
    assert list(found.metadata)[:5] == ["general.architecture", "u8", "f32", "yes", "i64"]
    told = found.metadata
    assert (told["u8"], told["yes"], told["i64"]) == (7, True, -5)
    assert told["f32"] == pytest.approx(0.1)
    assert type(told["yes"]) is bool
    assert told["tokens"] == ["a", "ключ", ""]
    assert told["scores"].tolist() == [0.5, -1.0]
    assert told["flags"].tolist() == [False, True]
    assert [part.tolist() for part in told["deep"]] == [[1, 2], []]
    first, second = found.tensors
    assert (first.name, first.type_name, first.shape) == ("a.weight", "Q8_0", (2, 32))
    assert first.data.tobytes() == bytes(range(68))
    assert (second.shape, second.data.view("<f4").tolist()) == ((3,), [1, 2, 3])


def test_strings_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    strings = ["a" * 3_000_000, "", "ключ" * 300_000, *["b" * 1000] * 3000, "é" * 600_000]
    file = write(tmp_path, gguf([key("a", ARRAY, (STRING, strings)), key("b", U8, 5)], []))
    assert open_gguf(file).metadata == {"a": strings, "b": 5}


def test_mapping_is_private(tmp_path: Path) -> None:
    file = write(tmp_path, small())
    open_gguf(file).tensors[0].data[:] = 0
    assert file.read_bytes() == small()


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """It is mapped, whatever its size; nothing of it is read but the header."""
    rows = 2**29  # two terabytes, of which the disk holds one block
    file = write(tmp_path, gguf([], [info("a", [1024, rows])]))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + 4096 * rows)
    [tensor] = open_gguf(file).tensors
    assert tensor.shape == (rows, 1024)
    assert not tensor.data[-4096:].any()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_what_the_package_writes(tmp_path: Path, version: int, alignment: int | None) -> None:
    file = tmp_path / "a.gguf"
    writer = GGUFWriter(file, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_description("ключ \U0001f511")
    writer.add_token_list(["<s>", "\u2581a"])
    writer.add_rope_freq_base(10000.0)
    generator = np.random.default_rng(0)
    tensors = {
        "a": generator.standard_normal((3, 5), np.float32),
        "b": generator.standard_normal((2, 3, 7), np.float32).astype(np.float16),
        "c": generator.standard_normal(1, np.float32),
    }
    for name, numbers in tensors.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(file.read_bytes())
    content[4] = version
    file.write_bytes(content)
    found = open_gguf(file)
    assert found.metadata["general.description"] == "ключ \U0001f511"
    assert found.metadata["tokenizer.ggml.tokens"] == ["<s>", "\u2581a"]
    theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert {tensor.name for tensor in found.tensors} == set(tensors)
    for tensor in found.tensors:
        numbers = tensors[tensor.name]
        assert tensor.shape == numbers.shape
        assert np.array_equal(tensor.data.view(numbers.dtype).reshape(tensor.shape), numbers)
        assert tensor.data.tobytes() == theirs[tensor.name].data.tobytes()


HUGE = 2**64 - 1
KEY = key("general.architecture", STRING, "llama")
DAMAGED = {
    "it is empty": lambda: b"",
    "does not begin as a GGUF": lambda: b"PK\3\4" + bytes(60),
    "does not begin as a GGUF file": lambda: b"GGUF\3\0\0\0",
    "numbers are big-endian": lambda: gguf([], [], version=3 << 24),
    "version is `1`": lambda: gguf([], [], version=1),
    "version is `4`": lambda: gguf([], [], version=4),
    f"`{HUGE}` tensors": lambda: gguf([], [], num_tensors=HUGE),
    f"`{HUGE}` keys": lambda: gguf([], [], num_keys=HUGE),
    "a key takes `8` bytes": lambda: gguf([KEY], [], num_keys=65000, alignment=1),
    "has `general.architecture` twice": lambda: gguf([KEY, KEY], []),
    f"a key takes `{HUGE}` bytes": lambda: gguf([string("a", HUGE) + bytes(90)], []),
    "a key is not UTF-8": lambda: gguf([key(b"\xff", U8, 1)], []),
    "`a` is not UTF-8": lambda: gguf([key("a", STRING, b"\xc3(")], []),
    "`b` is not UTF-8": lambda: gguf([key("b", ARRAY, (STRING, [b"", b"\xed\xa0\x80"]))], []),
    "`a` has a value of type `13`": lambda: gguf([string("a") + struct.pack("<I", 13)], []),
    "`a` has a value of type `77`": lambda: gguf(
        [string("a") + struct.pack("<IIQ", ARRAY, 77, 1) + bytes(9)], []
    ),
    "`a` is neither true nor false": lambda: gguf([key("a", BOOL, 2)], []),
    "`c` is neither true nor false": lambda: gguf([key("c", ARRAY, (BOOL, [1, 255]))], []),
    f"`a` takes `{HUGE * 8}` bytes": lambda: gguf([key("a", ARRAY, (U64, [], HUGE))], []),
    "`a` takes `40` bytes": lambda: gguf([key("a", ARRAY, (F32, [1.0], 10))], []),
    f"said to have `{HUGE}` entries": lambda: gguf([key("a", ARRAY, (STRING, [], HUGE))], []),
    "`a` takes `8` bytes at byte": lambda: gguf([key("a", ARRAY, (STRING, ["b"], 1000))], []),
    f"`a` takes `{HUGE + 8}` bytes": lambda: gguf(
        [string("a") + struct.pack("<IIQ", ARRAY, STRING, 1) + string("b", HUGE)], []
    ),
    "said to have `65537` entries": lambda: gguf([key("a", ARRAY, (ARRAY, [], 2**16 + 1))], []),
    "arrays in arrays": lambda: gguf(
        [key("a", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(ARRAY, [])])])]))], []
    ),
    "`general.alignment` is `0`": lambda: gguf([key(header.ALIGNMENT, U32, 0)], []),
    "`general.alignment` is `48`": lambda: gguf([key(header.ALIGNMENT, U32, 48)], []),
    "`general.alignment` is `4294967295`": lambda: gguf(
        [key(header.ALIGNMENT, U32, 2**32 - 1)], []
    ),
    "`general.alignment` is `x`": lambda: gguf([key(header.ALIGNMENT, STRING, "x")], []),
    "`a` has `0` dimensions": lambda: gguf([], [info("a", [])]),
    "`a` has `5` dimensions": lambda: gguf([], [info("a", [1] * 5)], bytes(4)),
    "`a` is of type `4`": lambda: gguf([], [info("a", [1], 4)], bytes(4)),
    "the name of a tensor is not UTF-8": lambda: gguf([], [info(b"\xff", [1])], bytes(4)),
    r"`a` is of shape `\(0,\)`": lambda: gguf([], [info("a", [0])]),
    r"`a` is of shape `\(2, 33\)`": lambda: gguf([], [info("a", [33, 2], 8)], bytes(200)),
    "`a` starts at `16`, no multiple": lambda: gguf([], [info("a", [1], 0, 16)], bytes(64)),
    "`b` starts at `32`, inside of `a`": lambda: gguf(
        [], [info("b", [1], 0, 32), info("a", [9])], bytes(64)
    ),
    "it has `a` twice": lambda: gguf([], [info("a", [1]), info("a", [1], 0, 32)], bytes(64)),
    "`a` ends at byte `136`": lambda: gguf([], [info("a", [2], 0, 64)], bytes(64 + 7)),
    "`a` ends at byte `73786976294838206": lambda: gguf([], [info("a", [2**64 - 1])], bytes(64)),
    # The product overflows 64 bits, to 0 and to 4: CVE-2026-53923 and its kin.
    f"`a` ends at byte `{2**66 + 96}`": lambda: gguf([], [info("a", [2**32, 2**32])], bytes(64)),
    "`a` starts at `18446744073709551600`, no": lambda: gguf([], [info("a", [1], 0, 2**64 - 16)]),
    f"`a` ends at byte `{2**64 - 32 + 4 + 64}`": lambda: gguf([], [info("a", [1], 0, 2**64 - 32)]),
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_damaged(tmp_path: Path, reason: str) -> None:
    message = refusal(write(tmp_path, DAMAGED[reason]()))
    assert re.search(reason, message)


def test_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "a.gguf")
    assert "directory" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_not_allowed(tmp_path: Path) -> None:
    file = write(tmp_path, small())
    file.chmod(0)
    assert "ermission" in refusal(file)


def opens(file: Path) -> GGUFFile | None:
    """Nothing but a ModelLoadError comes out of any file."""
    try:
        return open_gguf(file)
    except ModelLoadError as error:
        str(error).encode()
        return None


def test_cut_anywhere(tmp_path: Path) -> None:
    content = small()
    for length in range(len(content)):
        assert opens(write(tmp_path, content[:length])) is None


def test_any_byte_changed(tmp_path: Path) -> None:
    """Each byte, to what breaks most: it opens or is refused, and never lies beyond the file."""
    content = small()
    num_opened = 0
    for at in range(len(content)):
        for byte in {0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1, content[at] ^ 0x80}:
            changed = bytearray(content)
            changed[at] = byte
            found = opens(write(tmp_path, bytes(changed)))
            if found is not None:
                num_opened += 1
                for tensor in found.tensors:
                    assert tensor.data.size <= len(content)
                    tensor.data.sum()
    assert num_opened > 100  # those in the data, at least


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8), st.data())
def test_changed_at_random(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    content = bytearray(small())
    for at, byte in changes:
        content[at % len(content)] = byte
    length = data.draw(st.integers(0, len(content)))
    opens(write(tmp_path_factory.getbasetemp(), bytes(content[:length]), "fuzz.gguf"))


@given(st.binary(max_size=300))
def test_anything_behind_the_magic(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    found = b"GGUF\3\0\0\0" + bytes([3, *bytes(7), 3, *bytes(7)]) + content
    opens(write(tmp_path_factory.getbasetemp(), found, "fuzz.gguf"))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty strings": lambda: gguf(
        [key("a", ARRAY, (STRING, [], header.MAX_STRINGS)) + bytes(100_000_000)], []
    ),
    "arrays in an array": lambda: gguf(
        [key("a", ARRAY, (ARRAY, [], header.MAX_ARRAYS)) + bytes(100_000_000)], []
    ),
    "numbers": lambda: gguf([key("a", ARRAY, (U8, [], 99_000_000)) + bytes(100_000_000)], []),
    "one string": lambda: gguf([string("a", 2**30) + bytes(100_000_000)], [], num_keys=1),
    "keys": lambda: (
        gguf([key(f"{number:06}", U16, 1) for number in range(65_000)], [], num_keys=65_536)
        + bytes(90_000_000)
    ),
    "tensors": lambda: gguf(
        [], [info(f"{number:06}", [1], 0, 32 * number) for number in range(65_536)]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_large_and_hostile(tmp_path: Path, name: str) -> None:
    """Of a hundred megabytes of header, no more is read than two seconds allow."""
    file = write(tmp_path, HOSTILE[name]())
    started_s = time.process_time()
    opens(file)
    assert time.process_time() - started_s < MAX_S


def test_memory_of_a_claim(tmp_path: Path) -> None:
    """Nothing is taken before it is known to be there."""
    file = write(tmp_path, gguf([key("a", ARRAY, (U64, [], 2**40))], []))
    tracemalloc.start()
    refusal(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def part(number: int, count: int, infos: list[bytes], total: int = 2) -> bytes:
    keys = [
        key("split.no", U16, number),
        key("split.count", U16, count),
        key("split.tensors.count", U32, total),
    ]
    if number == 0:
        keys.append(key("general.architecture", STRING, "llama"))
    return gguf(keys, infos, bytes(64))


def write_parts(directory: Path, *contents: bytes) -> list[Path]:
    count = len(contents)
    return [
        write(directory, content, f"m-{number:05}-of-{count:05}.gguf")
        for number, content in enumerate(contents, 1)
    ]


def test_parts(tmp_path: Path) -> None:
    files = write_parts(tmp_path, part(0, 2, [info("a", [2])]), part(1, 2, [info("b", [3])]))
    for file in files:  # any of them will do
        found = open_gguf(file)
        assert found.metadata["general.architecture"] == "llama"
        assert [(tensor.name, tensor.file) for tensor in found.tensors] == [
            ("a", files[0]),
            ("b", files[1]),
        ]
        assert found.files == files


def test_parts_as_the_package_writes_them(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full(number + 1, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "m-00002-of-00003.gguf")
    assert len(found.files) == 3
    assert [tensor.data.view("<f4").tolist() for tensor in found.tensors] == [
        [float(number)] * (number + 1) for number in range(5)
    ]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ((part(0, 2, [info("a", [2])]), part(1, 2, [info("a", [2])])), "has `a`, which"),
        ((part(0, 2, [info("a", [2])]), part(0, 2, [info("b", [2])])), "`split.no`"),
        ((part(0, 2, [info("a", [2])]), part(1, 3, [info("b", [2])])), "`split.count`"),
        ((part(0, 2, [info("a", [2])], 3), part(1, 2, [info("b", [2])])), "tensors.count` in"),
        ((part(0, 2, [info("a", [2])]), b"GGUF"), "00002-of-00002.gguf` cannot be read"),
    ],
)
def test_parts_of_different_wholes(
    tmp_path: Path, contents: tuple[bytes, bytes], reason: str
) -> None:
    files = write_parts(tmp_path, *contents)
    with pytest.raises(ModelLoadError, match=reason):
        open_gguf(files[0])


def test_a_part_is_missing(tmp_path: Path) -> None:
    files = write_parts(tmp_path, part(0, 2, [info("a", [2])]), part(1, 2, [info("b", [2])]))
    files[1].unlink()
    with pytest.raises(ModelLoadError, match="` is missing, one of the `2`"):
        open_gguf(files[0])


@pytest.mark.parametrize("name", ["m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
def test_no_such_part(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match="is named as part"):
        open_gguf(tmp_path / name)


def test_a_part_by_another_name(tmp_path: Path) -> None:
    file = write(tmp_path, part(0, 2, [info("a", [2])]))
    with pytest.raises(ModelLoadError, match="one of `2` parts"):
        open_gguf(file)


def test_is_gguf(tmp_path: Path) -> None:
    assert is_gguf(tmp_path / "a.gguf")
    assert not is_gguf(tmp_path / "a.bin")
    (tmp_path / "b.gguf").mkdir()
    assert not is_gguf(tmp_path / "b.gguf")


def test_typed_access(tmp_path: Path) -> None:
    told = Metadata(tmp_path / "f", open_gguf(write(tmp_path, small())).metadata)
    assert told.text("general.architecture") == "llama"
    assert told.under("general.").text("architecture") == "llama"
    assert told.number("f32") == 0.1
    assert told.integer("absent", 4) == 4
    assert told.integers("flags") == [0, 1]
    assert told.numbers("scores") == [0.5, -1.0]
    assert "u8" in told
    wide = Metadata(
        tmp_path / "f", {"large": 1e300, "nan": math.nan, "most": 3.4028234663852886e38}
    )
    assert wide.number("most") == 3.4028235e38
    for call, wanted in [
        (functools.partial(told.text, "u8"), "`u8` is `7` in .*/f`; it must be a string"),
        (functools.partial(told.integer, "i64"), "`i64` is `-5`"),
        (functools.partial(told.integer, "yes"), "`yes` is `True`"),
        (functools.partial(told.integer, "u8", high=6), "from `0` to `6`"),
        (functools.partial(wide.number, "large"), "`large` is `1e.300` in .*; it must be a number"),
        (functools.partial(wide.number, "nan"), "`nan` is `nan`"),
        (functools.partial(told.flag, "u8"), "true or false"),
        (functools.partial(told.strings, "scores"), "`scores` has `2` entries"),
        (functools.partial(told.integers, "scores"), "an array of integers"),
        (functools.partial(told.numbers, "tokens"), "an array of finite numbers"),
        (functools.partial(told.under("no.").text, "where"), "`no.where` is missing in the"),
    ]:
        with pytest.raises(ModelLoadError, match=wanted):
            call()
