"""The census of writers of a Hugging Face checkpoint, by its tensors' names and shapes and its configuration.

The same promise as `writers`: every matrix of a block that touches the stream has a known role, or an error names it.
Pure; does not know files or numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from abliterate.contract.errors import ModelError
from abliterated.pipeline.writers import Census, Kind, Shapes, Writer

# The last named part of a module that adds to the stream, below `layers.N.`.
_ATTENTION: Final = re.compile(
    r"(self_attn|attn|attention|self_attention|linear_attn|mixer|mamba|conv|short_conv|temporal_block)"
    r"\.(o_proj|out_proj|dense|c_proj|wo|linear_out)"
    r"|(self_attn|attn|attention)\.attention\.out_proj|self_attn\.\d+\.o_proj|self_attention\.experts(\.output_linear)?"
)
_MLP: Final = re.compile(
    r"(.+\.)?(mlp|mlp_block|feed_forward|ffn|block_sparse_moe|moe|mixer|shared_mlp|shared_expert|shared_experts|shared_moe)"
    r"(\.(experts|shared_expert|shared_experts|shared_mlp))?(\.\d+)?"
    r"\.(down_proj|w2|fc2|c_proj|dense_4h_to_h|fc_out|output_linear|output_proj)"
    r"|mlp|mlps\.\d+\.down_proj|(fc2|per_layer_projection|shared_mlp\.output_linear|experts\.down_proj|moe\.(experts\.)?down_proj)"
)
_READERS: Final = re.compile(
    r"(.*\.)?(q|k|v|g|kv|qkv|query_key_value|Wqkv|c_attn|gate|up|gate_up|in|x|dt|z|b|a|qkvz|ba|q_a|q_b|kv_a|kv_b|kv_a_proj_with_mqa|query|key|value"
    r"|in_proj_(qkv|qkvz|ba|z|b|a)|fc1|c_fc|w1|w3|fc_in|dense_h_to_4h|input_linear|router|router\.(layer|proj|classifier)|shared_expert_gate"
    r"|per_layer_input_gate|output_gate|linear_[xy]|conv1d|conv|conv_1d|gate\.wg|wg|wqkv|indexer\..+)(_proj)?"
)
# Gains and biases that stand in a block itself: the norms before its parts, and those `_gains` knows behind them.
_NORMS: Final = re.compile(
    r"(input|attention|feedforward|post_attention)_layernorm|(pre|post)_feedforward_layernorm(_[12])?|(pre|post)_mlp_layernorm"
    r"|post_self_attn_layernorm|post_per_layer_input_norm|pre_ff_layernorm|(temporal|channel)_pre_norm"
    r"|ln_[12]|ln_attn|ln_mlp|norm(_?[12])?|operator_norm|ffn_norm|attention_norm|self_attn_layer_norm|final_layer_norm"
)
_BLOCK: Final = re.compile(r"(?P<stack>.*?)\b(?:layers|h|blocks|block)\.(?P<layer>\d+)\.(?P<part>.+)")
_BESIDE: Final = re.compile(
    r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal_projector|mm_projector|embed_vision|embed_audio|mtp\w*|speech\w*)\."
)
# What a layer behind the last reads with, which guesses a token further on (DeepSeek-V3, GLM-4.5) and is not run here.
_GUESSING: Final = re.compile(r"embed_tokens|[eh]norm|eh_proj|shared_head\..+")
# Read or written once, outside the blocks.
_OUTSIDE: Final = re.compile(
    r"(.*\.)?(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_out|lm_head|embed_positions|embeddings|tok_embeddings"
    r"|norm|final_layernorm|ln_f|norm_f|word_embeddings_layernorm|output|embed_tokens_per_layer|per_layer_model_projection"
    r"|per_layer_projection_norm|embedding_norm|rotary_emb|score|project_in|project_out)"
)
_EMBEDDINGS: Final = re.compile(r"(.*\.)?(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_positions|embeddings)")

_REFUSED: Final = {
    "gemma3n": "its residual stream is several streams",
    "gemma3n_text": "its residual stream is several streams",
    # x ← γ ⊙ x/‖x‖ mixes the direction in anew from all the others: v·(γ ⊙ x) ≠ 0 though v·x = 0.
    "minimax": "its norms act on the stream itself, so no edit of its writers keeps the direction out",
    "rwkv": "a gate acts behind its channel mixing, so no edit of its writers keeps the direction out",
}
# Switches that let a family's norms act on the stream.
_NORMED_STREAM: Final = {
    ("opt", "do_layer_norm_before"): False,
    ("bloom", "apply_residual_connection_post_layernorm"): True,
}
_ENCODERS: Final = re.compile(r".*bert.*|.*t5.*|bart|clip|whisper|electra")
_CONV1D: Final = ("gpt2",)  # matrices stored (in, out)
_TURNED_EXPERTS: Final = ("gpt_oss", "llama4", "llama4_text")  # experts stored (expert, in, out)
_FROM_ONE: Final = ("gemma", "gemma2", "gemma3", "gemma3_text")  # gain = 1 + weight


@dataclass(frozen=True)
class Checkpoint:
    """What the census found. `gain_offset` is added to a post-norm's weight to give its gain."""

    census: Census
    width: int
    layers: int
    gain_offset: float


