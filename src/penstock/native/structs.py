"""The C ABI of the native library as ctypes has it: its structs, constants and functions.

Owns the only list of them in Python; `csrc/include/penstock_native.h` says what they mean.
Invariant: names, order and types equal the header's (`tests/native/test_structs.py` reads it).
Pointers are `c_void_p`, which take plain addresses: whoever fills one in keeps its memory alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

ABI_VERSION = 2

# penstock_dtype, by the names that settings and checkpoints use
DTYPES = {
    "float32": 0,
    "bfloat16": 1,
    "float16": 2,
    "int8": 3,
    "int4": 4,
    "codes4": 5,
    "codes8": 6,
}


class Isa(IntEnum):
    """penstock_isa: the instruction sets that kernels are compiled for."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3
    AMX_EMULATED = 4


class OpKind(IntEnum):
    """penstock_op_kind."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    ANGLES = 3
    ROPE = 4
    ATTENTION = 5
    SLICE_NORM = 6
    ADD = 7
    COPY = 8
    EXPERTS = 9


class Rows(IntEnum):
    """penstock_rows: which tokens of a step an op computes."""

    TOKENS = 0
    LOGITS = 1


class Epilogue(IntEnum):
    """penstock_epilogue."""

    STORE = 0
    GATED = 1


class Activation(IntEnum):
    """penstock_activation."""

    IDENTITY = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    RELU = 4
    RELU_SQUARED = 5
    SWIGLU_OAI = 6


class NormKind(IntEnum):
    """penstock_norm_kind."""

    RMS_NORM = 0
    LAYER_NORM = 1


class Code(IntEnum):
    """penstock_code."""

    CODE_UINT8 = 0
    CODE_INT8 = 1
    CODE_E4M3 = 2
    CODE_E5M2 = 3


class Scoring(IntEnum):
    """penstock_scoring."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_CHOSEN = 2


class Step(ctypes.Structure):
    """penstock_step."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("num_tokens", c_int64),
        ("num_requests", c_int64),
        ("num_logit_rows", c_int64),
        ("block_size", c_int64),
        ("block_table_stride", c_int64),
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("block_table", c_void_p),
        ("logit_rows", c_void_p),
    ]


class Weight(ctypes.Structure):
    """penstock_weight."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("format", c_int32),
        ("group_size", c_int32),
        ("num_rows", c_int64),
        ("num_columns", c_int64),
        ("padded_columns", c_int64),
        ("panel_bytes", c_int64),
        ("data_bytes", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("code", c_int32),
        ("scale_format", c_int32),
        ("has_minima", c_int32),
        ("padding", c_int32),
        ("book", c_float * 16),
    ]


class PackArgs(ctypes.Structure):
    """penstock_pack_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("weight", Weight),
        ("source", c_void_p),
        ("source_dtype", c_int32),
        ("panel_step", c_int32),
        ("first_row", c_int64),
        ("num_source_rows", c_int64),
    ]


class PackCodesArgs(ctypes.Structure):
    """penstock_pack_codes_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("weight", Weight),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("minima", c_void_p),
        ("units", c_void_p),
        ("minimum_units", c_void_p),
        ("first_row", c_int64),
        ("num_source_rows", c_int64),
        ("panel_step", c_int32),
        ("padding", c_int32),
    ]


class EmbedArgs(ctypes.Structure):
    """penstock_embed_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("table", Weight),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("positions", c_void_p),
        ("num_positions", c_int64),
        ("scale", c_float),
        ("padding", c_int32),
    ]


class NormArgs(ctypes.Structure):
    """penstock_norm_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("size", c_int64),
        ("eps", c_float),
        ("x_scale", c_float),
        ("kind", c_int32),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("padding", c_int32),
    ]


class SliceNormArgs(ctypes.Structure):
    """penstock_slice_norm_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("x", c_void_p),
        ("stride", c_int64),
        ("first", c_int64),
        ("num_runs", c_int64),
        ("size", c_int64),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("eps", c_float),
        ("kind", c_int32),
        ("dtype", c_int32),
        ("padding", c_int32),
    ]


class AddArgs(ctypes.Structure):
    """penstock_add_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("size", c_int64),
        ("scale", c_float),
        ("dtype", c_int32),
    ]


