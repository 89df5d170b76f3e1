"""A GGUF whose greedy output the test chooses: a fixture, a few megabytes, built in milliseconds.

The model is a one-layer llama without a feed-forward. The residual stream at a position holds the one-hot embedding of
the token there, and the output matrix is a chain: what follows a token is a table. A script says "after this ending of
the prompt come these pieces"; greedy decoding then emits exactly them, with the real chat template and real control
tokens in between.

What a conversation says chooses the answer: a *marker* is a word that is one token wherever it stands in a prompt, and
the one attention head that isn't zero looks for markers and writes "the last of these markers has been seen" into the
stream. The same head tells the first `<tool_call>` of an answer from the second: a piece of the answer itself is a
marker then. So a table (state, last token) → next token is what is built, and it is checked before it is written.

Bytes are tokens 0-255 (a byte-level BPE without merges), so any prompt tokenises, and no prompt tokenises into the
pieces of an answer.

Does not know: the engine, sampling (at a high temperature the chain still holds, its logits are far apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from engine import scripted_chain as chain

BEGIN, END = "<|im_start|>", "<|im_end|>"

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


THINKING_AND_CALLS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # in every model of ours


def unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Script:
    """What the model says: `after` (last byte or control token of the prompt, or several) → the answer, then END.

    `when`: only in a conversation that holds this marker; of several the script that stands last wins.
    `answer` may be a string, cut into pieces, or the pieces themselves. `loop` never ends: the last piece leads back
    to the first.
    """

    answer: str | Sequence[str]
    after: str | Sequence[str] = "\n"
    loop: bool = False
    when: str = ""


@dataclass(frozen=True)
class Model:
    """`controls` and `words`: special tokens, which no raw completion prints (control) or every one does (words)."""

    scripts: Sequence[Script] = (Script("a quiet answer"),)
    chat_template: str | None = CHAT_TEMPLATE
    controls: Sequence[str] = ()
    words: Sequence[str] = ()
    end: str = END
    begin: str = ""
    architecture: str = "llama"
    context_length: int = 4096
    width: int = 512
    doubled_token: bool = False  # two tokens of one text, on which llama.cpp aborts
    extra: Mapping[str, str | int | float | bool] = field(default_factory=dict)


def write(path: Path, model: Model | None = None) -> Path:
    """Write the model; returns `path`."""
    model = model or Model()
    table = chain.build(
        model.scripts,
        controls=unique([BEGIN, END, *filter(None, (model.begin, model.end)), *model.controls]),
        words=unique([*THINKING_AND_CALLS, *model.words]),
        end=model.end,
    )
    tokens, kinds = [token.text for token in table.tokens], [token.kind for token in table.tokens]
    if model.doubled_token:
        tokens.append(tokens[-1])
        kinds.append(kinds[-1])
    width, count = max(model.width, -(-(len(tokens) + chain.STATES) // 64) * 64), len(tokens)
    weights = chain.weights(table, count, width)
    chain.check(table, weights)

    zeros = {"ffn_gate": (32, width), "ffn_up": (32, width), "ffn_down": (width, 32)}

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_name("scripted")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(1)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(32)
    writer.add_head_count(width // chain.HEAD)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(chain.HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp insists on a merge; this one joins two bytes no UTF-8 text holds.
    writer.add_token_merges([f"{chain.SYMBOLS[0xFE]} {chain.SYMBOLS[0xFF]}"])
    writer.add_eos_token_id(table.numbers[model.end])
    if model.begin:
        writer.add_bos_token_id(table.numbers[model.begin])
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
    writer.add_tensor("token_embd.weight", np.eye(count, width, dtype=np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(width, dtype=np.float32))
    for name, matrix in weights.attention.items():
        writer.add_tensor(f"blk.0.{name}.weight", matrix)
    for name, shape in zeros.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output.weight", weights.output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
