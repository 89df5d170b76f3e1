"""What transformers passes over when it reads a GGUF, put right: the model measured must be the one llama.cpp runs.

Found by comparing the two's logits. Does not know tensors' types or how anything is measured.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from abliterated.pipeline.gguf_file import GgufFile
from abliterated.pipeline.split_gguf import SplitSource, read_model

# Widths transformers leaves at its own default.
EXPERT_WIDTHS: Final = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
ROPE_FACTORS: Final = "rope_freqs.weight"
# Gemmas whose attention is scaled by the width of a head as it would be, not as it is: told by their depth.
GEMMA_27B: Final = {"gemma2": 46, "gemma3": 62}


def correct_config(structure: GgufFile, config: Any) -> Any:
    """Put right what the reader passed over in the configuration, before a model is made by it."""
    for key, name in EXPERT_WIDTHS.items():
        width = structure.values.get(f"{structure.architecture}.{key}")
        if isinstance(width, int) and width > 0 and hasattr(config, name):
            setattr(config, name, width)
    return config


def correct(structure: GgufFile, model: Any) -> None:
    """Put right what the reader passed over in this model."""
    _rope_factors(structure, model)
    _gemma_scale(structure, model)


def _rope_factors(structure: GgufFile, model: Any) -> None:
    """Llama 3's rotary scaling, which a GGUF holds as a tensor of divisors."""
    stored = read_model(structure.path)
    found = next((tensor for tensor in stored.whole.tensors if tensor.name == ROPE_FACTORS), None)
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if found is None or rotary is None or found.type.name != "F32":
        return
    with SplitSource(stored, lambda: False) as source:
        factors = torch.from_numpy(source.array(found.start, found.size).view("<f4"))
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(rotary, name, None)
        if isinstance(frequencies, torch.Tensor) and frequencies.numel() == factors.numel():
            setattr(rotary, name, frequencies / factors.to(frequencies.device))


def _gemma_scale(structure: GgufFile, model: Any) -> None:
    """Gemma 2's and 3's attention scale, which no key of a GGUF holds; llama.cpp knows it by the model's size."""
    depth = GEMMA_27B.get(structure.architecture)
    if depth is None:
        return
    config = model.config.get_text_config()
    width = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == depth else config.head_dim
    config.query_pre_attn_scalar = width
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module, "scaling"):
            module.scaling = width**-0.5
