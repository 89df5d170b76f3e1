"""What a request's body says, under its framing: chunks taken apart, zstd unpacked, a name in it replaced.

The framer has checked the framing before; here it is only followed. A body is never unpacked beyond a limit.

Does not know: what is looked for in the body, sockets.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Final

from abliterated.proxy.framing import CHUNKED, Head

_ZSTD = re.compile(rb"\r\ncontent-encoding:[ \t]*zstd[ \t]*\r\n")
_ENCODED = b"\r\ncontent-encoding:"
_LENGTH = re.compile(rb"(?<=\r\n)(content-length:[ \t]*)[0-9]+", re.IGNORECASE)
_DROP = re.compile(rb"(?<=\r\n)(?:content-length|transfer-encoding|content-encoding):[^\r]*\r\n", re.IGNORECASE)


def _zstd_module() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


ZSTD: Final = _zstd_module()


class Chunks:
    """Takes checked chunked framing apart. Lines come whole, as the framer lets them out."""

    __slots__ = ("_in_tail", "after_data", "left", "tail")

    def __init__(self) -> None:
        self.left = 0  # of the chunk being read
        self.after_data = False  # its data is through, its CRLF is not
        self.tail = b""  # from the last chunk's size line on
        self._in_tail = False

    def feed(self, data: bytes) -> bytes:
        pieces: list[bytes] = []
        position, size = 0, len(data)
        while position < size:
            if self._in_tail:
                self.tail += data[position:]
                break
            if self.left:
                step = min(self.left, size - position)
                pieces.append(data[position : position + step])
                position += step
                self.left -= step
                self.after_data = not self.left
                continue
            end = data.index(b"\n", position) + 1
            if self.after_data:
                self.after_data = False
            else:
                self.left = int(data[position:end].partition(b";")[0].strip(), 16)
                if not self.left:
                    self._in_tail = True
                    continue
            position = end
        return b"".join(pieces)


class Payload:
    """The body's content while it passes; `readable` is False where its encoding is none we know."""

    __slots__ = ("_chunks", "_limit", "_out", "_zstd", "overflowed", "readable")

    def __init__(self, head: Head, limit: int) -> None:
        lowered = head.raw.lower()
        self._chunks = Chunks() if head.length == CHUNKED else None
        self._zstd: Any = None
        self._limit = limit
        self._out = 0
        self.overflowed = False
        self.readable = _ENCODED not in lowered
        if not self.readable and ZSTD is not None and lowered.count(_ENCODED) == 1 and _ZSTD.search(lowered):
            self._zstd = ZSTD.ZstdDecompressor()
            self.readable = True

    @property
    def packed(self) -> bool:
        return self._zstd is not None

    def feed(self, wire: bytes) -> bytes:
        data = self._chunks.feed(wire) if self._chunks is not None else wire
        if self._zstd is None or not data:
            return data
        try:
            data = self._zstd.decompress(data, max(0, self._limit - self._out) + 1) if not self._zstd.eof else b""
        except ZSTD.ZstdError:
            self.readable = False
            return b""
        self._out += len(data)
        self.overflowed = self._out > self._limit
        return data

    def replace(self, head: Head, content: bytes, start: int, end: int, literal: bytes, wire: bytes) -> bytes:
        """Head and body so far with `content[start:end]` replaced, framed so that what still comes fits behind.

        `wire` is the body so far as it came. A packed body must be whole; it goes on unpacked.
        """
        changed = content[:start] + literal + content[end:]
        if self.packed:
            raw = _DROP.sub(b"", head.raw)
            return raw[:-2] + b"Content-Length: %d\r\n\r\n" % len(changed) + changed
        chunks = self._chunks
        if chunks is None:
            length = head.length + len(changed) - len(content)
            raw = _LENGTH.sub(lambda found: found[1] + b"%d" % length, head.raw)
            return raw + wire[:start] + literal + wire[end:]
        opened = b"%x\r\n" % chunks.left if chunks.left else b""
        closed = b"" if chunks.after_data else b"\r\n"
        return head.raw + b"%x\r\n" % len(changed) + changed + closed + opened + chunks.tail
