"""How a connection ends: one half at a time, or all at once, and what may be left in it then.

Does not know: why.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Final

_RESET: Final = struct.pack("ii", 1, 0)
_CLOSED: Final = 7  # the kernel's TCP_CLOSE


def write_eof(transport: asyncio.Transport) -> None:
    if transport.is_closing():
        return
    with contextlib.suppress(OSError):  # it is gone already; its connection_lost is on the way
        transport.write_eof()


def hang_up(transport: asyncio.Transport, *, reset: bool) -> None:
    """Close now. A reset after what is buffered here is out, so that half an answer can't be taken for a whole."""
    if transport.is_closing():
        return
    if not reset:
        transport.abort()
        return
    handle = transport.get_extra_info("socket")
    if handle is not None and handle.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.close()


def has_left(transport: asyncio.Transport) -> bool:
    """Of a side that has closed its half, and is read no more: is the connection gone by now? Linux alone can tell."""
    handle = transport.get_extra_info("socket")
    if handle is None or handle.family == socket.AF_UNIX or not hasattr(socket, "TCP_INFO"):
        return False
    with contextlib.suppress(OSError):
        return bool(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED)
    return True


def keep(transport: asyncio.Transport) -> int:
    """A second descriptor of the socket, for `salvage`; close it in time, the connection lives as long as it does."""
    handle = transport.get_extra_info("socket")
    return os.dup(handle.fileno()) if handle is not None and handle.fileno() >= 0 else -1


def salvage(descriptor: int) -> bytes:
    """What had arrived before a write failed.

    A server may answer an upload early and close; the event loop then fails in writing and drops what it could still
    have read, where a client talking to the server itself would have read it.
    """
    pieces: list[bytes] = []
    with contextlib.suppress(OSError):
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    return b"".join(pieces)
