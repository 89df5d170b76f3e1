"""The census of writers: which tensors of a model add to its residual stream, and what stands between.

By GGUF name and shape. Every tensor of a block that could touch the stream (one of its axes is the stream's width) has
a known role or is named in an error: an edit that misses a writer looks done and is not. Pure; does not know files,
numbers or directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from abliterate.contract.errors import ModelError

Kind: TypeAlias = Literal["attention", "mlp", "embedding"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the stream.

    `gains`: norms its output passes first, outermost first; `centred`: one of them subtracts the mean. `corrected`:
    the edit takes them into account (`edit.post_norm`), and not only the measurement of what it left.
    `turned`: its last axis is the stream, (…, d_in, d_out). `bias`: it is added as it is.
    """

    name: str
    kind: Kind
    layer: int
    gains: tuple[str, ...] = ()
    centred: bool = False
    turned: bool = False
    bias: bool = False
    corrected: bool = True

    @property
    def unheeded(self) -> bool:
        """Norms stand behind it that the edit leaves out of account."""
        return bool(self.gains) and not self.corrected and not self.bias


@dataclass(frozen=True)
class Census:
    """All writers, in the file's order, and the tensors nobody could place (only with `allow_partial`)."""

    writers: tuple[Writer, ...]
    unknown: tuple[str, ...] = ()


# What adds to the stream within a block: attention and whatever stands in its place, and MLPs of all kinds.
_ATTENTION: Final = re.compile(
    r"attn_output|attn_out|attn_o|ssm_out|shortconv\.out_proj|time_mix_output|vis_attn_output|cross_attn_o_proj"
)
_MLP: Final = re.compile(
    r"ffn_down(\.\d+)?|ffn_down_exps|ffn_down_shexp|ffn_down_chexps|ffn_latent_up|channel_mix_value|vis_down|proj"
)
# What reads from the stream, or works between, by name; norms, scales and other vectors are told by their shape.
_READERS: Final = re.compile(
    r"attn_(q|k|v|qkv|gate|q_a|q_b|k_b|v_b|kv_a|kv_b|kv_a_mqa|rot_embd|sinks)"
    r"|ffn_(gate|up)(\.\d+)?|ffn_(gate|up|gate_up)_(exps|shexp|chexps)|ffn_gate_inp(_shexp)?|ffn_latent_down"
    r"|ssm_(in|conv1d|conv1d_[qkv]|x|dt|a|d|alpha|ba|beta|f_a|f_b|g_a|g_b)"
    r"|shortconv\.(conv|in_proj)|inp_gate|vis_attn_qkv|vis_gate|vis_up|indexer\..+|cross_attn_[qkv]_proj"
    r"|time_mix_(?!output).+|channel_mix_(key|lerp_[kr])|nextn\..+|exp_probs_b"
)
# Norms before a part or within it, and those `_post_norms` knows behind one.
_NORMS: Final = re.compile(
    r"attn_norm(_2)?|ffn_norm(_exps)?|attn_sub_norm|ffn_sub_norm|attn_[qkv]\w*_norm|ssm_\w*norm|indexer\.k_norm"
    r"|post_attention_norm|post_ffw_norm(_[12])?|pre_ffw_norm_2|attn_output_norm|layer_output_norm|post_norm"
    r"|nextn\..+|time_mix_ln"
)
# Read once, at the model's ends; and what stands beside the language model in the same file.
_OUTSIDE: Final = re.compile(
    r"token_embd|token_embd_norm|token_types|position_embd|output|output_norm|output_hc|rope_.+|per_layer_.+|dense_\d|cls.*"
)
_BESIDE: Final = ("v.", "a.", "mm.", "s.", "mtp.", "resampler.", "vision.", "audio.")
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)")

