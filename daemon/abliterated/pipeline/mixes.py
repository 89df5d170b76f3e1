"""Which type each tensor gets where a recipe asks for another quantisation: our own simple rule.

Matrices get the type asked for; a mix (…_M) gives the tensors whose errors cost most one of more bits. What llama.cpp
reads only as floats stays as it is. Pure; does not know files or numbers.
"""

from __future__ import annotations

import re
from typing import Final

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from abliterate.contract.errors import RecipeError
from abliterated.pipeline.gguf_file import Tensor

# What a recipe may ask for: the type of most matrices, of the sensitive ones, and the file type's number.
MIXES: Final = {
    "F32": (Type.F32, Type.F32, FileType.ALL_F32),
    "F16": (Type.F16, Type.F16, FileType.MOSTLY_F16),
    "BF16": (Type.BF16, Type.BF16, FileType.MOSTLY_BF16),
    "Q8_0": (Type.Q8_0, Type.Q8_0, FileType.MOSTLY_Q8_0),
    "Q6_K": (Type.Q6_K, Type.Q6_K, FileType.MOSTLY_Q6_K),
    "Q5_K_M": (Type.Q5_K, Type.Q6_K, FileType.MOSTLY_Q5_K_M),
    "Q5_K_S": (Type.Q5_K, Type.Q5_K, FileType.MOSTLY_Q5_K_S),
    "Q4_K_M": (Type.Q4_K, Type.Q6_K, FileType.MOSTLY_Q4_K_M),
    "Q4_K_S": (Type.Q4_K, Type.Q4_K, FileType.MOSTLY_Q4_K_S),
    "Q3_K_M": (Type.Q3_K, Type.Q5_K, FileType.MOSTLY_Q3_K_M),
    "Q5_0": (Type.Q5_0, Type.Q5_0, FileType.MOSTLY_Q5_0),
    "Q5_1": (Type.Q5_1, Type.Q5_1, FileType.MOSTLY_Q5_1),
    "Q4_0": (Type.Q4_0, Type.Q4_0, FileType.MOSTLY_Q4_0),
    "Q4_1": (Type.Q4_1, Type.Q4_1, FileType.MOSTLY_Q4_1),
}
# Routers, convolutions, recurrences' small matrices, positions and what stands beside the language model.
_FLOATS: Final = re.compile(
    r"(v|a|mm|s|mtp)\..*|.*(norm|ffn_gate_inp|conv1d|shortconv\.conv|ssm_(x|dt|a|d|alpha|beta|ba)|position_embd|token_types"
    r"|time_mix_(?!key|value|receptance|gate|output).*|attn_rel_b|per_layer_model_proj|exp_probs_b|indexer\..*)(_\w+)?"
)
_SENSITIVE: Final = re.compile(r"blk\.(\d+)\.(attn_v|attn_v_b|ffn_down|ffn_down_exps|ffn_down_shexp)")


def known_mix(name: str) -> str:
    """The mix as we spell it; "" for keep. RecipeError for one we don't make."""
    spelled = name.strip().upper()
    if spelled == "KEEP":
        return ""
    if spelled not in MIXES:
        raise RecipeError(f"export.quantize = {name!r} is not known", remedy="One of keep, " + ", ".join(MIXES))
    return spelled


def wanted_type(mix: str, tensor: Tensor, layers: int) -> Type:
    """The type this tensor gets. A row that is no multiple of the type's block gets Q8_0, or F16."""
    stem = tensor.name.removesuffix(".weight")
    if not mix or not tensor.name.endswith(".weight") or len(tensor.shape) < 2 or _FLOATS.fullmatch(stem):
        return tensor.type
    most, sensitive, _ = MIXES[mix]
    kind = most
    if stem in ("output", "token_embd"):
        kind = Type.Q6_K if most in (Type.Q5_K, Type.Q4_K, Type.Q3_K) else most
    elif found := _SENSITIVE.fullmatch(stem):
        layer = int(found[1])
        # The first and last eighth of the layers, and every third between.
        if layer < layers // 8 or layer >= layers - layers // 8 or (layer - layers // 8) % 3 == 2:
            kind = sensitive
    for choice in (kind, Type.Q8_0):
        if tensor.shape[-1] % GGML_QUANT_SIZES[choice][0] == 0:
            return choice
    return Type.F16
