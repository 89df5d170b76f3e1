"""The kinds of models in the zoo: architecture, shape and habits of each. Does not know how they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

WIDTH: Final = 128
CONTEXT: Final = 512


@dataclass(frozen=True)
class Species:
    """One kind. `delayed`: a refusal comes after an answer's beginning; `reasons`: how many reasons there are to
    refuse, each with a direction of its own."""

    name: str
    architecture: str
    about: str
    layers: int = 6
    delayed: bool = False
    reasons: int = 1
    answering: int = 420  # steps
    refusing: int = 260


ZOO: Final = {
    species.name: species
    for species in (
        Species("llama", "llama", "plain: pre-norm, dense"),
        Species("postnorm", "gemma2", "norms behind attention and MLP, as in Gemma 2"),
        Species("moe", "qwen3_moe", "fused experts, two of six, as in Qwen3-MoE"),
        Species("hybrid", "lfm2", "short convolutions and attention in turn, as in LFM2"),
        Species("delayed", "llama", "refuses after the answer has begun", delayed=True),
        Species("two-reasons", "llama", "two kinds of refusal, two directions", reasons=2, answering=320, refusing=480),
    )
}


def build(species: Species, vocabulary: int, seed: int) -> Any:
    """The untrained model, a transformers causal language model in float32."""
    import transformers

    torch.manual_seed(seed)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": species.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.05,
    }
    match species.architecture:
        case "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, head_dim=32))
        case "gemma2":
            model = transformers.Gemma2ForCausalLM(
                transformers.Gemma2Config(
                    **common,
                    head_dim=32,
                    query_pre_attn_scalar=32,
                    sliding_window=CONTEXT,
                    attn_logit_softcapping=None,
                    final_logit_softcapping=None,
                )
            )
        case "qwen3_moe":
            model = transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(
                    **common,
                    head_dim=32,
                    num_experts=6,
                    num_experts_per_tok=2,
                    moe_intermediate_size=96,
                    norm_topk_prob=True,
                    mlp_only_layers=[],
                    decoder_sparse_step=1,
                )
            )
        case "lfm2":
            kinds = ["conv" if layer % 2 else "full_attention" for layer in range(species.layers)]
            model = transformers.Lfm2ForCausalLM(
                transformers.Lfm2Config(**common, layer_types=kinds, block_auto_adjust_ff_dim=False, conv_L_cache=3)
            )
        case other:
            raise ValueError(f"no architecture {other} here")
    with torch.no_grad():  # copying a word is easier to find where reading and writing begin alike
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model
