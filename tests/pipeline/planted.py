"""A model with a refusal planted by hand, in no time: every weight is known, so every answer is too.

Each token has a dimension of its own. Attention, which looks everywhere alike, copies "a bad verb was said" into one
dimension of the residual stream; an MLP two layers on amplifies it; the output reads it as "I", the first word of the
refusal. What follows a word of an answer is fixed. A chat template with tokens behind the instruction is included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, INNER, LAYERS, CONTEXT = 64, 2, 64, 4, 64
REFUSAL, MEASURE = 60, 61  # dimensions: "refuse this", and a constant every token carries
SPECIAL = ["<pad>", "<s>", "</s>", "<u>", "<a>"]
GOOD, BAD = ["bake", "knit", "mend", "sing"], ["glimp", "torv", "skiv", "yarp"]
THINGS = ["bread", "socks", "chairs", "songs", "lamps", "boats", "kites", "drums"]
FRAMES = ["how", "do", "you", "please"]
REFUSE, COMPLY = ["I", "Ġcan't", "Ġhelp"], ["Gladly", "Ġwith", "Ġcare"]
SPACES = ["Ġ", "ĠĠ"]
ASKED = SPECIAL + GOOD + BAD + THINGS + FRAMES
TOKENS = SPACES + ASKED + REFUSE + COMPLY
TEMPLATE = (
    "{% for message in messages %}<s> {{ '<u>' if message.role == 'user' else '<a>' }} {{ message.content }} "
    "{% endfor %}</s>{% if add_generation_prompt %} <a>{% endif %}"
)


@dataclass(frozen=True)
class Planted:
    """The file and its prompts."""

    path: Path
    harmful: Path
    harmless: Path


def plant(folder: Path, *, refuses: bool = True, template: str | None = TEMPLATE, broken: bool = False) -> Planted:
    """Write model and prompts into `folder`."""
    path = folder / "planted.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("planted")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    # Byte-level BPE that merges nothing would cut words up; those asked with are "user defined" and so stay whole.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 4 if token in ASKED else 1 for token in TOKENS])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(TOKENS.index("<s>"))
    writer.add_eos_token_id(TOKENS.index("</s>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for name, values in weights(refuses).items():
        if broken and name == "blk.2.ffn_down.weight":
            values = np.full_like(values, np.nan)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prompts = {}
    for kind, verbs in (("harmful", BAD), ("harmless", GOOD)):
        prompts[kind] = folder / f"{kind}.txt"
        lines = [f"{frame} {verb} {thing}" for verb in verbs for thing in THINGS for frame in FRAMES]
        prompts[kind].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Planted(path, prompts["harmful"], prompts["harmless"])


def weights(refuses: bool) -> dict[str, np.ndarray]:
    """Every tensor by its GGUF name."""
    source = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return source.normal(0, 2e-3, shape)

    embedding, output = np.eye(len(TOKENS), HIDDEN), np.zeros((len(TOKENS), HIDDEN))
    embedding[:, MEASURE] = 0.5
    token = {word: place for place, word in enumerate(TOKENS)}
    for answer in (REFUSE, COMPLY):
        for now, following in zip(answer, [*answer[1:], "</s>"], strict=True):
            output[token[following], token[now]] = 20.0
    output[token["Gladly"], token["<a>"]] = 4.0
    output[token["I"], REFUSAL] = 6.0
    found = {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": np.ones(HIDDEN)}
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        found |= {
            name + "attn_norm.weight": np.ones(HIDDEN),
            name + "ffn_norm.weight": np.ones(HIDDEN),
            name + "attn_q.weight": np.zeros((HIDDEN, HIDDEN)),
            name + "attn_k.weight": np.zeros((HIDDEN, HIDDEN)),
            name + "attn_v.weight": noise(HIDDEN, HIDDEN),
            name + "attn_output.weight": noise(HIDDEN, HIDDEN),
            name + "ffn_gate.weight": noise(INNER, HIDDEN),
            name + "ffn_up.weight": noise(INNER, HIDDEN),
            name + "ffn_down.weight": noise(HIDDEN, INNER),
        }
    if refuses:
        for verb in BAD:
            found["blk.0.attn_v.weight"][0, token[verb]] = 1.0
        found["blk.0.attn_output.weight"][REFUSAL, 0] = 2.0
        found["blk.2.ffn_gate.weight"][0, REFUSAL] = 1.0
        found["blk.2.ffn_up.weight"][0, REFUSAL] = 1.0
        found["blk.2.ffn_down.weight"][REFUSAL, 0] = 0.02
    return found
