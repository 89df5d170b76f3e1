"""The scalar key-values of a GGUF's header, read without any library: enough to know a file again.

Does not know tensors, nor what a key means. Arrays are stepped over.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from pathlib import Path

from abliterate.contract.errors import ModelError

Value = str | int | float | bool

CONTENT = "abliterated.content"
TEMPLATE = "tokenizer.chat_template"

# By GGUF's number of the type: 0 uint8 … 7 bool, 10 uint64, 11 int64, 12 float64. 8 is a string, 9 an array.
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS = 100_000


def read_keys(path: Path, wanted: Collection[str]) -> dict[str, Value]:
    """Those of the `wanted` keys that are there. Blocking. Raises ModelError for what is no GGUF."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).keys(wanted)
    except (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError) as error:
        raise ModelError(
            f"{path}: its GGUF header is broken or cut off", remedy="Fetch or make the file anew"
        ) from error
    except _NotGguf as error:
        raise ModelError(f"{path}: is no GGUF file ({error})", remedy="Name a .gguf of a language model") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        raise ModelError(f"{path}: can't be read ({error})", remedy="Check the file and its permissions") from error


def known_keys(path: Path, wanted: Collection[str]) -> dict[str, Value]:
    """The same; nothing where the file can't be read here. Blocking."""
    try:
        return read_keys(path, wanted)
    except ModelError:
        return {}


class _NotGguf(Exception):
    """The first bytes are another format's."""


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def text(self) -> str:
        length = self.number("<Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length:
            raise IndexError
        self.at += length
        return raw.decode()

    def keys(self, wanted: Collection[str]) -> dict[str, Value]:
        if self.data[:4] != b"GGUF":
            raise _NotGguf("wrong first bytes")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise _NotGguf(f"version {version}")
        self.at += 8  # the number of tensors
        found: dict[str, Value] = {}
        count = self.number("<Q")
        if count > _MOST_KEYS:
            raise IndexError
        for _ in range(count):
            name, kind = self.text(), self.number("<I")
            if name in wanted and kind != _ARRAY:
                found[name] = self.value(kind)
                if len(found) == len(wanted):
                    break
            else:
                self.skip(kind)
        return found

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        (value,) = struct.unpack_from(_FORMATS[kind], self.data, self.at)
        self.skip(kind)
        return value  # type: ignore[no-any-return]

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            length = self.number("<Q")
            self.at += length
        elif kind == _ARRAY:
            element, length = self.number("<I"), self.number("<Q")
            if element in (_STRING, _ARRAY):
                for _ in range(length):
                    self.skip(element)
            else:
                self.at += length * struct.calcsize(_FORMATS[element])
        else:
            self.at += struct.calcsize(_FORMATS[kind])
        if self.at > len(self.data):
            raise IndexError
