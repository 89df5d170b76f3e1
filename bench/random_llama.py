"""Llamas of random weights, written on the spot: a folder of safetensors in bf16, or a GGUF in a mix of ours.

One pool of random numbers serves all tensors, and one quantisation all layers: speed is what they are for, not sense.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from abliterated.pipeline import mixes
from abliterated.pipeline.gguf_file import Tensor
from abliterated.pipeline.quantize import quantize, to_bfloat16


@dataclass(frozen=True)
class Shape:
    """How large a Llama is."""

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.width // self.heads

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Hugging Face name → shape, rows first, and GGUF name; four query heads share a key head, output tied."""
        keys = self.width // 4
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "model.embed_tokens.weight": ((self.vocabulary, self.width), "token_embd.weight"),
            "model.norm.weight": ((self.width,), "output_norm.weight"),
        }
        for layer in range(self.layers):
            for name, shape, short in (
                ("input_layernorm", (self.width,), "attn_norm"),
                ("self_attn.q_proj", (self.width, self.width), "attn_q"),
                ("self_attn.k_proj", (keys, self.width), "attn_k"),
                ("self_attn.v_proj", (keys, self.width), "attn_v"),
                ("self_attn.o_proj", (self.width, self.width), "attn_output"),
                ("post_attention_layernorm", (self.width,), "ffn_norm"),
                ("mlp.gate_proj", (self.inner, self.width), "ffn_gate"),
                ("mlp.up_proj", (self.inner, self.width), "ffn_up"),
                ("mlp.down_proj", (self.width, self.inner), "ffn_down"),
            ):
                found[f"model.layers.{layer}.{name}.weight"] = (shape, f"blk.{layer}.{short}.weight")
        return found

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape, _ in self.tensors().values())


WHOLE = Shape(width=2048, inner=8192, layers=16, heads=32, vocabulary=128_256)  # 1.24 B
QUICK = Shape(width=768, inner=3072, layers=10, heads=12, vocabulary=16_384)  # 0.1 B


def shape_for(quick: bool) -> Shape:
    return QUICK if quick else WHOLE


def write_folder(folder: Path, shape: Shape) -> int:
    """config.json and model.safetensors; the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.width,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 4, "head_dim": shape.head, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    at, header = 0, {}
    for name, (lengths, _) in shape.tensors().items():
        size = 2 * int(np.prod(lengths))
        header[name] = {"dtype": "BF16", "shape": lengths, "data_offsets": [at, at + size]}
        at += size
    front = json.dumps(header).encode()
    front = front.ljust(-(-len(front) // 8) * 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(front)) + front)
        for number, (lengths, _) in enumerate(shape.tensors().values()):
            file.write(to_bfloat16(_numbers(lengths, number)))
    return max(2 * int(np.prod(lengths)) for lengths, _ in shape.tensors().values())


def write_gguf(path: Path, shape: Shape, mix: str) -> None:
    """The same shape as GGUF, its types as our rule for that mix has them."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": shape.layers, "context_length": 2048, "embedding_length": shape.width,
        "feed_forward_length": shape.inner, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads // 4, "rope.dimension_count": shape.head,
        "vocab_size": shape.vocabulary,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_file_type(int(mixes.MIXES[mix][2]))
    made: dict[tuple[tuple[int, ...], Type], NDArray[np.uint8]] = {}
    for number, (lengths, name) in enumerate(shape.tensors().values()):
        own = Tensor(name, lengths, Type.F32 if len(lengths) == 1 else Type.BF16, 0, 0)
        kind = mixes.wanted_type(mix, own, shape.layers)
        if (lengths, kind) not in made:
            made[lengths, kind] = quantize(_numbers(lengths, number).reshape(-1, lengths[-1]), kind)
        raw = made[lengths, kind]
        if len(lengths) == 1:
            writer.add_tensor(name, raw.view(np.float32).reshape(lengths))
        else:
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_POOL: list[NDArray[np.float32]] = []


def _numbers(lengths: tuple[int, ...], number: int) -> NDArray[np.float32]:
    """Random numbers for the tensor of that number: ones for norms, else from the pool, which starts elsewhere."""
    if len(lengths) == 1:
        return np.ones(lengths, dtype=np.float32)
    if not _POOL:
        _POOL.append(np.random.default_rng(0).standard_normal((1 << 22) + 4099, dtype=np.float32) * np.float32(0.02))
    pool = np.roll(_POOL[0], number * 7919)  # a length that is no power of two: no row is another's copy
    return np.resize(pool, lengths)
