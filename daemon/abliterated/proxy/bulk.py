"""A long body on its way: from socket to socket through one buffer, which is read into again once it has gone out.

Nothing in such a body is looked at, and only its length is counted; no more is asked for than it has left. What the
upstream has not taken keeps the buffer: until then nothing more is read.

Does not know: what the body is, what comes behind it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from abliterated.proxy.relay import Link

LEAST: Final = 4 * 1024 * 1024  # of a body still to come: for less it is not worth it
_SIZE: Final = 512 * 1024


class Bulk(asyncio.BufferedProtocol):
    """The client's side while the body lasts; whatever is not a byte of it is the link's."""

    __slots__ = ("_link", "_view", "connection_lost", "eof_received", "left", "pause_writing", "resume_writing")

    def __init__(self, link: Link, left: int) -> None:
        self._link = link
        self.left = left
        self._view = memoryview(bytearray(_SIZE))
        self.eof_received = link.eof_received  # type: ignore[method-assign]
        self.connection_lost = link.connection_lost  # type: ignore[method-assign]
        self.pause_writing = link.pause_writing  # type: ignore[method-assign]
        self.resume_writing = link.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view if self.left >= _SIZE else self._view[: self.left]

    def buffer_updated(self, nbytes: int) -> None:
        self.left -= nbytes
        self._link.bulk_received(self._view[:nbytes], self.left)
