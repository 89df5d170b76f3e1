"""The causal language models of transformers, tiny and random: what each configuration needs to be small.

Does not know the census; a new architecture is a line here.
"""

from __future__ import annotations

from typing import Any

WIDTH, LAYERS = 64, 4

_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 128, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

# What a family needs beside the common keys; None takes a common key away.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "bitnet": {}, "biogpt": {}, "cohere": {}, "diffllama": {},
    "bamba": _SSM | {"attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "cohere2": _ALTERNATING,
    "deepseek_v2": _LATENT | {"n_group": 1, "n_shared_experts": 1, "topk_method": "greedy"},
    "deepseek_v3": _LATENT | {"n_group": 2},
    "dots1": _GROUPS | {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone4": _ALTERNATING,
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": None, "intermediate_size": None},
    "falcon_h1": _SSM | {"mamba_d_ssm": 128},
    "flex_olmo": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": _ALTERNATING,
    "gemma4_text": _ALTERNATING
    | {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0,
        "global_head_dim": 16, "enable_moe_block": True, "top_k_experts": 2,
    },
    "glm": {}, "glm4": {},
    "glm4_moe": _GROUPS,
    "gpt2": _GPT, "gpt_bigcode": _GPT, "gptj": _GPT | {"rotary_dim": 8},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gpt_oss": _ALTERNATING,
    "granite": {"residual_multiplier": 0.5},
    "granitemoe": {}, "granitemoeshared": {},
    "granitemoehybrid": _SSM | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    "helium": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {},
    "jamba": {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "jetmoe": {"kv_channels": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1,
                    "no_rope_layers": [1, 1, 1, 0]},
    # Without its identity experts, which can't be edited.
    "longcat_flash": _LATENT
    | {
        "num_layers": LAYERS, "num_hidden_layers": None, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
        "moe_topk": 2, "zero_expert_num": 0,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "minimax_m2": {}, "ministral": {}, "ministral3": {}, "mistral": {}, "mixtral": {},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "head_dim": None, "intermediate_size": None},
    "nemotron": {},
    "nemotron_h": _GROUPS
    | {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 48,
    },
    "olmo": {}, "olmo2": {}, "olmo3": _ALTERNATING, "olmoe": {},
    "opt": {"word_embed_proj_dim": WIDTH, "ffn_dim": 96},
    "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": {}, "qwen2": {},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3": {}, "qwen3_moe": {}, "qwen3_next": _LINEAR, "qwen3_5_text": _LINEAR, "qwen3_5_moe_text": _LINEAR,
    "recurrent_gemma": {"lru_width": WIDTH, "block_types": ["recurrent", "attention"]},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {}, "vaultgemma": {}, "xglm": {},
}  # fmt: skip

# Those with norms between their writers and the stream.
NORMED = (
    "afmoe", "exaone4", "flex_olmo", "gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3",
)  # fmt: skip


def tiny(family: str) -> Any:
    """A random model of the family, with norms and biases that are not what they start as."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    wanted = {key: value for key, value in (_COMMON | SPECIAL[family]).items() if value is not None}
    config = AutoConfig.for_model(family, **wanted)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias") or parameter.ndim >= 2:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


# Models that see: the language model's family, what it needs more, and what the tower needs.
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": LAYERS, "num_heads": 2, "out_hidden_size": WIDTH,
}  # fmt: skip
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {"model_type": "siglip_vision_model"}),
    "gemma4": ("gemma4_text", {}, {}),
    "llama4": (
        "llama4_text",
        {},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "llava": ("llama", {}, {"model_type": "clip_vision_model"}),
    "mistral3": ("mistral", {}, {"model_type": "pixtral"}),
    "qwen2_5_vl": ("qwen2", {"model_type": "qwen2_5_vl_text", **_MROPE}, {}),
    "qwen3_vl": ("qwen3", {"model_type": "qwen3_vl_text", **_MROPE}, {"deepstack_visual_indexes": [0]}),
    "qwen3_5": ("qwen3_5_text", {}, {}),
}


def seeing(family: str) -> Any:
    """A random model of a family that sees; its tower is as deep as its language model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    inner, more, tower = SEEING[family]
    text = {key: value for key, value in (_COMMON | SPECIAL[inner]).items() if value is not None}
    config = AutoConfig.for_model(
        family, text_config={"model_type": inner, **text, **more}, vision_config=_TOWER | tower
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model
