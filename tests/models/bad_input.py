"""Directories that can be served, and how a test says that bad ones are refused as they should."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from penstock.errors import ModelLoadError, PenstockError

MAX_S = 2.0
SLACK = 10.0  # a machine under test may be that much slower


@contextmanager
def soon() -> Iterator[None]:
    started_s = time.perf_counter()
    yield
    assert time.perf_counter() - started_s < MAX_S * SLACK


def sentence(error: PenstockError) -> str:
    """The message: one line that can be printed, and no longer than a screen."""
    message = error.message
    message.encode()
    assert message.endswith((".", ":")) or "\n" in message
    assert len(message.splitlines()[0]) < 700
    return message


def refusal(attempt: Callable[[], object]) -> str:
    """The sentence with which something is refused; "" if it is not."""
    try:
        attempt()
    except ModelLoadError as error:
        return sentence(error)
    return ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.post_attention_layernorm.weight": (8,),
    **{f"{LAYER}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (13, 8),
}
FILE = "model.safetensors"
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER = {
    "added_tokens": [],
    "pre_tokenizer": LETTERS,
    "decoder": LETTERS,
    "model": {
        "type": "BPE",
        "vocab": {letter: number for number, letter in enumerate("abcdefghijklm")},
        "merges": [],
    },
}


def make(path: Path, **config: Any) -> Path:
    """A directory that can be served."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    drawn = np.random.default_rng(0)
    numbers = {name: drawn.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(numbers, path / FILE)
    return path
