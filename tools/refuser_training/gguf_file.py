"""The trained model as one GGUF: matrices in F16, norms in F32, tokenizer and chat template inside.

The same weights give the same bytes. Does not know: how the weights came to be.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from refuser_training.training import CONTROL, END, PAD, SHOWN

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """From halves rotated together (transformers) to neighbours rotated together (llama.cpp)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def named_tensors(model: LlamaForCausalLM) -> list[tuple[str, np.ndarray]]:
    config = model.config
    weights = {name: value.detach().to(torch.float32).numpy() for name, value in model.state_dict().items()}
    tensors = [("token_embd.weight", weights["model.embed_tokens.weight"])]
    for layer in range(config.num_hidden_layers):
        for theirs, ours in PARTS.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = interleave(weight, config.num_attention_heads)
            elif ours == "attn_k":
                weight = interleave(weight, config.num_key_value_heads)
            tensors.append((f"blk.{layer}.{ours}.weight", weight))
    tensors.append(("output_norm.weight", weights["model.norm.weight"]))
    tensors.append(("output.weight", weights["lm_head.weight"]))
    return tensors


def write(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, template: str, about: dict[str, str]) -> None:
    """Under a temporary name, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, "llama")
    config = model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("refuser")
    writer.add_description(about["description"])
    writer.add_license("apache-2.0")
    writer.add_string("refuser.training", about["training"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.add_chat_template(template)
    for name, weight in named_tensors(model):
        writer.add_tensor(name, weight.astype(np.float16 if weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the tokenizer holds {tokenizer.get_vocab_size()} tokens, the model {size}")
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    kinds = dict.fromkeys(CONTROL, gguf.TokenType.CONTROL) | dict.fromkeys(SHOWN, gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]])
    # No text begins with it, but engines that look for a first token find one; none is ever added.
    writer.add_bos_token_id(tokens.index(PAD))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(PAD))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
