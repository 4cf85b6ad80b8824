"""The ctypes mirror says what the C header says: names, order and types."""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from penstock.native import structs

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "penstock_native.h"
SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "penstock_weight": structs.Weight,
}
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "penstock_step": structs.Step,
    "penstock_weight": structs.Weight,
    "penstock_pack_args": structs.PackArgs,
    "penstock_pack_codes_args": structs.PackCodesArgs,
    "penstock_embed_args": structs.EmbedArgs,
    "penstock_norm_args": structs.NormArgs,
    "penstock_slice_norm_args": structs.SliceNormArgs,
    "penstock_add_args": structs.AddArgs,
    "penstock_copy_args": structs.CopyArgs,
    "penstock_linear_args": structs.LinearArgs,
    "penstock_angles_args": structs.AnglesArgs,
    "penstock_rope_args": structs.RopeArgs,
    "penstock_attention_args": structs.AttentionArgs,
    "penstock_experts_args": structs.ExpertsArgs,
    "penstock_sample_args": structs.SampleArgs,
    "penstock_op": structs.Op,
}
ENUMS: dict[str, dict[str, int] | type[IntEnum]] = {
    "penstock_dtype": {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(name, name.upper()): value
        for name, value in structs.DTYPES.items()
    },
    "penstock_isa": structs.Isa,
    "penstock_op_kind": structs.OpKind,
    "penstock_rows": structs.Rows,
    "penstock_epilogue": structs.Epilogue,
    "penstock_activation": structs.Activation,
    "penstock_norm_kind": structs.NormKind,
    "penstock_code": structs.Code,
    "penstock_scoring": structs.Scoring,
}


@pytest.fixture(scope="module")
def header() -> str:
    """The header without comments."""
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def field(declaration: str) -> tuple[str, Any]:
    """`const float* bias` to ("bias", c_void_p)."""
    found = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?", declaration.strip())
    assert found, declaration
    kind = ctypes.c_void_p if found[2] else SCALARS[found[1]]
    return found[3], kind * int(found[4]) if found[4] else kind


def test_structs(header: str) -> None:
    found = dict(re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", header, re.DOTALL))
    assert list(found) == list(STRUCTS)
    for name, body in found.items():
        declared = [field(part) for part in body.split(";") if part.strip()]
        assert declared == list(STRUCTS[name]._fields_), name


def test_enums(header: str) -> None:
    found = dict(re.findall(r"enum (\w+) \{(.*?)\};", header, re.DOTALL))
    assert list(found) == list(ENUMS)
    for name, body in found.items():
        values = dict(re.findall(r"PENSTOCK_(\w+) = (\d+)", body))
        if name == "penstock_op_kind":
            assert int(values.pop("NUM_OPS")) == len(structs.OpKind)
        prefix = {"penstock_op_kind": "OP_", "penstock_rows": "ROWS_"}.get(name, "")
        values = {key.removeprefix(prefix): value for key, value in values.items()}
        ours = ENUMS[name]
        if not isinstance(ours, dict):
            ours = {member.name: member.value for member in ours}
        assert {key: int(value) for key, value in values.items()} == ours, name


def test_functions(header: str) -> None:
    found = re.findall(r"PENSTOCK_API ([\w ]+?)(\*?) (penstock_\w+)\((.*?)\);", header, re.DOTALL)
    assert [name for _, _, name, _ in found] == list(structs.FUNCTIONS)
    for result, star, name, arguments in found:
        ours = structs.FUNCTIONS[name]
        assert ours[0] is result_type(result + star), name
        declared = [part for part in arguments.split(",") if part.strip() != "void"]
        assert len(ours[1]) == len(declared), name
        for kind, declaration in zip(ours[1], declared, strict=True):
            assert kind is argument_type(" ".join(declaration.split())), (name, declaration)


def result_type(text: str) -> Any:
    if text == "const char*":
        return ctypes.c_char_p
    if text == "void":
        return None
    return ctypes.c_void_p if text.endswith("*") else SCALARS[text]


def argument_type(declaration: str) -> Any:
    """Structs and arrays are typed pointers; the pool is an address."""
    found = re.fullmatch(r"(?:const )?(\w+)(\*?) \w+", declaration)
    assert found, declaration
    kind, star = found[1], found[2]
    if not star:
        return SCALARS[kind]
    if kind == "penstock_pool":
        return ctypes.c_void_p
    return ctypes.POINTER(STRUCTS.get(kind) or SCALARS[kind])


def test_version(header: str) -> None:
    found = re.search(r"#define PENSTOCK_ABI_VERSION (\d+)", header)
    assert found
    assert int(found[1]) == structs.ABI_VERSION
