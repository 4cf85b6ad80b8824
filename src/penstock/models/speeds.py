"""The rates of this machine for one model: what `native.rates` is asked, and with which shapes.

Owns the choice of what is measured. Imports no torch; nothing of a checkpoint is read.
"""

from __future__ import annotations

from penstock.layers.specs import AttentionSpec
from penstock.models.estimate import Rates, products_of
from penstock.models.spec import ModelSpec
from penstock.native import library, rates
from penstock.native.pool import Pool
from penstock.native.rates import Curve, Geometry
from penstock.quantization.placing import Formats

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
CONTEXTS = (128, 2048)  # tokens that requests read
CHUNK = 512  # tokens of the prompt whose attention is timed
_MOST_REQUESTS = 8  # whose attention is timed


def measured(
    spec: ModelSpec,
    formats: Formats,
    *,
    dtype: str,
    kv_dtype: str,
    num_threads: int | None = None,
    num_requests: int = 1,
) -> Rates:
    """Run what a model of this spec is made of for some seconds.

    Raises:
        EngineError: the native library cannot run it.
    """
    pool = Pool(library.load(), num_threads)
    geometry = geometry_of(spec)
    contexts = sorted({min(count, spec.max_context_len) for count in CONTEXTS})
    requests = tuple(sorted({1, min(max(num_requests, 1), _MOST_REQUESTS)}))
    chunk = min(CHUNK, contexts[-1])

    def attention_s(context_len: int, num_requests: int, num_new: int = 1) -> float:
        return rates.attention(
            pool,
            geometry,
            dtype=dtype,
            kv_dtype=kv_dtype,
            context_len=context_len,
            num_layers=spec.num_layers,
            num_requests=num_requests,
            num_new=num_new,
        )

    prompt_s = attention_s(chunk, 1, chunk)
    return Rates(
        products={
            form: rates.products(
                pool,
                form,
                shapes,
                ROWS,
                dtype=dtype,
                activation_bits=formats.activation_bits,
            )
            for form, shapes in products_of(spec, formats).items()
        },
        attention=tuple(
            (context, Curve(requests, tuple(attention_s(context, count) for count in requests)))
            for context in contexts
        ),
        pair_s=prompt_s / (chunk * (chunk + 1) // 2),
        row_ops=rates.row_ops(pool, spec.hidden_size, ROWS, dtype=dtype),
        sampling=rates.sampling(pool, spec.vocab_size, (1, _MOST_REQUESTS)),
    )


def geometry_of(spec: ModelSpec) -> Geometry:
    """Attention over a layer of this model."""
    attention = spec.layers[0].attention
    if isinstance(attention, AttentionSpec):
        size = attention.head_dim
        return Geometry(attention.num_heads, attention.num_kv_heads, size, size)
    _, size = attention.cached
    return Geometry(attention.num_heads, 1, size, attention.rank, is_latent=True)
