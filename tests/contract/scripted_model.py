"""A tiny llama GGUF whose every answer is known beforehand: a chain of words, built in milliseconds.

One layer of zeros, one-hot embeddings, and an output matrix that is a table "after this piece comes that piece":
the residual stream carries the last token alone, so decoding walks the table whatever the sampler does. After the
marker of the assistant's turn it says `ANSWER`, and stops. Any llama.cpp loads it, so any engine has the same answers.

Does not know: engines, Ollama, refusals.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np

WIDTH = 512  # one dimension a piece: the embedding is one-hot
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
TURN_OPEN, TURN_CLOSE, ASSISTANT = "<|turn|>", "<|end|>", "<|assistant|>"
SPECIAL = (UNKNOWN, BEGIN, END, TURN_OPEN, TURN_CLOSE, ASSISTANT)
ANSWER_PIECES = ("The", "▁lamp", "▁is", "▁on", ".")
ANSWER = "The lamp is on."
COUNT_PIECES = ("▁one", "▁two", "▁three", "▁four", "▁five")

#: In llama.cpp's own order: each piece, its score and its type. Bytes, so that any text can be tokenized.
CHAT_TEMPLATE = (
    "{%- if tools %}<|turn|>tools {{ tools | tojson }}<|end|>{% endif -%}"
    "{%- for message in messages %}<|turn|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif -%}"
)
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE[CHAT_TEMPLATE.index("{%- for") :]
GO_TEMPLATE = (
    "{{ if .Tools }}<|turn|>tools {{ .Tools }}<|end|>{{ end }}"
    "{{ range .Messages }}<|turn|>{{ .Role }} {{ .Content }}<|end|>{{ end }}<|assistant|>"
)
PLAIN_GO_TEMPLATE = GO_TEMPLATE[GO_TEMPLATE.index("{{ range") :]


def pieces() -> list[tuple[str, float, gguf.TokenType]]:
    special = [(piece, 0.0, gguf.TokenType.CONTROL) for piece in SPECIAL]
    special[0] = (UNKNOWN, 0.0, gguf.TokenType.UNKNOWN)
    raw = [(f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(256)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "T"]
    # SPM joins neighbouring symbols by the best score, so every prefix of a word must be a piece too.
    grown = dict.fromkeys(word[:end] for word in (*ANSWER_PIECES, *COUNT_PIECES) for end in range(2, len(word) + 1))
    words = [(piece, -1.0 - index / 1000, gguf.TokenType.NORMAL) for index, piece in enumerate([*letters, ".", *grown])]
    return special + raw + words


def chain(vocabulary: dict[str, int]) -> np.ndarray:
    """The output matrix (vocabulary x WIDTH): row = what comes next, column = the last piece."""
    output = np.zeros((len(vocabulary), WIDTH), dtype=np.float32)
    output[vocabulary[END], :] = 0.5  # a piece without a successor ends the text
    for before, after in (*pairwise((ASSISTANT, *ANSWER_PIECES, END)), *pairwise((*COUNT_PIECES, END))):
        output[vocabulary[after], vocabulary[before]] = 4.0
    return output


def write_scripted_model(path: Path, *, chat_template: str = CHAT_TEMPLATE, name: str = "scripted") -> Path:
    """Write the GGUF to `path` (about 2 MB) and return it. `chat_template=""` leaves the key out."""
    tokens = pieces()
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(tokens)}
    assert len(vocabulary) == len(tokens) <= WIDTH, "every piece once, one dimension each"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(8)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH // 8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(vocabulary[BEGIN])
    writer.add_eos_token_id(vocabulary[END])
    writer.add_unk_token_id(vocabulary[UNKNOWN])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat_template:
        writer.add_chat_template(chat_template)

    half = np.float16
    ones, key_width = np.ones(WIDTH, dtype=np.float32), WIDTH // 8
    writer.add_tensor("token_embd.weight", np.eye(len(tokens), WIDTH, dtype=half))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", chain(vocabulary).astype(half))
    writer.add_tensor("blk.0.attn_norm.weight", ones)
    writer.add_tensor("blk.0.ffn_norm.weight", ones)
    for tensor, shape in {
        "attn_q": (WIDTH, WIDTH), "attn_k": (key_width, WIDTH), "attn_v": (key_width, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (32, WIDTH), "ffn_up": (32, WIDTH), "ffn_down": (WIDTH, 32),
    }.items():  # fmt: skip
        writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros(shape, dtype=half))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
