"""One table of model families: a tiny configuration of each, as its config.json would be. Used by all tests of families."""

from transformers import AutoConfig

VOCABULARY = 301
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip

# model_type -> what its config.json has beside SIZES; or all of it, where it has a vocabulary of its own.
FAMILIES = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 15.0, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi3": {},
    "gpt2": GPT2,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "mixtral": EXPERTS,
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, **EXPERTS,
    },
    "gpt_oss": {"head_dim": 16, "sliding_window": 16, **EXPERTS},
    "gemma3": {
        "text_config": {**SIZES, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4, "image_token_index": 300,
        "boi_token_index": 298, "eoi_token_index": 299,
    },
    "qwen2_vl": {
        "text_config": {**SIZES, "model_type": "qwen2_vl_text",
                        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "image_token_id": 300, "video_token_id": 299, "vision_start_token_id": 297, "vision_end_token_id": 298,
    },
    "llava": {
        "text_config": {**SIZES, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}, "image_token_index": 300,
    },
    "nanochat": {"final_logit_softcapping": 7.5},
    "vaultgemma": {"final_logit_softcapping": 30.0, "head_dim": 16},
    "cohere2": {"logit_scale": 0.25},
    "hyperclovax": {"logits_scaling": 0.5},  # a factor
    "granitemoe": {"logits_scaling": 4.0, **EXPERTS},  # a divisor
    "olmoe": EXPERTS,
    "falcon_mamba": {"state_size": 8, "conv_kernel": 4, "time_step_rank": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
}  # fmt: skip


def config(family, **changes):
    """Its tiny configuration."""
    own = FAMILIES[family]
    whole = "vocab_size" in own or "text_config" in own
    return AutoConfig.for_model(family, **{**({} if whole else SIZES), **own, **changes})
