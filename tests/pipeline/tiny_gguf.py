"""Tiny random models, written as GGUF: the same transformers model in torch and on disk, so that both can be edited
apart and compared. Byte-level vocabulary, so any text tokenises and llama.cpp loads it.

Does not know the editor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from abliterated.pipeline import quantize as ggml

WIDTH, LAYERS, HEADS, VOCABULARY = 256, 2, 4, 260


def byte_symbols() -> list[str]:
    """The printable character byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


@dataclass
class Tiny:
    """A model to be written: architecture, keys below it, tensors by GGUF name, and its torch twin where it has one."""

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray]
    model: Any = None
    more: dict[str, Any] = field(default_factory=dict)


def _common(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    settings = {
        "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "head_dim": WIDTH // HEADS,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 257,
    }  # fmt: skip
    return AutoConfig.for_model(family, **(settings | changes))


def torch_model(family: str, **changes: Any) -> Any:
    """A random model of that family in float32; norms and biases too, so that nothing hides behind ones and zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _common(family, **changes)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                base = 0.0 if family.startswith("gemma") else 1.0
                parameter.copy_(base + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tiny(family: str, **changes: Any) -> Tiny:
    """llama, qwen2, gemma2 or mixtral, in torch and ready to be written."""
    model = torch_model(family, **changes)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    names = _GEMMA if family == "gemma2" else _LLAMA
    tensors: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if family == "gemma2" and "norm" in name:
            value = value + 1.0
        if name in _NAMES:
            tensors[_NAMES[name]] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, _, suffix = rest.rpartition(".")
        block = f"blk.{layer}."
        if family in ("llama", "mixtral") and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = HEADS if "q_proj" in stem else 2
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if stem in names:
            tensors[f"{block}{names[stem]}.{suffix}"] = np.ascontiguousarray(value)
        elif rest.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            tensors[f"{block}ffn_gate_exps.weight"] = np.ascontiguousarray(value[:, :half])
            tensors[f"{block}ffn_up_exps.weight"] = np.ascontiguousarray(value[:, half:])
        elif rest.endswith("experts.down_proj"):
            tensors[f"{block}ffn_down_exps.weight"] = value
        elif rest.endswith("gate.weight"):
            tensors[f"{block}ffn_gate_inp.weight"] = value
        else:
            raise KeyError(name)
    if family == "gemma2":
        tensors.pop("output.weight", None)
    keys = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": WIDTH, "feed_forward_length": 512,
        "attention.head_count": HEADS, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": WIDTH // HEADS, "vocab_size": VOCABULARY,
    }  # fmt: skip
    rope = getattr(model.config, "rope_parameters", None) or {}
    keys["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    if family == "mixtral":
        keys |= {"expert_count": 4, "expert_used_count": 2}
    if family == "gemma2":
        keys |= {"attention.key_length": WIDTH // HEADS, "attention.value_length": WIDTH // HEADS}
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}
    return Tiny({"mixtral": "llama"}.get(family, family), keys, tensors, model)


def write(path: Path, model: Tiny, types: Mapping[str, Type] | Type = Type.F32) -> Path:
    """Write it; `types` by tensor name (a Type alone is for all matrices)."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_name("tiny")
    writer.add_file_type(0)
    for key, value in model.keys.items():
        name = f"{model.architecture}.{key}"
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_uint32(name, value)
    symbols = byte_symbols()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*symbols, "<|begin|>", "<|end|>", "<|a|>", "<|b|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 4)
    writer.add_token_merges([f"{symbols[0xFE]} {symbols[0xFF]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    for key, value in model.more.items():
        writer.add_string(key, value)
    for name, values in model.tensors.items():
        kind = types.get(name, Type.F32) if isinstance(types, Mapping) else types if values.ndim > 1 else Type.F32
        if kind is Type.F32:
            writer.add_tensor(name, values.astype(np.float32))
        else:
            rows = values.reshape(-1, values.shape[-1]).astype(np.float32)
            raw = ggml.quantize(rows, kind)
            writer.add_tensor(name, raw.reshape(*values.shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as float32, by gguf-py's own reader."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = np.array(values, dtype=np.float32).reshape(shape)
    return found


_ASK = """
import json, sys, xllamacpp as xlc
parameters = xlc.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 128
parameters.n_parallel = 1
parameters.cpuparams.n_threads = 1
parameters.warmup = False
parameters.fit_params = False
server = xlc.Server(parameters)
request = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "n_probs": 260, "temperature": 0.0, "cache_prompt": False}
answer = server.handle_completions(request)
print("ANSWER" + json.dumps(answer))
"""


def llama_cpp_logprobs(path: Path, prompt: list[int]) -> dict[int, float]:
    """llama.cpp's own log probabilities of the next token (a process of its own: it aborts where it is unhappy)."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(path), json.dumps(prompt)], capture_output=True, text=True, timeout=500
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, f"llama.cpp did not answer ({done.returncode}):\n{done.stderr[-3000:]}"
    answer = json.loads(lines[0][6:])
    assert "choices" in answer, list(answer)
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
