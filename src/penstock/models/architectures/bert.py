"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020).

Encoders of whole texts, alone or under a classifier. What was made to guess masked words is read as
the encoder that it has; the head that guesses is not loaded.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import AttentionSpec, ClassifierSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import LayerSpec, ModelSpec, Names

_NAMES = Names(
    embedding="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    block="encoder.layer.{}",
    attention_norm="attention.output.LayerNorm",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    output="attention.output.dense",
    mlp_norm="output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
)


def read(config: ConfigReader) -> ModelSpec:
    """Read a config of BERT's kin, `...Model`, `...ForMaskedLM` or `...ForSequenceClassification`.

    Positions of RoBERTa's kin begin behind the id of padding, as fairseq counts them.
    """
    config.expect("position_embedding_type", "absolute")
    config.refuse("is_decoder", "add_cross_attention", "embedding_size")
    is_bert = config.architecture.startswith("Bert")
    num_heads, head_dim = config.equal_heads("hidden_size", "num_attention_heads")
    first_position = 0 if is_bert else config.count("pad_token_id", 1) + 1
    num_positions = config.size("max_position_embeddings", 512)
    if num_positions <= first_position:
        raise config.error("max_position_embeddings", f"more than `{first_position}`")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=None,
            has_bias=True,
            has_output_bias=True,
            is_causal=False,
        ),
        mlp=MLPSpec(
            size=config.size("intermediate_size"),
            activation=config.activation("hidden_act", "gelu"),
            is_gated=False,
            has_bias=True,
        ),
    )
    prefix = "bert." if is_bert else "roberta."
    spec = ModelSpec(
        architecture=config.architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.num_layers,
        norm=NormSpec(eps=config.factor("layer_norm_eps", 1e-12), kind="layer", has_bias=True),
        max_context_len=num_positions - first_position,
        tied_embeddings=False,
        dtype=config.dtype,
        names=replace(
            _NAMES,
            prefixes=(("", prefix),),
            ignored=("cls.", "lm_head.", "pooler.", f"{prefix}pooler."),
        ),
        arrangement="encoder",
        has_final_norm=False,
        num_positions=num_positions,
        first_position=first_position,
        num_token_types=config.size("type_vocab_size", 2, high=64),
        has_head=False,
    )
    if config.architecture.endswith("ForSequenceClassification"):
        return _classifier(spec, config.num_labels, is_bert=is_bert)
    return spec


def _classifier(spec: ModelSpec, num_labels: int, *, is_bert: bool) -> ModelSpec:
    """Of the first token: BERT's by its pooler and a map, RoBERTa's by two maps of its own."""
    names = (
        ("pooler.dense", "classifier") if is_bert else ("classifier.dense", "classifier.out_proj")
    )
    classifier = ClassifierSpec(
        num_labels=num_labels, dense=names[0], output=names[1], has_bias=True
    )
    ignored = () if is_bert else spec.names.ignored
    return replace(spec, classifier=classifier, names=replace(spec.names, ignored=ignored))
