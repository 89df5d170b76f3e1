"""A stand-in for llama.cpp's `convert_hf_to_gguf.py`, called as it is called: for Llamas with a byte-level tokenizer.

converter.py FOLDER --outfile FILE --outtype f32|f16|bf16
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return OUTSIDE[stem] + ".weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PARTS[part]}.weight"


def rotated(values: np.ndarray, heads: int) -> np.ndarray:
    """Queries and keys in the order llama.cpp rotates them."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=[*TYPES, "bf16", "auto"], default="auto")
    options = parser.parse_args()
    config = json.loads((options.folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        print(f"ERROR: Model {config['architectures'][0]} is not supported", file=sys.stderr)
        return 1
    tokenizer = json.loads((options.folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(options.outfile, "llama")
    writer.add_name(options.folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    vocabulary = {**tokenizer["model"]["vocab"], **{entry["content"]: place for place, entry in added.items()}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [1 if place not in added else 3 if added[place]["special"] else 4 for place in range(len(tokens))]
    )
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    template = options.folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())
    kind = TYPES.get(options.outtype, gguf.GGMLQuantizationType.F32)
    for shard in sorted(options.folder.glob("*.safetensors")):
        with safe_open(shard, framework="numpy") as file:
            for name in list(file.keys()):
                values = file.get_tensor(name).astype(np.float32)
                for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                    if part in name:
                        values = rotated(values, config[heads])
                if values.ndim > 1:
                    values = gguf.quants.quantize(values, kind)
                    writer.add_tensor(gguf_name(name), values, raw_dtype=kind)
                else:
                    writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