def checkpoint_census(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    embeddings: bool = False,
    post_norm: bool = True,
    allow_partial: bool = False,
) -> Checkpoint:
    """The writers of a checkpoint with this `config.json`. ModelError names what can't be placed."""
    outer = str(config.get("model_type", ""))
    inner = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), config)
    family = str(inner.get("model_type", outer))
    if reason := _REFUSED.get(family) or ("it is no causal decoder" if _ENCODERS.fullmatch(family) else ""):
        raise ModelError(f"{family} can't be edited: {reason}", remedy="Choose another model")
    for (normed, switch), value in _NORMED_STREAM.items():
        if family == normed and inner.get(switch, not value) is value:
            told = f"{family} can't be edited with {switch} = {str(value).lower()}: {_REFUSED['minimax']}"
            raise ModelError(told, remedy="Choose another model")
    identities = int(inner.get("zero_expert_num") or 0) if family.startswith("longcat") else 0
    if identities and not allow_partial:
        raise ModelError(
            f"{family} can't be edited whole: its {identities} identity experts give a norm's output to the "
            "residual stream, and no weight of theirs could be edited",
            remedy="Set export.allow_partial = true to edit everything else",
        )
    width = _number(inner, "hidden_size", "n_embd", "d_model")
    blocks = [int(block["layer"]) for name in shapes if not _BESIDE.search(name) and (block := _BLOCK.fullmatch(name))]
    layers = _number(inner, *depth_keys(family), default=max(blocks, default=-1) + 1)
    writers: list[Writer] = []
    unknown: list[str] = [f"{identities} identity experts"] if identities else []
    for name, shape in shapes.items():
        if _BESIDE.search(name):
            continue
        block = _BLOCK.fullmatch(name)
        stem, _, suffix = name.rpartition(".")
        if block is None:
            if embeddings and _EMBEDDINGS.fullmatch(stem) and suffix == "weight" and len(shape) == 2:
                gain, bias = f"{stem}_layernorm.weight", f"{stem}_layernorm.bias"  # BLOOM's stand behind it
                behind = (gain,) if gain in shapes else ()
                writers.append(Writer(name, "embedding", -1, behind, bias in shapes, turned=True))
                writers += [Writer(bias, "embedding", -1, bias=True)] if bias in shapes else []
            elif not _OUTSIDE.fullmatch(stem) and len(shape) >= 2 and width in shape:
                unknown.append(name)
            continue
        layer, part = int(block["layer"]), block["part"]
        if layer >= layers and _GUESSING.fullmatch(part.rpartition(".")[0]):
            continue
        role, turned, is_bias = _role(part, shape, width, family)
        if role == "unknown":
            unknown.append(name)
        elif role != "reader":
            before = name[: -len(part)]
            gains = _gains(before, part, role, shapes)
            centred = any(gain.removesuffix("weight") + "bias" in shapes for gain in gains)
            place = min(layer, layers - 1)
            writers.append(Writer(name, role, place, gains, centred, turned, is_bias, corrected=post_norm))
    how = config.get("quantization_config") or inner.get("quantization_config")
    method = how.get("quant_method") if isinstance(how, Mapping) else None
    if ((unknown and method) or method == "bitnet") and not allow_partial:
        lost = "its weights are rounded to three values whenever it runs, and an edit with them"
        raise ModelError(
            f"{family} is quantised ({method}): "
            + (f"{unknown[0]} {shapes[unknown[0]]} can't be edited so" if unknown else lost),
            remedy="Take the model's BF16 or F16 weights, or its GGUF" if unknown else "Take another model",
        )
    _complete(family, writers, unknown, shapes, layers, allow_partial)
    return Checkpoint(Census(tuple(writers), tuple(unknown)), width, layers, 1.0 if family in _FROM_ONE else 0.0)


