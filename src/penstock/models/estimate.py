"""How fast a model will be, as arithmetic: its shapes divided by what this machine does a second.

Owns the terms of a decode step and of a prompt, each with its amount, its rate and its seconds.
Pure functions of spec, formats and rates: nothing is measured here, nothing is loaded.

A step takes, one after the other: every matrix as long as its format takes with so many rows (few
rows wait for the weights to come from memory, many for the multiplications); the keys and values
that each request's attention reads; the ops between them; and the engine's own time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from penstock.layers.specs import AttentionSpec, ExpertsSpec
from penstock.models.footprint import pieces_of
from penstock.models.shapes import MatrixShape, shapes_of
from penstock.models.spec import LayerSpec, ModelSpec
from penstock.native.rates import FEW_ROWS, Curve, Product
from penstock.quantization import schemes
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import Format

# Of the scheduler, the batch and the events, beside the choice of tokens: medians of
# `results/engine_overhead.json` with one and with 16 requests, rounded up.
STEP_S = 20e-6
REQUEST_S = 5e-6


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in how long, for the shapes and formats of one model."""

    products: Mapping[Format, Curve]  # seconds of a number of a matrix, by rows that meet it
    # Tokens that each request reads, ascending; with each the seconds of a layer, by requests.
    attention: tuple[tuple[int, Curve], ...]
    pair_s: float  # of a layer's attention: one token to compute with one that it sees
    row_ops: Curve  # seconds of an op that is no product, by rows
    sampling: Curve  # seconds of choosing tokens, by requests

    def attention_s(self, num_requests: int, num_tokens: int) -> float:
        """Of a layer in which each request reads so many tokens."""
        seconds = tuple(curve.at(num_requests) for _, curve in self.attention)
        return Curve(tuple(count for count, _ in self.attention), seconds).at(num_tokens)


class Term(NamedTuple):
    """One part of the time: `amount` / `rate` = `seconds`."""

    name: str
    amount: float
    unit: str  # of `amount`: bytes, multiplications, operations, requests
    seconds: float

    @property
    def rate(self) -> float:
        """`unit` a second."""
        return self.amount / self.seconds if self.seconds else 0.0


class Estimate(NamedTuple):
    """The time of a step or of a prompt."""

    num_tokens: int  # that it computes
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        """Of all terms together."""
        return sum(term.seconds for term in self.terms)

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.num_tokens / self.seconds


class Piece(NamedTuple):
    """Matrices that are multiplied in the same way."""

    role: str
    form: Format
    share: float  # of the tokens that meet one of them
    num_parameters: int
    num_bytes: int


def pieces(spec: ModelSpec, formats: Formats) -> list[Piece]:
    """All matrices that a token is multiplied with, those alike together; no embedding."""
    found: dict[tuple[str, Format, float], list[int]] = {}

    def add(
        role: str, form: Format, share: float, num_rows: int, num_columns: int, count: int = 1
    ) -> None:
        sums = found.setdefault((role, form, share), [0, 0])
        sums[0] += count * num_rows * num_columns
        sums[1] += count * schemes.packed_bytes(form, num_rows, num_columns)

    for shape in shapes_of(spec).matrices:
        if shape.role == "table" and not (spec.tied_embeddings and has_head(spec)):
            continue
        role = "head" if shape.role == "table" else shape.role
        for form, num_rows in pieces_of(shape, formats):
            add(role, form, shape.share, num_rows, shape.num_columns)
    for layer in spec.layers:
        attention = layer.attention
        if not isinstance(attention, AttentionSpec):  # the maps to and from latents, by head
            sizes = (attention.rank, attention.nope_dim), (attention.value_dim, attention.rank)
            for num_rows, num_columns in sizes:
                form = formats.scheme.linear
                add("latent", form, 1.0, num_rows, num_columns, attention.num_heads)
    return [Piece(*key, *sums) for key, sums in found.items()]


def has_head(spec: ModelSpec) -> bool:
    """Whether it writes tokens."""
    return spec.has_head and not spec.is_encoder


def products_of(spec: ModelSpec, formats: Formats) -> dict[Format, list[Product]]:
    """The linear maps of each format, in the order in which a step computes them.

    That of the router is left out: it is small, and is counted at the rate of its neighbours.
    """
    found: dict[Format, list[Product]] = {}
    shapes = list(shapes_of(spec).matrices)
    tables = [shape for shape in shapes if shape.role in {"table", "head"}]
    rest = [shape for shape in shapes if shape.role not in {"table", "head", "router"}]
    for shape in rest + (tables[-1:] if has_head(spec) else []):
        parts = pieces_of(shape, formats)
        if shape.is_gated:
            parts = parts[:1]
        for form, num_rows in parts:
            found.setdefault(form, []).append(_product(shape, num_rows))
        if shape.role == "latent":  # cut by head, and its first half transposed
            product = _product(shape, shape.num_rows)
            found.setdefault(formats.scheme.linear, []).append(product)
    return found


_MOST_NUMBERS = 2**26  # of a matrix that is multiplied to measure: a head has more