class CopyArgs(ctypes.Structure):
    """penstock_copy_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("from", c_void_p),
        ("from_stride", c_int64),
        ("from_group_stride", c_int64),
        ("to", c_void_p),
        ("to_stride", c_int64),
        ("to_group_stride", c_int64),
        ("num_groups", c_int64),
        ("size", c_int64),
        ("dtype", c_int32),
        ("padding", c_int32),
    ]


class LinearArgs(ctypes.Structure):
    """penstock_linear_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("weight", Weight),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("num_groups", c_int64),
        ("x_group_stride", c_int64),
        ("y_group_stride", c_int64),
        ("x_dtype", c_int32),
        ("y_dtype", c_int32),
        ("rows", c_int32),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("activation_bits", c_int32),
        ("num_outputs", c_int32),
        ("y_scale", c_float),
        ("softcap", c_float),
        ("padding", c_int32),
    ]


class AnglesArgs(ctypes.Structure):
    """penstock_angles_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("frequencies", c_void_p),
        ("out", c_void_p),
        ("half", c_int64),
        ("scale", c_float),
        ("padding", c_int32),
    ]


class RopeArgs(ctypes.Structure):
    """penstock_rope_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("angles", c_void_p),
        ("x", c_void_p),
        ("stride", c_int64),
        ("half", c_int64),
        ("first", c_int64),
        ("head_stride", c_int64),
        ("num_heads", c_int32),
        ("dtype", c_int32),
    ]


class AttentionArgs(ctypes.Structure):
    """penstock_attention_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("latent", c_void_p),
        ("latent_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("kv", c_void_p),
        ("kv_scales", c_void_p),
        ("sinks", c_void_p),
        ("num_slots", c_int64),
        ("window", c_int64),
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("is_causal", c_int32),
        ("padding", c_int32),
    ]


class ExpertsArgs(ctypes.Structure):
    """penstock_experts_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("gate_up", Weight),
        ("down", Weight),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("correction", c_void_p),
        ("shared", c_void_p),
        ("shared_stride", c_int64),
        ("shared_gate", c_void_p),
        ("shared_gate_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("num_experts", c_int64),
        ("in_size", c_int64),
        ("size", c_int64),
        ("top_k", c_int64),
        ("num_expert_groups", c_int64),
        ("top_groups", c_int64),
        ("group_top", c_int32),
        ("scoring", c_int32),
        ("normalise", c_int32),
        ("activation", c_int32),
        ("activation_bits", c_int32),
        ("dtype", c_int32),
        ("routed_scale", c_float),
        ("padding", c_int32),
    ]


class SampleArgs(ctypes.Structure):
    """penstock_sample_args."""

    _fields_: ClassVar[Sequence[Any]] = [
        ("logits", c_void_p),
        ("stride", c_int64),
        ("vocab_size", c_int64),
        ("num_rows", c_int64),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("draws", c_void_p),
        ("token_ids", c_void_p),
    ]


class Op(ctypes.Structure):
    """penstock_op."""

    _fields_: ClassVar[Sequence[Any]] = [("kind", c_int64), ("args", c_void_p)]


# Name -> type of the result, types of the arguments.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "penstock_abi_version": (c_int32, []),
    "penstock_last_error": (c_char_p, []),
    "penstock_available_isas": (c_uint64, []),
    "penstock_isa": (c_int32, []),
    "penstock_set_isa": (c_int32, [c_int32]),
    "penstock_pool_create": (c_void_p, [c_int32, POINTER(c_int32)]),
    "penstock_pool_destroy": (None, [c_void_p]),
    "penstock_weight_layout": (c_int32, [POINTER(Weight)]),
    "penstock_pack": (c_int32, [c_void_p, POINTER(PackArgs)]),
    "penstock_pack_codes": (c_int32, [c_void_p, POINTER(PackCodesArgs)]),
    "penstock_reserve": (c_int64, [c_void_p, POINTER(Op), c_int64, c_int64, c_int64]),
    "penstock_run": (c_int32, [c_void_p, POINTER(Op), c_int64, POINTER(Step)]),
    "penstock_sample": (c_int32, [c_void_p, POINTER(SampleArgs)]),
}