# Where a stream is several streams, a gate acts behind a writer, or it is no causal decoder: not to be done by halves.
_REFUSED: Final = {
    "gemma3n": "its residual stream is several streams",
    "rwkv6": "a gate acts behind its channel mixing",
    "rwkv6qwen2": "a gate acts behind its time mixing",
    "arwkv7": "it is not supported yet",
    "t5": "it has an encoder and a decoder",
    "t5encoder": "it is an encoder",
    "wavtokenizer-dec": "it is no language model",
    "clip": "it is a projector, not a language model",
}
_ENCODERS: Final = re.compile(r".*bert.*|gemma-embedding|llama-embed")


def gguf_census(
    architecture: str,
    width: int,
    layers: int,
    shapes: Shapes,
    *,
    embeddings: bool = False,
    post_norm: bool = True,
    allow_partial: bool = False,
) -> Census:
    """The writers of a GGUF by its tensors' names and shapes (rows first).

    ModelError names the architecture, or the tensor, that can't be placed; with `allow_partial` it is only listed.
    """
    reason = _REFUSED.get(architecture) or ("it is an encoder" if _ENCODERS.fullmatch(architecture) else "")
    if reason:
        raise ModelError(f"{architecture} can't be edited: {reason}", remedy="Choose another model")
    writers, unknown = [], []
    norms = _post_norms(shapes)
    for name, shape in shapes.items():
        stem, _, suffix = name.rpartition(".")
        block = _BLOCK.fullmatch(stem)
        if block is None:
            if embeddings and stem in ("token_embd", "position_embd") and suffix == "weight":
                # An embedding is a column of the stream: (tokens, width), turned.
                gains, centred = _between(["token_embd_norm"], shapes)
                writers.append(Writer(name, "embedding", -1, gains, centred, turned=True))
                bias = "token_embd_norm.bias"
                writers += [Writer(bias, "embedding", -1, bias=True)] if stem == "token_embd" and bias in shapes else []
            elif not _outside(stem, shape, width):
                unknown.append(name)
            continue
        layer, part = int(block[1]), block[2]
        kind = _kind(part, suffix, shape, width, layer, shapes)
        if kind == "unknown":
            unknown.append(name)
        elif kind != "reader":
            gains, centred = _between(norms[layer, _path(part)], shapes)
            place = min(layer, layers - 1)
            writers.append(Writer(name, kind, place, gains, centred, bias=suffix == "bias", corrected=post_norm))
    writers += _norm_biases(norms, shapes, layers) if post_norm else []
    if unknown and not allow_partial:
        raise ModelError(
            f"{architecture} holds {unknown[0]} {shapes[unknown[0]]}, whose part in the residual stream is not known"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""),
            remedy="Set export.allow_partial = true to leave it as it is",
        )
    order = {name: place for place, name in enumerate(shapes)}
    _complete(architecture, writers, shapes, layers, allow_partial)
    return Census(tuple(sorted(writers, key=lambda writer: order[writer.name])), tuple(unknown))


def _kind(
    part: str, suffix: str, shape: tuple[int, ...], width: int, layer: int, shapes: Shapes
) -> Kind | Literal["reader", "unknown"]:
    """What a block's tensor does. Its output axis is the last of a bias, the last but one of a matrix."""
    kind: Kind | None = "attention" if _ATTENTION.fullmatch(part) else "mlp" if _MLP.fullmatch(part) else None
    matrix = suffix == "weight" and len(shape) >= 2
    if kind is not None and (matrix or suffix == "bias"):
        # Experts of a latent space (Nemotron): they write there, and one matrix from there to the stream.
        latent = f"blk.{layer}.ffn_latent_up.weight" in shapes and part.startswith("ffn_down_exps")
        out = shape[-2] if matrix else shape[-1]
        return "reader" if latent and out != width else kind if out == width else "unknown"
    if shape == (width,) and "norm" in part and not _NORMS.fullmatch(part):
        return "unknown"  # a gain: before a part, or behind one?
    if kind is not None or len([axis for axis in shape if axis > 1]) < 2 or _READERS.fullmatch(part):
        return "reader"
    return "unknown" if width in shape else "reader"


def _outside(stem: str, shape: tuple[int, ...], width: int) -> bool:
    """Whether a tensor outside the blocks has nothing to do with the stream's writers."""
    return stem.startswith(_BESIDE) or _OUTSIDE.fullmatch(stem) is not None or len(shape) < 2 or width not in shape


