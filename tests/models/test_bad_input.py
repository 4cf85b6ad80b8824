"""Files that are cut, bent or lie: what they hold is served, or refused in one sentence.

Nothing hangs, and no memory is taken for what a file only claims. What is about one format alone is
tested beside that format.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.models import gguf_files
from tests.models.bad_input import FILE, JSON, LAYER, SHAPES, make, refusal, sentence, soon
from tests.models.helpers import load

from penstock.errors import ModelLoadError
from penstock.models import gguf_model
from penstock.models.checkpoint import open_checkpoint, weight_files
from penstock.models.files import MAX_JSON_BYTES, read_config, read_generation_eos
from penstock.models.registry import read_spec
from penstock.models.safetensors import map_tensors
from penstock.models.shapes import shapes_of
from penstock.quantization.codes import StoredTensor
from penstock.text.tokenizer import load_tokenizer


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    num_bytes = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + num_bytes]), content[8 + num_bytes :]


def with_header(file: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_the_directory_is_good(tmp_path: Path) -> None:
    """What the tests below bend."""
    load(make(tmp_path / "a"))
    assert load_tokenizer(tmp_path / "a").encode("abc") == [0, 1, 2]


def test_cut_anywhere(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    content = (path / FILE).read_bytes()
    rng = random.Random(1)
    lengths = {0, 1, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(40))}
    for length in lengths:
        (path / FILE).write_bytes(content[:length])
        with soon(), pytest.raises(ModelLoadError) as caught:
            load(path)
        assert FILE in sentence(caught.value)


HUGE = 2**62


def bent(name: str, **told: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(told)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a shape": bent("lm_head.weight", shape=[8, 13]),
    "a longer shape": bent("model.norm.weight", shape=[9]),
    "a dtype": bent("model.norm.weight", dtype="F64"),
    "a dtype of as many bytes": bent("model.norm.weight", dtype="I32"),
    "an unknown dtype": bent("model.norm.weight", dtype="Q9"),
    "no dtype": bent("model.norm.weight", dtype=None),
    "a huge shape": bent("model.norm.weight", shape=[HUGE, HUGE]),
    "a huge shape without bytes": bent("model.norm.weight", shape=[HUGE, 0], data_offsets=[0, 0]),
    "many dimensions": bent("model.norm.weight", shape=[1] * 10**5),
    "a negative shape": bent("model.norm.weight", shape=[-8]),
    "a shape of floats": bent("model.norm.weight", shape=[8.0]),
    "offsets that cross": bent("model.norm.weight", data_offsets=[32, 0]),
    "offsets behind the end": bent("model.norm.weight", data_offsets=[HUGE, HUGE + 32]),
    "an offset that is true": bent("model.norm.weight", data_offsets=[False, 32]),
    "other bytes": lambda header: header["model.norm.weight"].update(
        data_offsets=header[f"{LAYER}.input_layernorm.weight"]["data_offsets"]
    ),
    "a list": lambda header: header.update({"model.norm.weight": [1]}),
    "another name": lambda header: header.update({"norm": header.pop("model.norm.weight")}),
    "one more": lambda header: header.update(
        {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "a name that cannot be printed": lambda header: header.update(
        {"\ud800\n" * 999: header.pop("model.norm.weight")}
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a")
    header, body = header_of(path / FILE)
    LIES[name](header)
    with_header(path / FILE, header, body)
    with soon(), pytest.raises(ModelLoadError) as caught:
        load(path)
    message = sentence(caught.value)
    assert FILE in message or "weights do not fit" in message


NAMES = st.sampled_from([*SHAPES, "x", "", "__metadata__"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "Q"]) | JSON,
        "shape": st.lists(st.sampled_from([8, 13, 0, 1, HUGE, -1]), max_size=3) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 32, 64, HUGE]), max_size=3) | JSON,
    },
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(NAMES, ENTRY | JSON, max_size=4) | JSON, num_bytes=st.integers(0, 99))
def test_any_header(tmp_path_factory: Any, header: Any, num_bytes: int) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    with_header(file, header, bytes(num_bytes))
    found: list[StoredTensor] = []
    message = refusal(lambda: found.extend(map_tensors(file)))
    assert not message or file.name in message
    assert sum(tensor.data.nbytes for tensor in found) <= num_bytes


@settings(max_examples=100, deadline=None)
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_index(tmp_path_factory: Any, index: Any) -> None:
    path = make(tmp_path_factory.getbasetemp() / "index")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(lambda: weight_files(path))
    assert not message or "model.safetensors.index.json" in message


def test_a_config_that_is_too_long(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with (path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with soon(), pytest.raises(ModelLoadError, match=r"config\.json` has `\d+` bytes"):
        read_config(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", FILE])
def test_what_never_ends_is_not_read(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a")
    for there in ("pipe", "/dev/zero"):
        (path / name).unlink(missing_ok=True)
        if there == "pipe":
            os.mkfifo(path / name)
        else:
            (path / name).symlink_to(there)
        with soon():
            eos = refusal(lambda: read_generation_eos(path))
            weights = refusal(lambda: open_checkpoint(path))
        assert name in eos + weights


PACKED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "mxfp4": {"quant_method": "mxfp4"},
}
PIECES = ["qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "weight.absmax", "weight"]
KINDS = [np.int32, np.float16, np.float32, np.uint8, np.int8]


@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_quantized_weights_that_do_not_fit(
    tmp_path_factory: Any, kind: str, data: st.DataObject
) -> None:
    """One matrix of a good directory becomes pieces of any shape and dtype."""
    config = {"quantization_config": PACKED[kind], "intermediate_size": 32}
    path = make(tmp_path_factory.getbasetemp() / kind, **config)
    wide = {name: tuple(32 if n == 12 else n for n in shape) for name, shape in SHAPES.items()}
    numbers = {name: np.ones(shape, np.float32) for name, shape in wide.items()}
    stem = f"{LAYER}.mlp.down_proj"
    del numbers[f"{stem}.weight"]
    for piece in data.draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5, unique=True)):
        shape = data.draw(st.lists(st.sampled_from([1, 2, 4, 8, 32, 0]), max_size=3))
        numbers[f"{stem}.{piece}"] = np.zeros(shape, data.draw(st.sampled_from(KINDS)))
    save_file(numbers, path / FILE)
    with soon():
        message = refusal(lambda: load(path))
    assert not message or stem in message


# GGUF files of a whole model.


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3"])
def gguf_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with little data, so that many of its bytes say something."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    kinds = {
        "llama": gguf_files.Case("llama", "LlamaForCausalLM", small, change=gguf_files.llama),
        "gemma2": gguf_files.Case(
            "gemma2", "Gemma2ForCausalLM", small | {"head_dim": 8}, change=gguf_files.gemma
        ),
        "phi3": gguf_files.Case("phi3", "Phi3ForCausalLM", small),
    }
    path = tmp_path_factory.mktemp("gguf")
    file, _, _ = gguf_files.make(kinds[request.param], path, "F16")
    return file.read_bytes()


def opened(file: Path) -> bool:
    """Whether everything of a GGUF file can be read; else it is refused in a sentence."""
    with soon():
        try:
            spec = read_spec(gguf_model.read_config(file))
            assert shapes_of.__wrapped__(spec).num_parameters > 0
            for _, tensors in gguf_model.open_tensors(file):
                for tensor in tensors:
                    assert math.prod(tensor.shape) >= 0
            return True
        except ModelLoadError as error:
            sentence(error)
            return False


def test_gguf_cut_or_bent(tmp_path: Path, gguf_file: bytes) -> None:
    file = tmp_path / "a.gguf"
    rng = random.Random(2)
    file.write_bytes(gguf_file)
    assert opened(file)
    end = gguf_file.rindex(b".weight") + 40  # of the header
    for length in [0, 3, 4, 23, 24, len(gguf_file) - 1, *rng.sample(range(len(gguf_file)), 40)]:
        file.write_bytes(gguf_file[:length])
        assert not opened(file)
    num_opened = 0
    for _ in range(200):
        data = bytearray(gguf_file)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        file.write_bytes(data)
        num_opened += opened(file)
    assert 0 < num_opened < 200


def test_gguf_keys(tmp_path: Path, gguf_file: bytes) -> None:
    """Each number of the metadata becomes a strange one, of the same length."""
    file = tmp_path / "a.gguf"
    for key in (b"block_count", b"embedding_length", b"head_count", b"head_count_kv",
                b"feed_forward_length", b"context_length", b"rope.freq_base"):  # fmt: skip
        at = gguf_file.find(b"." + key + (4).to_bytes(4, "little"))
        at = at if at >= 0 else gguf_file.find(b"." + key + (6).to_bytes(4, "little"))
        if at < 0:
            continue
        at += 1 + len(key) + 4
        for value in (0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1, 0x7FC00000):
            file.write_bytes(gguf_file[:at] + value.to_bytes(4, "little") + gguf_file[at + 4 :])
            opened(file)


def test_gguf_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with soon(), pytest.raises(ModelLoadError, match=r"a\.gguf` cannot be read"):
        gguf_model.read_config(tmp_path / "a.gguf")
