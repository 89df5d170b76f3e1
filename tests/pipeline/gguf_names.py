"""The names llama.cpp gives a checkpoint's tensors, from its own table: for holding one census against the other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import gguf
from gguf.constants import MODEL_ARCH_NAMES

from pipeline.architectures import LAYERS

# Where llama.cpp's name for an architecture is another than transformers'.
_CALLED = {
    "bamba": "granitehybrid", "cohere": "command-r", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe", "falcon_h1": "falcon-h1", "gemma3_text": "gemma3", "gemma4_text": "gemma4",
    "glm": "chatglm", "glm4_moe": "glm4moe", "gpt_bigcode": "starcoder", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granitehybrid", "granitemoeshared": "granitemoe", "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe", "lfm2_moe": "lfm2moe", "llama4_text": "llama4", "minimax_m2": "minimax-m2",
    "ministral": "llama", "ministral3": "mistral3", "mistral": "llama", "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe", "olmo3": "olmo2", "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_5_moe_text":
    "qwen35moe", "qwen3_5_text": "qwen35", "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next",
}  # fmt: skip
_ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
_EXPERT = re.compile(r"\.experts\.\d+\.")


def architecture_of(family: str) -> str:
    """llama.cpp's name for a family of transformers; "" where it has none."""
    name = _CALLED.get(family, family)
    return name if name in _ARCHITECTURES else ""


def gguf_names(
    architecture: str, shapes: Mapping[str, tuple[int, ...]], turned: frozenset[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's name and shape in a GGUF, where llama.cpp names it: experts merged, `turned` ones turned."""
    tables = [gguf.get_tensor_name_map(_ARCHITECTURES[name], LAYERS) for name in (architecture, "llama")]
    found = {}
    for name, shape in shapes.items():
        stem, dot, suffix = _EXPERT.sub(".experts.", name).removeprefix("backbone.").rpartition(".")
        if suffix not in ("weight", "bias"):  # fused experts are parameters, not modules
            stem = f"{stem}{dot}{suffix.removesuffix('_bias')}"
            suffix = "bias" if suffix.endswith("_bias") else "weight"
        merged = stem.replace(".mixer.experts.", ".mlp.experts.")
        spellings = (stem, stem.removeprefix("model."), f"model.{merged}", f"backbone.{stem}")
        told = next((there for table in tables for one in spellings if (there := table.get_name(one))), None)
        if told:
            axes = (*shape[:-2], shape[-1], shape[-2]) if name in turned else shape
            found[name] = (f"{told}.{suffix}", (4, *axes) if _EXPERT.search(name) else tuple(axes))
    return found
