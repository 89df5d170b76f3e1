"""What a GGUF says of how it is talked to: its chat template, its first and last token, which marks are control tokens.

Read without any library, stepping over all else. Does not know: what a template means.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

import msgspec

from abliterate.contract.errors import ModelError

_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_TYPES, _TOKENS = "tokenizer.ggml.token_type", "tokenizer.ggml.tokens"
_CONTROL: Final = 3
# Vocabularies that put the first token themselves where the file does not say.
_BEGINS: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"})


class Words(msgspec.Struct, frozen=True):
    """`begins`: the engine puts the first token before a prompt by itself."""

    jinja: str = ""
    bos: str = ""
    eos: str = ""
    begins: bool = False
    control: frozenset[str] = frozenset()


def read_words(path: Path) -> Words:
    """Raises ModelError for what is no GGUF or can't be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _Reader(data).values()
    except (OSError, ValueError, struct.error, IndexError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"can't read the header of {path}: {error}", remedy="Is it a GGUF this user may read?"
        ) from error
    tokens, types = values.get(_TOKENS) or [], values.get(_TYPES) or b""
    control = frozenset(
        tokens[place].decode("utf-8", "replace")
        for place in range(min(len(tokens), len(types)))
        if types[place] == _CONTROL
    )
    begins = values.get("tokenizer.ggml.add_bos_token")
    if begins is None:
        begins = values.get("tokenizer.ggml.model") == "llama" or values.get("tokenizer.ggml.pre") in _BEGINS
    return Words(
        jinja=str(values.get("tokenizer.chat_template") or ""),
        bos=_token(tokens, values.get("tokenizer.ggml.bos_token_id")),
        eos=_token(tokens, values.get("tokenizer.ggml.eos_token_id")),
        begins=bool(begins),
        control=control,
    )


def _token(tokens: list[bytes], number: Any) -> str:
    return tokens[number].decode("utf-8", "replace") if isinstance(number, int) and number < len(tokens) else ""


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def take(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.place)[0]
        self.place += struct.calcsize(form)
        return value

    def string(self) -> bytes:
        size = self.take("<Q")
        if self.place + size > len(self.data):
            raise ValueError("it ends within its header")
        self.place += size
        return self.data[self.place - size : self.place]

    def values(self) -> dict[str, Any]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it is no GGUF")
        self.place = 16
        if (count := self.take("<Q")) > len(self.data):
            raise ValueError("it announces more than it can hold")
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string().decode("utf-8", "replace")
            value = self.value(self.take("<I"), key)
            if key.startswith("tokenizer."):
                found[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) and key != _TYPES else value
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind]) if kind in _SCALARS else self._unknown(kind)
        kind, count = self.take("<I"), self.take("<Q")
        if count > len(self.data):
            raise ValueError("it announces more than it can hold")
        if kind == _STRING:
            strings = [self.string() for _ in range(count)]
            return strings if key == _TOKENS else None
        if kind not in _SCALARS:
            self._unknown(kind)
        width = struct.calcsize(_SCALARS[kind])
        start, self.place = self.place, self.place + count * width
        # The types are small numbers: their lowest byte is all of them.
        return self.data[start : self.place : width] if key == _TYPES else None

    def _unknown(self, kind: int) -> Any:
        raise ValueError(f"it holds a value of the unknown type {kind}")
