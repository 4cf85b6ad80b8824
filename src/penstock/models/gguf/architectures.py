"""The config of each architecture that a GGUF file can name.

Owns one function for each; llama.cpp's `conversion/` and `src/models/` are their source. Knows no
weights but their names and shapes. Invariant: what a file does not tell because llama.cpp takes it
for granted is a constant here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from penstock.errors import UnsupportedModel
from penstock.gguf.header import shown
from penstock.gguf.reader import GGUFFile
from penstock.models.gguf.config import Config, Sources, common

_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # its layers: scores are scaled in another way there


def config_of(file: GGUFFile) -> Config:
    """See `penstock.models.gguf_model.read_config`."""
    sources = Sources(file)
    read = _READERS.get(sources.name)
    if read is None:
        raise UnsupportedModel(
            f"`general.architecture` is `{shown(sources.name)}` in `{file.files[0]}`, which is not "
            "known.",
            hint=f"known are {', '.join(f'`{name}`' for name in sorted(_READERS))}.",
        )
    config = common(sources)
    config |= read(sources, config)
    return config


def _named(architecture: str, model_type: str, **others: Any) -> Config:
    return {"architectures": [architecture], "model_type": model_type, **others}


def _experts(sources: Sources) -> Config:
    """Sizes of a mixture; those of the experts from their weights, which tell them always."""
    gate = sources.in_layer("ffn_gate_exps.weight") or sources.in_layer("ffn_up_exps.weight")
    return {
        "num_experts": sources.told.integer("expert_count"),
        "num_experts_per_tok": sources.told.integer("expert_used_count"),
        "moe_intermediate_size": sources.rows(gate or "blk.0.ffn_gate_exps.weight", 1),
    }


def _layer_types(sources: Sources, period: int) -> list[str]:
    """Which layers see a window: as the file says, else all but each `period`-th."""
    key = "attention.sliding_window_pattern"
    if isinstance(sources.whole.raw(f"{sources.name}.{key}"), np.ndarray):
        slides = [bool(number) for number in sources.told.integers(key)]
        if len(slides) < sources.num_layers:
            raise sources.told.error(key, f"`{sources.num_layers}` flags")
    else:
        period = sources.told.integer(key, period)
        slides = [not period or layer % period < period - 1 for layer in range(sources.num_layers)]
    names = {True: "sliding_attention", False: "full_attention"}
    return [names[slides[layer]] for layer in range(sources.num_layers)]


def _llama(sources: Sources, config: Config) -> Config:
    if sources.told.integer("expert_count", 0):
        found = _experts(sources)
        return _named(
            "MixtralForCausalLM",
            "mixtral",
            num_local_experts=found["num_experts"],
            num_experts_per_tok=found["num_experts_per_tok"],
            intermediate_size=found["moe_intermediate_size"],
        )
    return _named(
        "LlamaForCausalLM",
        "llama",
        mlp_bias=sources.in_layer("ffn_up.bias") is not None,
    )


def _smollm3(sources: Sources, config: Config) -> Config:
    layers = range(1, sources.num_layers + 1)
    return _named(
        "SmolLM3ForCausalLM",
        "smollm3",
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[int(layer % 4 != 0) for layer in layers],
    )


def _granite(sources: Sources, config: Config) -> Config:
    told = sources.told
    return _named(
        "GraniteForCausalLM",
        "granite",
        mlp_bias=sources.in_layer("ffn_up.bias") is not None,
        attention_multiplier=told.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        embedding_multiplier=told.number("embedding_scale", 1.0),
        residual_multiplier=told.number("residual_scale", 1.0),
        logits_scaling=told.number("logit_scale", 1.0),
    )


def _qwen2(sources: Sources, config: Config) -> Config:
    return _named("Qwen2ForCausalLM", "qwen2", use_sliding_window=False)


def _qwen3(sources: Sources, config: Config) -> Config:
    return _named("Qwen3ForCausalLM", "qwen3", use_sliding_window=False)


def _qwen2_moe(sources: Sources, config: Config) -> Config:
    shared = sources.in_layer("ffn_gate_shexp.weight")
    return _named(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        **_experts(sources),
        shared_expert_intermediate_size=sources.rows(shared or "blk.0.ffn_gate_shexp.weight"),
        qkv_bias=config["attention_bias"],
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=False,
    )


def _qwen3_moe(sources: Sources, config: Config) -> Config:
    return _named(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **_experts(sources),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=False,
    )


def _olmoe(sources: Sources, config: Config) -> Config:
    found = _experts(sources)
    size = found.pop("moe_intermediate_size")
    clip = sources.told.number("attention.clamp_kqv", 0.0)
    return _named(
        "OlmoeForCausalLM",
        "olmoe",
        **found,
        intermediate_size=size,
        norm_topk_prob=False,
        clip_qkv=clip or None,
    )


def _olmo2(sources: Sources, config: Config) -> Config:
    window = sources.told.integer("attention.sliding_window", 0)
    if not window:
        return _named("Olmo2ForCausalLM", "olmo2")
    types = _layer_types(sources, 4)
    return _named("Olmo3ForCausalLM", "olmo3", sliding_window=window, layer_types=types)


def _gemma(sources: Sources, config: Config) -> Config:
    activation = "gelu_pytorch_tanh"
    return _named("GemmaForCausalLM", "gemma", hidden_act=activation, hidden_activation=activation)


def _scalar(sources: Sources, config: Config) -> int:
    """Scores are divided by its root."""
    if sources.num_layers == _GEMMA_27B[sources.name]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(sources: Sources, config: Config) -> Config:
    told = sources.told
    return _gemma(sources, config) | _named(
        "Gemma2ForCausalLM",
        "gemma2",
        query_pre_attn_scalar=_scalar(sources, config),
        attn_logit_softcapping=told.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=told.number("final_logit_softcapping", 30.0),
        sliding_window=told.integer("attention.sliding_window", 4096),
        layer_types=_layer_types(sources, 2),
    )


def _gemma3(sources: Sources, config: Config) -> Config:
    told = sources.told
    window = told.integer("attention.sliding_window", 0)
    types = _layer_types(sources, 6) if window else ["full_attention"] * sources.num_layers
    return _gemma(sources, config) | _named(
        "Gemma3ForCausalLM",
        "gemma3_text",
        query_pre_attn_scalar=_scalar(sources, config),
        attn_logit_softcapping=None,
        final_logit_softcapping=told.number("final_logit_softcapping", 0.0) or None,
        sliding_window=window or config["max_position_embeddings"],
        layer_types=types,
        rope_theta=told.number("rope.freq_base", 1_000_000.0),
        rope_local_base_freq=told.number("rope.freq_base_swa", 10000.0),
    )


def _phi3(sources: Sources, config: Config) -> Config:
    told = sources.told
    key = "rope.scaling.original_context_length"
    return _named(
        "Phi3ForCausalLM",
        "phi3",
        sliding_window=told.integer("attention.sliding_window", 0) or None,
        original_max_position_embeddings=told.integer(key, config["max_position_embeddings"]),
    )


def _command_r(sources: Sources, config: Config) -> Config:
    return _named(
        "CohereForCausalLM",
        "cohere",
        layer_norm_eps=_eps(sources),
        logit_scale=sources.told.number("logit_scale", 1.0),
        use_qk_norm=sources.in_layer("attn_q_norm.weight") is not None,
    )


def _starcoder2(sources: Sources, config: Config) -> Config:
    return _named(
        "Starcoder2ForCausalLM",
        "starcoder2",
        norm_epsilon=_eps(sources),
        hidden_act="gelu_pytorch_tanh",
        use_bias=config["attention_bias"],
        sliding_window=sources.told.integer("attention.sliding_window", 0) or None,
    )


def _gpt2(sources: Sources, config: Config) -> Config:
    return _named(
        "GPT2LMHeadModel",
        "gpt2",
        n_positions=sources.rows("position_embd.weight"),
        n_embd=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_inner=config.get("intermediate_size"),
        layer_norm_epsilon=_eps(sources),
        activation_function="gelu_new",
    )


def _gpt_neox(sources: Sources, config: Config) -> Config:
    share = config.get("partial_rotary_factor", 1.0)
    return _named(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        hidden_act="gelu",
        layer_norm_eps=_eps(sources),
        rotary_pct=share,
        rotary_emb_base=config["rope_theta"],
        use_parallel_residual=sources.told.flag("use_parallel_residual", True),
        attention_bias=sources.in_layer("attn_qkv.bias") is not None,
    )


def _falcon(sources: Sources, config: Config) -> Config:
    has_two_norms = sources.in_layer("attn_norm_2.weight") is not None
    num_kv_heads = config["num_key_value_heads"]
    config.pop("head_dim")  # there, it is always the quotient
    is_new = has_two_norms or num_kv_heads > 1
    return _named(
        "FalconForCausalLM",
        "falcon",
        num_kv_heads=num_kv_heads,
        multi_query=not is_new,
        new_decoder_architecture=is_new,
        num_ln_in_parallel_attn=(2 if has_two_norms else 1) if is_new else None,
        parallel_attn=True,
        alibi=False,
        bias=sources.in_layer("attn_qkv.bias") is not None,
        layer_norm_epsilon=_eps(sources),
        ffn_hidden_size=config.get("intermediate_size"),
        activation="gelu",
    )


def _gpt_oss(sources: Sources, config: Config) -> Config:
    found = _experts(sources)
    scaling = config.get("rope_scaling")
    if scaling and scaling["rope_type"] == "yarn":
        beta = {"beta_fast": 32.0, "beta_slow": 1.0}
        config["rope_scaling"] = beta | scaling | {"truncate": False}
    return _named(
        "GptOssForCausalLM",
        "gpt_oss",
        num_local_experts=found["num_experts"],
        num_experts_per_tok=found["num_experts_per_tok"],
        intermediate_size=found["moe_intermediate_size"],
        sliding_window=sources.told.integer("attention.sliding_window"),
        layer_types=_layer_types(sources, 2),
        swiglu_limit=7.0,
    )


def _bert(sources: Sources, config: Config) -> Config:
    kind = sources.whole.text("tokenizer.ggml.model", "bert")
    if kind != "bert":
        raise UnsupportedModel(
            f"`tokenizer.ggml.model` is `{shown(kind)}` in `{sources.told.file}`, a model of "
            "RoBERTa's kin; of these, GGUF files are not read.",
            hint="use the checkpoint that it was made of.",
        )
    return _named(
        "BertModel",
        "bert",
        hidden_act="gelu",
        layer_norm_eps=_eps(sources),
        max_position_embeddings=sources.rows("position_embd.weight"),
        type_vocab_size=sources.rows("token_types.weight"),
        tie_word_embeddings=True,
    )


def _eps(sources: Sources) -> float:
    return sources.told.number("attention.layer_norm_epsilon")


def _deepseek2(sources: Sources, config: Config) -> Config:
    """DeepSeek-V2 and V3. Where keys end in `_mla`, those without are of the joined head."""
    told = sources.told
    rope_dim = told.integer("rope.dimension_count")
    key_dim = told.integer("attention.key_length_mla", told.integer("attention.key_length"))
    value_dim = told.integer("attention.value_length_mla", told.integer("attention.value_length"))
    is_sigmoid = told.integer("expert_gating_func", 1) == 2
    num_groups = told.integer("expert_group_count", 0) or 1
    found = _experts(sources)
    scaling = config.get("rope_scaling")
    if scaling and "rope.scaling.yarn_log_multiplier" in told:
        scale = told.number("rope.scaling.yarn_log_multiplier") * 10
        config["rope_scaling"] = scaling | {"mscale": scale, "mscale_all_dim": scale}
    greedy = "group_limited_greedy" if num_groups > 1 else "greedy"
    config.pop("partial_rotary_factor", None)
    config.pop("head_dim")
    return _named(
        "DeepseekV3ForCausalLM" if is_sigmoid else "DeepseekV2ForCausalLM",
        "deepseek_v3" if is_sigmoid else "deepseek_v2",
        num_key_value_heads=config["num_attention_heads"],
        q_lora_rank=None
        if sources.in_layer("attn_q.weight")
        else told.integer("attention.q_lora_rank"),
        kv_lora_rank=told.integer("attention.kv_lora_rank"),
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=key_dim - rope_dim,
        v_head_dim=value_dim,
        n_routed_experts=found["num_experts"],
        num_experts_per_tok=found["num_experts_per_tok"],
        moe_intermediate_size=found["moe_intermediate_size"],
        n_shared_experts=told.integer("expert_shared_count", 0) or None,
        first_k_dense_replace=told.integer("leading_dense_block_count", 0),
        moe_layer_freq=1,
        routed_scaling_factor=told.number("expert_weights_scale", 1.0),
        norm_topk_prob=told.flag("expert_weights_norm", False),
        scoring_func="sigmoid" if is_sigmoid else "softmax",
        topk_method="noaux_tc" if is_sigmoid else greedy,
        n_group=num_groups,
        topk_group=told.integer("expert_group_used_count", 0) or 1,
    )


_READERS: dict[str, Callable[[Sources, Config], Config]] = {
    "bert": _bert,
    "command-r": _command_r,
    "deepseek2": _deepseek2,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
