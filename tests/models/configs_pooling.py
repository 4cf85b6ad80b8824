"""Small random configs of the architectures that are pooled, for their parity test."""

from __future__ import annotations

from tests.models.configs_dense import BASE, Variants, variants, without

_BERT = without(BASE, "num_key_value_heads") | {"pad_token_id": 0}
_ROBERTA = _BERT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_ONE = {"num_labels": 1}
_THREE = {"num_labels": 3}
_CAUSAL = BASE | {"pad_token_id": 0}

POOLING_CONFIGS: dict[str, Variants] = {
    "BertModel": variants(
        _BERT,
        types={"type_vocab_size": 3},
        relu={"hidden_act": "relu"},
        tanh={"hidden_act": "gelu_new"},
    ),
    "BertForMaskedLM": variants(_BERT),
    "BertForSequenceClassification": variants(_BERT | _THREE, one=_ONE),
    "RobertaModel": variants(_ROBERTA, padding={"pad_token_id": 5}),
    "RobertaForMaskedLM": variants(_ROBERTA),
    "RobertaForSequenceClassification": variants(_ROBERTA | _ONE, three=_THREE),
    "XLMRobertaModel": variants(_ROBERTA),
    "XLMRobertaForMaskedLM": variants(_ROBERTA),
    "XLMRobertaForSequenceClassification": variants(_ROBERTA | _ONE, three=_THREE),
    "LlamaModel": variants(_CAUSAL),
    "LlamaForSequenceClassification": variants(_CAUSAL | _ONE, three=_THREE),
    "MistralModel": variants(_CAUSAL | {"head_dim": 12}),
    "MistralForSequenceClassification": variants(_CAUSAL | {"head_dim": 12} | _ONE),
    "Qwen2Model": variants(_CAUSAL),
    "Qwen2ForSequenceClassification": variants(_CAUSAL | _THREE),
    "Qwen3Model": variants(_CAUSAL | {"head_dim": 12}),
    "Qwen3ForSequenceClassification": variants(_CAUSAL | {"head_dim": 12} | _ONE, three=_THREE),
}