def _path(part: str) -> str:
    """Which way a writer's output goes to the stream: norms differ by it."""
    if _ATTENTION.fullmatch(part):
        return "attention"
    if part == "proj":
        return "per-layer"
    return "experts" if part.startswith("ffn_down_exps") else "mlp"


def _post_norms(shapes: Shapes) -> dict[tuple[int, str], list[str]]:
    """For each layer and path the norms between the writers and the stream, outermost first.

    `post_attention_norm` is one only where something else is the norm before the MLP (`ffn_norm`), or where norms
    stand behind both parts (`post_ffw_norm`, OLMo-2); otherwise it *is* the norm before the MLP (Qwen3-Next, gpt-oss).
    """
    found: dict[tuple[int, str], list[str]] = {}
    layers = {int(block[1]) for name in shapes if (block := _BLOCK.match(name))}
    for layer in layers:

        def there(*names: str, layer: int = layer) -> list[str]:
            stems = [f"blk.{layer}.{name}" for name in names]
            return [stem for stem in stems if f"{stem}.weight" in shapes]

        behind = bool(there("ffn_norm") or there("post_ffw_norm"))
        attention = there("post_attention_norm") if behind else []
        if there("ffn_norm"):
            attention += there("attn_output_norm")  # Grok; alone (DBRX) it is the norm before the MLP
        outer = there("post_ffw_norm", "layer_output_norm")
        found[layer, "attention"] = attention
        found[layer, "mlp"] = outer + there("post_ffw_norm_1")
        found[layer, "experts"] = outer + there("post_ffw_norm_2")
        found[layer, "per-layer"] = there("post_norm")
    return found


def _between(stems: list[str], shapes: Shapes) -> tuple[tuple[str, ...], bool]:
    """A writer's gains, and whether a norm among them has a bias: LayerNorm, which subtracts the mean."""
    gains = tuple(f"{stem}.weight" for stem in stems if f"{stem}.weight" in shapes)
    return gains, any(f"{stem}.bias" in shapes for stem in stems)


def _norm_biases(norms: dict[tuple[int, str], list[str]], shapes: Shapes, layers: int) -> list[Writer]:
    """A post-norm's own bias goes straight to the stream (the outermost one's)."""
    found = {}
    for (layer, path), stems in norms.items():
        if stems and f"{stems[0]}.bias" in shapes:
            kind: Kind = "attention" if path == "attention" else "mlp"
            found[f"{stems[0]}.bias"] = Writer(f"{stems[0]}.bias", kind, min(layer, layers - 1), bias=True)
    return list(found.values())


def _complete(architecture: str, writers: list[Writer], shapes: Shapes, layers: int, allow_partial: bool) -> None:
    """Every block must write, and a block with an MLP's way in must have its way out."""
    written = {(writer.layer, writer.kind) for writer in writers}
    blocks = {int(block[1]) for name in shapes if (block := _BLOCK.match(name))}
    missing = sorted(set(range(layers)) - blocks)
    idle = [layer for layer in range(layers) if not {(layer, "attention"), (layer, "mlp")} & written]
    if missing or (idle and not allow_partial):
        what = f"has no block {missing[0]}" if missing else f"writes nothing to the stream in block {idle[0]}"
        raise ModelError(
            f"{architecture}: the file {what}, of {layers}",
            remedy="Pull the model again" if missing else "Set export.allow_partial = true to leave it as it is",
        )
    ways_in = [
        layer
        for layer in range(layers)
        if any(f"blk.{layer}.{name}.weight" in shapes for name in ("ffn_up", "ffn_up_exps", "ffn_gate_up_exps"))
        and (layer, "mlp") not in written
    ]
    if ways_in and not allow_partial:
        raise ModelError(
            f"{architecture}: block {ways_in[0]} has an MLP, but nothing that writes its result",
            remedy="Pull the model again, or set export.allow_partial = true",
        )
