"""Speeds from shapes and rates, against numbers computed by hand; no clock is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.models.kinds import KINDS, attention, experts, latent, model
from tests.models.plan_configs import DEEPSEEK_V3, GPT_OSS, LLAMA_1B, MIXTRAL, OLMOE

from penstock.layers.native_materials import NativeMaterials
from penstock.layers.native_toolkit import NativeToolkit
from penstock.layers.specs import MLPSpec
from penstock.models.compose import compose
from penstock.models.estimate import (
    REQUEST_S,
    STEP_S,
    Estimate,
    Rates,
    decode,
    num_pairs,
    num_row_ops,
    pieces,
    prefill,
    products_of,
    seen,
)
from penstock.models.footprint import weight_bytes
from penstock.models.native_model import NativeModel
from penstock.models.shapes import shapes_of
from penstock.models.spec import LayerSpec, ModelSpec
from penstock.native import library
from penstock.native.kv_memory import KVMemory
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.native.rates import Curve
from penstock.native.structs import OpKind
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import Format, packed_bytes, scheme
from penstock.quantization.stored import precision_of

BF16 = Formats(scheme("none", "bfloat16"))
# 20 GB/s of bfloat16 for one row, 10 for 8; 100 G multiplications a second for 512.
BF16_CURVE = Curve((1, 8, 512), (1e-10, 2e-10, 512e-11))
RATES = Rates(
    products={Format("bfloat16"): BF16_CURVE},
    attention=((500, Curve((1, 8), (4e-4, 1e-3))), (2000, Curve((1, 8), (1e-3, 4e-3)))),
    pair_s=1e-9,
    row_ops=Curve((1, 512), (5e-6, 261e-6)),
    sampling=Curve((1, 8), (1e-4, 8e-4)),
)
LLAMA = ModelSpec.from_hf(LLAMA_1B)


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_active"),
    [
        (LLAMA_1B, 1_235_814_400, 1_235_814_400),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),  # "46.7B, 12.9B a token" (Jiang et al. 2024)
        (OLMOE, 6_919_161_856, 1_281_000_000),  # "1B active, 7B total" (Muennighoff et al. 2024)
        (GPT_OSS, 20_914_757_184, 3_610_000_000),  # "21B, 3.6B active" (OpenAI 2025)
        (DEEPSEEK_V3, 671_026_419_200, 37_000_000_000),  # "671B, 37B a token" (DeepSeek 2024)
    ],
)
def test_parameters_are_those_that_are_published(
    config: dict[str, object], num_parameters: int, num_active: int
) -> None:
    spec = ModelSpec.from_hf(config)
    assert spec.num_parameters == num_parameters
    met = sum(piece.num_parameters * piece.share for piece in pieces(spec, BF16))
    table = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    # Published counts of active ones have the embedding in them or have not.
    assert met * 0.97 <= num_active <= (met + table) * 1.01


def test_kv_bytes_a_token() -> None:
    assert LLAMA.kv_bytes_per_token("bfloat16") == 16 * 2 * 8 * 64 * 2
    assert LLAMA.kv_bytes_per_token("int8") == 16 * 2 * 8 * (64 + 4)
    assert ModelSpec.from_hf(DEEPSEEK_V3).kv_bytes_per_token("bfloat16") == 61 * 576 * 2


@pytest.mark.parametrize("name", KINDS)
def test_pieces_are_all_weights_but_vectors_and_an_embedding_of_its_own(name: str) -> None:
    spec = KINDS[name]
    matrices = sum(piece.num_bytes for piece in pieces(spec, BF16))
    if not spec.tied_embeddings:
        matrices += packed_bytes(Format("bfloat16"), spec.vocab_size, spec.hidden_size)
    vectors = shapes_of(spec).num_vector_parameters
    if name == "bert":  # 64 positions for each of 2 types, instead of both tables
        vectors += (2 * 64 - 64 - 2) * spec.hidden_size
    assert weight_bytes(spec, BF16) == matrices + 4 * vectors


def test_a_decode_step_of_llama_by_hand() -> None:
    step = decode(LLAMA, BF16, "bfloat16", RATES, num_requests=1, context_len=1000)
    terms = {term.name: term for term in step.terms}
    # 16 blocks of 2048 x (3072 + 2048) + 3 x 2048 x 8192 numbers, and the tied head.
    blocks = 16 * (2048 * 5120 + 3 * 2048 * 8192)
    assert terms["weights"].amount == 2 * blocks
    assert terms["weights"].rate == pytest.approx(20e9)
    assert terms["head"].amount == 2 * 128256 * 2048
    assert terms["head"].seconds == pytest.approx(128256 * 2048 * 1e-10)
    assert terms["keys and values"].amount == 32768 * 1000
    assert terms["keys and values"].seconds == pytest.approx(16 * 6e-4)
    assert terms["other operations"].amount == 16 * 3 + 3
    assert terms["engine and sampling"].seconds == pytest.approx(STEP_S + REQUEST_S + 1e-4)
    assert step.seconds == pytest.approx(sum(term.seconds for term in step.terms))
    assert step.tokens_per_s == pytest.approx(1 / step.seconds)


def test_requests_together_read_weights_once_and_their_own_keys() -> None:
    one = decode(LLAMA, BF16, "bfloat16", RATES, num_requests=1, context_len=1000)
    eight = decode(LLAMA, BF16, "bfloat16", RATES, num_requests=8, context_len=1000)
    first, second = ({term.name: term for term in step.terms} for step in (one, eight))
    assert second["weights"].amount == first["weights"].amount
    assert second["weights"].rate == pytest.approx(10e9)
    assert second["keys and values"].amount == 8 * first["keys and values"].amount
    assert second["keys and values"].seconds == pytest.approx(16 * 2e-3)
    assert eight.num_tokens == 8


def test_a_prompt_of_llama_by_hand() -> None:
    whole = prefill(LLAMA, BF16, RATES, num_tokens=1024, chunk=512)
    terms = {term.name: term for term in whole.terms}
    blocks = 16 * (2048 * 5120 + 3 * 2048 * 8192)
    assert terms["weights"].unit == "multiplications"
    assert terms["weights"].amount == 1024 * blocks
    assert terms["weights"].rate == pytest.approx(100e9)
    assert terms["head"].amount == 2 * 128256 * 2048  # one row, of the last chunk
    assert terms["attention"].amount == 16 * 1024 * 1025 // 2
    assert terms["other operations"].seconds == pytest.approx(2 * 51 * 261e-6)
    in_one = prefill(LLAMA, BF16, RATES, num_tokens=1024, chunk=2048)
    assert in_one.num_tokens == whole.num_tokens == 1024
    assert terms["weights"].seconds == pytest.approx(
        next(term.seconds for term in in_one.terms if term.name == "weights")
    )


def test_of_experts_those_are_read_that_some_token_takes() -> None:
    spec = ModelSpec.from_hf(MIXTRAL)

    def taken(num_requests: int) -> float:
        step = decode(spec, BF16, "bfloat16", RATES, num_requests=num_requests, context_len=100)
        return next(term.amount for term in step.terms if term.name == "experts")

    all_bytes = 32 * 8 * 3 * 4096 * 14336 * 2
    assert taken(1) == pytest.approx(all_bytes * 2 / 8)
    assert taken(4) == pytest.approx(all_bytes * (1 - 0.75**4))
    prompt = prefill(spec, BF16, RATES, num_tokens=512, chunk=512)
    products = next(term.amount for term in prompt.terms if term.name == "experts")
    assert products == pytest.approx(512 * 32 * 2 * 3 * 4096 * 14336)


def test_attention_between_and_beyond_the_contexts_that_were_measured() -> None:
    found = [RATES.attention_s(1, count) for count in (100, 500, 1250, 2000, 8000)]
    assert found == pytest.approx([4e-4, 4e-4, 7e-4, 1e-3, 4e-3])


def test_windows_limit_what_is_read() -> None:
    layer = LayerSpec(attention=attention(window=100), mlp=MLPSpec(size=8, activation="silu"))
    assert seen(layer, 50) == 50
    assert seen(layer, 5000) == 100
    for first, count in ((0, 30), (0, 300), (70, 60), (99, 1), (100, 5), (500, 20)):
        by_hand = sum(min(place + 1, 100) for place in range(first, first + count))
        assert num_pairs(layer, first, count) == by_hand
    free = replace(layer, attention=attention())
    assert num_pairs(free, 10, 5) == 11 + 12 + 13 + 14 + 15
    both = replace(layer, attention=attention(is_causal=False))
    assert num_pairs(both, 0, 9) == 81
    assert num_pairs(replace(layer, attention=latent()), 0, 4) == 10


def test_an_encoder_has_no_head() -> None:
    found: Estimate = prefill(KINDS["bert"], BF16, RATES, num_tokens=40, chunk=512)
    assert "head" not in {term.name for term in found.terms}
    assert found.seconds > 0


def test_the_formats_of_a_quantized_checkpoint_are_measured_each() -> None:
    spec = ModelSpec.from_hf(GPT_OSS)
    formats = Formats(scheme("none", "bfloat16"), precision_of(GPT_OSS))
    found = products_of(spec, formats)
    by_dtype = {form.dtype: products for form, products in found.items()}
    assert set(by_dtype) == {"bfloat16", "codes4"}
    assert by_dtype["codes4"][0].is_gated
    assert by_dtype["codes4"][0].num_rows == 2880
    table = by_dtype["bfloat16"][-1]  # cut, so that measuring it takes no gigabytes
    assert table.num_columns == 2880
    assert table.num_rows < spec.vocab_size


def test_maps_of_latents_are_counted_both() -> None:
    spec = model(LayerSpec(attention=latent(), mlp=experts()))
    heads, rank, nope, value = 4, 20, 10, 14
    found = [piece for piece in pieces(spec, BF16) if piece.role == "latent"]
    assert sum(piece.num_parameters for piece in found) == heads * rank * (nope + value)


@pytest.mark.parametrize("name", KINDS)
def test_other_operations_are_those_that_are_recorded(name: str) -> None:
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    spec = KINDS[name]
    program = Program(Pool(library.load(), 1), 8, 1)
    kv = KVMemory(spec.num_layers, 16, *spec.cached, "int8")
    materials = NativeMaterials(program, Arena(), "bfloat16", BF16, kv)
    NativeModel(compose(spec, NativeToolkit(materials)), materials)
    apart = (OpKind.LINEAR, OpKind.ATTENTION, OpKind.EXPERTS)
    recorded = [op.kind for op in program._recorded if op.kind not in apart]
    assert num_row_ops(spec) == len(recorded)