def _product(shape: MatrixShape, num_rows: int) -> Product:
    most = max(_MOST_NUMBERS // shape.num_columns, 1)
    return Product(min(num_rows, most), shape.num_columns, shape.is_gated)


def decode(
    spec: ModelSpec,
    formats: Formats,
    kv_dtype: str,
    rates: Rates,
    *,
    num_requests: int,
    context_len: int,
) -> Estimate:
    """A step in which each request gets one token.

    Args:
        context_len: tokens that each request has by then, in the middle of its answer.
    """
    terms = _products(pieces(spec, formats), rates, num_requests, num_requests)
    layer_bytes = spec.kv_bytes_per_token(kv_dtype) // spec.num_layers
    tokens = [seen(layer, context_len) for layer in spec.layers]
    attention_s = sum(rates.attention_s(num_requests, count) for count in tokens)
    num_bytes = num_requests * layer_bytes * sum(tokens)
    terms.append(Term("keys and values", num_bytes, "bytes", attention_s))
    terms += _others(spec, rates, num_requests, num_requests, num_steps=1)
    return Estimate(num_requests, tuple(terms))


def prefill(
    spec: ModelSpec, formats: Formats, rates: Rates, *, num_tokens: int, chunk: int
) -> Estimate:
    """A prompt that is computed in chunks, up to its first token."""
    terms: list[Term] = []
    model = pieces(spec, formats)
    starts = range(0, num_tokens, chunk)
    for start in starts:
        count = min(chunk, num_tokens - start)
        is_last = start + count == num_tokens
        terms += _products(model, rates, count, int(is_last and has_head(spec)))
        pairs = sum(num_pairs(layer, start, count) for layer in spec.layers)
        terms.append(Term("attention", pairs, "pairs", pairs * rates.pair_s))
        terms += _others(spec, rates, count, int(is_last), num_steps=1)
    return Estimate(num_tokens, tuple(_together(terms)))


def seen(layer: LayerSpec, context_len: int) -> int:
    """Tokens that one query sees in a layer, of so many."""
    attention = layer.attention
    window = attention.window if isinstance(attention, AttentionSpec) else 0
    return min(context_len, window) if window else context_len


def num_pairs(layer: LayerSpec, first: int, count: int) -> int:
    """Tokens that are seen by the queries at the positions [first, first + count), together."""
    attention = layer.attention
    if isinstance(attention, AttentionSpec) and not attention.is_causal:
        return count * (first + count)
    most = seen(layer, first + count)  # of a full window, or of the last query
    growing = max(min(most - first, count), 0)  # queries that see one more each
    return growing * first + growing * (growing + 1) // 2 + (count - growing) * most


def num_row_ops(spec: ModelSpec) -> int:
    """Ops of a step that are neither products nor attention nor mixtures of experts."""
    ropes = {
        layer.attention.rope for layer in spec.layers if layer.attention.rope is not None
    }  # whose angles are computed once
    names = spec.names
    count = 1 + len(ropes) + spec.has_final_norm + bool(names.embedding_norm)
    norms = {"pre": 2, "sandwich": 4, "post": 4, "parallel": 2 + bool(names.mlp_norm), "encoder": 2}
    for index, layer in enumerate(spec.layers):
        attention = layer.attention
        count += norms[spec.arrangement]
        count -= spec.arrangement == "post" and index == 0  # nothing is added to the embedding
        if isinstance(attention, AttentionSpec):
            count += (attention.rope is not None) + 2 * (attention.qk_norm is not None)
        else:
            count += 4 + bool(attention.query_rank)  # norms, both rotations, a copy
    return count


def _products(model: list[Piece], rates: Rates, rows: int, head_rows: int) -> list[Term]:
    """A term for each kind of matrices."""
    plain = next(piece for piece in model if piece.role != "router")
    terms = []
    for piece in model:
        count = head_rows if piece.role == "head" else rows
        if count:
            terms.append(_product_term(piece, plain, rates, count))
    return _together(terms)


def _product_term(piece: Piece, plain: Piece, rates: Rates, rows: int) -> Term:
    """Bytes that are read if rows are few, else multiplications; a router at the rate of `plain`.

    Of experts: as many as are taken by any of the tokens, if each takes its own at random.
    """
    active = 1.0 - (1.0 - piece.share) ** rows
    met = rows * piece.share / active  # tokens that one of those meets
    numbers = active * piece.num_parameters
    if piece.role == "router":
        bytes_each = plain.num_bytes / plain.num_parameters
        seconds = piece.num_bytes / bytes_each * rates.products[plain.form].at(met)
    else:
        seconds = numbers * rates.products[piece.form].at(met)
    if rows > FEW_ROWS:
        return Term(_name(piece), numbers * met, "multiplications", seconds)
    return Term(_name(piece), active * piece.num_bytes, "bytes", seconds)


def _name(piece: Piece) -> str:
    return {"head": "head", "expert": "experts"}.get(piece.role, "weights")


def _others(
    spec: ModelSpec, rates: Rates, rows: int, num_chosen: int, *, num_steps: int
) -> list[Term]:
    """The ops between products, and the engine."""
    count = num_row_ops(spec) + 2 * sum(isinstance(one.mlp, ExpertsSpec) for one in spec.layers)
    between = Term("other operations", count, "operations", count * rates.row_ops.at(rows))
    own_s = num_steps * STEP_S + num_chosen * REQUEST_S
    chosen_s = rates.sampling.at(num_chosen) if num_chosen else 0.0
    return [between, Term("engine and sampling", num_steps, "steps", own_s + chosen_s)]


def _together(terms: list[Term]) -> list[Term]:
    """Those of one name and unit as one."""
    sums: dict[tuple[str, str], Term] = {}
    for term in terms:
        key = term.name, term.unit
        before = sums.get(key, Term(term.name, 0.0, term.unit, 0.0))
        sums[key] = before._replace(
            amount=before.amount + term.amount, seconds=before.seconds + term.seconds
        )
    return list(sums.values())
