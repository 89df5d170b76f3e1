"""A GGUF whose greedy output the test chooses: a fixture, a few megabytes, built in milliseconds.

The model is a one-layer llama whose attention and feed-forward are zero, so the residual stream at a position is
just the one-hot embedding of the token there, and the output matrix is a bigram chain: what follows a token is a
table. A script says "after this ending of the prompt come these pieces"; greedy decoding then emits exactly them,
with the real chat template and real control tokens in between. Every token may have one successor only, so an answer
is cut into pieces no two of which are equal.

Bytes are tokens 0-255 (a byte-level BPE without merges), so any prompt tokenises.

Does not know: the engine, sampling (at a high temperature the chain still holds, its logits are far apart).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

BEGIN, END = "<|im_start|>", "<|im_end|>"
LOGIT = 40.0  # e^40 against everything else: no temperature a test uses can upset the chain

# A ChatML dialect with what the engine must carry: a system turn, tools, a thinking block that can be switched off.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You may call these tools:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Answer a call as <tool_call>
{"name": ..., "arguments": {...}}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}<tool_call>
{"name": "{{ function.name }}", "arguments": {{ function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

PLAIN_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _byte_symbols() -> list[str]:
    """The printable character byte-level BPE writes for each byte (GPT-2's table, by its rule)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


SYMBOLS = _byte_symbols()


def pieces(text: str, taken: set[str]) -> list[str]:
    """Cut `text` into pieces not yet `taken`, each of two characters or more, as short as they can be."""
    cut: list[str] = []
    start = 0
    while start < len(text):
        end = start + 2
        while text[start:end] in taken and end < len(text):
            end += 1
        piece = text[start:end]
        rest_is_short = len(text) - end == 1
        if rest_is_short:
            piece = text[start:]
        if piece in taken or len(piece) < 2:
            raise ValueError(
                f"{text!r} can't be cut into new pieces at {start}: make its end differ from what came before"
            )
        taken.add(piece)
        cut.append(piece)
        start += len(piece)
    return cut


@dataclass(frozen=True)
class Script:
    """What the model says: `after` (a last byte or a control token of the prompt) → the answer, then END.

    `answer` may be a string, cut into pieces, or the pieces themselves. `loop` never ends: the last piece leads back
    to the first.
    """

    answer: str | Sequence[str]
    after: str = "\n"
    loop: bool = False


@dataclass(frozen=True)
class Model:
    scripts: Sequence[Script] = (Script("a quiet answer"),)
    chat_template: str | None = CHAT_TEMPLATE
    controls: Sequence[str] = ()
    architecture: str = "llama"
    context_length: int = 4096
    width: int = 512
    doubled_token: bool = False  # two tokens of one text, on which llama.cpp aborts
    extra: Mapping[str, str | int | float | bool] = field(default_factory=dict)


def write(path: Path, model: Model | None = None) -> Path:
    """Write the model; returns `path`."""
    model = model or Model()
    tokens = [*SYMBOLS, BEGIN, END, "<think>", "</think>", "<tool_call>", "</tool_call>", *model.controls]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED] * 4
    kinds += [gguf.TokenType.CONTROL] * len(model.controls)
    numbers = {token: number for number, token in enumerate(tokens)}
    taken: set[str] = set(tokens)
    follows: dict[int, int] = {}

    def number_of(piece: str) -> int:
        if piece in numbers and numbers[piece] >= 256:
            return numbers[piece]
        symbols = "".join(SYMBOLS[byte] for byte in piece.encode())
        numbers[symbols] = len(tokens)
        tokens.append(symbols)
        kinds.append(gguf.TokenType.NORMAL)
        return numbers[symbols]

    for script in model.scripts:
        cut = pieces(script.answer, taken) if isinstance(script.answer, str) else list(script.answer)
        chain = [number_of(piece) for piece in cut]
        before = numbers[script.after] if script.after in numbers else script.after.encode()[-1]
        follows[before] = chain[0]
        follows.update(itertools.pairwise(chain))
        follows[chain[-1]] = chain[0] if script.loop else numbers[END]
    if model.doubled_token:
        tokens.append(tokens[-1])
        kinds.append(kinds[-1])
    if len(tokens) > model.width:
        raise ValueError(f"{len(tokens)} tokens for {model.width} one-hot dimensions")

    width, count = model.width, len(tokens)
    embedding = np.eye(count, width, dtype=np.float32)
    output = np.zeros((count, width), dtype=np.float32)
    for before in range(count):
        # The norm scales a one-hot vector by sqrt(width).
        output[follows.get(before, numbers[END]), before] = LOGIT / np.sqrt(width)
    zeros = {
        "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
        "ffn_gate": (32, width), "ffn_up": (32, width), "ffn_down": (width, 32),
    }  # fmt: skip

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_name("scripted")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(1)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(32)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_rope_dimension_count(width // 8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp insists on a merge; this one joins two bytes no UTF-8 text holds.
    writer.add_token_merges([f"{SYMBOLS[0xFE]} {SYMBOLS[0xFF]}"])
    writer.add_eos_token_id(numbers[END])
    writer.add_add_bos_token(False)
    if model.chat_template is not None:
        writer.add_chat_template(model.chat_template)
    for key, value in model.extra.items():
        kind = {
            bool: gguf.GGUFValueType.BOOL,
            int: gguf.GGUFValueType.UINT32,
            float: gguf.GGUFValueType.FLOAT32,
            str: gguf.GGUFValueType.STRING,
        }
        writer.add_key_value(key, value, kind[type(value)])
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(width, dtype=np.float32))
    for name, shape in zeros.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