def depth_keys(family: str) -> tuple[str, ...]:
    """The keys a configuration may say its number of layers under, the first that is there counts."""
    keys = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    # LongCat counts the attentions there, two a layer.
    return keys[2:] + keys[:2] if family.startswith("longcat") else keys


def _role(
    part: str, shape: tuple[int, ...], width: int, family: str
) -> tuple[Kind | Literal["reader", "unknown"], bool, bool]:
    """What a block's tensor does, whether it is stored turned, and whether it is a bias."""
    stem, _, suffix = part.rpartition(".")
    if suffix not in ("weight", "bias"):
        # Fused experts are parameters, not modules: experts.down_proj, experts.down_proj_bias.
        stem, suffix = (part.removesuffix("_bias"), "bias") if part.endswith("_bias") else (part, "weight")
    kind: Kind | None = "attention" if _ATTENTION.fullmatch(stem) else "mlp" if _MLP.fullmatch(stem) else None
    if suffix == "bias" and len(shape) == 4 and shape[:2] == (1, 1):
        return "reader", False, False  # a causal mask that old checkpoints keep (GPT-2, Pythia)
    if kind is not None and suffix == "bias":
        return (kind if shape[-1] == width else "unknown"), False, True
    if kind is not None and len(shape) >= 2:
        expert = len(shape) == 3
        turned = family in (_TURNED_EXPERTS if expert else _CONV1D)
        if turned or (shape[-2] != width and shape[-1] == width and expert):
            return (kind if shape[-1] == width else "unknown"), True, False
        return (kind if shape[-2] == width else "unknown"), False, False
    if shape == (width,) and "." not in stem and not _NORMS.fullmatch(stem):
        return "unknown", False, False  # a gain in the block itself: before a part, or behind one?
    if len([axis for axis in shape if axis > 1]) < 2 or width not in shape or _READERS.fullmatch(stem):
        return "reader", False, False
    return "unknown", False, False


def _gains(before: str, part: str, kind: Kind, shapes: Shapes) -> tuple[str, ...]:
    """The norms between a writer and the stream, outermost first, by the names the architectures give them.

    `post_attention_layernorm` is one where the MLP has a norm of its own before it or behind it; else it *is* that one.
    """

    def there(*names: str) -> tuple[str, ...]:
        return tuple(f"{before}{name}.weight" for name in names if f"{before}{name}.weight" in shapes)

    if kind == "attention":
        found = there("post_self_attn_layernorm")
        if there("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm"):
            found += there("post_attention_layernorm")
        return found
    if part.startswith("per_layer_projection"):
        return there("post_per_layer_input_norm")
    inner = "post_feedforward_layernorm_2" if "experts." in part else "post_feedforward_layernorm_1"
    return there("post_feedforward_layernorm", "post_mlp_layernorm") + there(inner)


def _complete(
    family: str, writers: list[Writer], unknown: list[str], shapes: Shapes, layers: int, allow_partial: bool
) -> None:
    if unknown and not allow_partial:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{family} holds {unknown[0]} {shapes[unknown[0]]}, whose part in the residual stream is not known{more}",
            remedy="Set export.allow_partial = true to leave it as it is",
        )
    writing = {writer.layer for writer in writers}
    idle = [layer for layer in range(layers) if layer not in writing]
    if idle and not allow_partial:
        raise ModelError(
            f"{family}: nothing is known to write to the stream in block {idle[0]} of {layers}",
            remedy="Set export.allow_partial = true to leave it as it is",
        )


def _number(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    for name in names:
        if type(config.get(name)) is int and config[name] > 0:
            return int(config[name])
    if default:
        return default
    raise ModelError(f"config.json has no {names[0]}", remedy="Give a language model's folder")
