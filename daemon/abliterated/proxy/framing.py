"""Where each request begins and ends: bytes in, events out, nothing else.

A request head is held until it is whole, then read twice: by llhttp (through httptools), which knows the grammar,
and by this module, which knows the framing. Only when both agree does the head come out; so what we forward, no
upstream can cut differently than we did. Bodies come out as they come in, checked but not copied where possible.

Does not know: sockets, the upstream, the answer to anything but a malformed request.
"""

from __future__ import annotations

import functools
import re
from typing import Final

import httptools
import msgspec

HEAD_LIMIT: Final = 64 * 1024
LINE_LIMIT: Final = 4096  # a chunk-size line with its extensions
TRAILER_LIMIT: Final = 8192
LEAD_LIMIT: Final = 64  # of empty lines before a request
_NEVER_TRAILERS: Final = frozenset({b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade"})

CHUNKED: Final = -1

_HEAD_END = b"\r\n\r\n"
_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])\r\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n")
_TRANSFER_ENCODING = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")


class Head(msgspec.Struct, frozen=True, gc=False):
    """One request's head, verbatim in `raw`. `length` is the body's length, or `CHUNKED`."""

    method: bytes
    target: bytes
    minor: int  # HTTP/1.minor
    raw: bytes
    length: int
    switches: bool  # CONNECT or an upgrade: what follows depends on the answer

    def fields(self) -> list[tuple[bytes, bytes]]:
        """Header fields in order, names in lower case, values stripped."""
        lines = self.raw.lstrip(b"\r\n").split(b"\r\n")[1:-2]
        return [(name.lower(), value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines)]


class Body(msgspec.Struct, frozen=True, gc=False):
    """A stretch of a request's body, framing included, verbatim. `end`: with it the request is whole."""

    data: bytes
    end: bool = False


class Bad(msgspec.Struct, frozen=True, gc=False):
    """The client broke the grammar: nothing after this is read. `started`: its head has already come out."""

    status: int
    reason: str
    started: bool = False


Event = Head | Body | Bad


class _Watch:
    """What llhttp says about one head: is a message over with it?"""

    __slots__ = ("complete",)

    def __init__(self) -> None:
        self.complete = False

    def on_message_complete(self) -> None:
        self.complete = True


def read_head(raw: bytes) -> Head | Bad:
    """Read one whole head, `raw` ending in an empty line (empty lines before it are kept, and ignored)."""
    start = 0
    while raw.startswith(b"\r\n", start):
        start += 2
    line = _REQUEST_LINE.match(raw, start)
    if line is None:
        return Bad(400, "the request line is malformed")
    method, target, major, minor = line.groups()
    if major != b"1" or minor not in b"01":
        return Bad(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = raw[line.end() - 2 :]  # from the line's own CRLF, so that every field is preceded by one
    watch = _Watch()
    parser = httptools.HttpRequestParser(watch)
    switches = method == b"CONNECT"
    try:
        # The line is read above, and replaced: llhttp knows only the methods it was compiled with.
        parser.feed_data(b"POST / HTTP/1." + minor + fields)
    except httptools.HttpParserUpgrade:
        switches = True
    except httptools.HttpParserError as error:
        return Bad(400, f"the header is malformed: {error}")
    lowered = fields.lower()
    if lowered.count(b"\r\nhost:") > 1:
        return Bad(400, "the header names two hosts")
    length = _body_length(lowered, minor)
    if isinstance(length, Bad):
        return length
    if not switches and watch.complete != (length == 0):
        # Content-Length: 0 completes at once, as no body does.
        return Bad(400, "the body's framing is ambiguous")
    return Head(method, target, minor[0] - 48, raw, length, switches)


# A client says the same head again and again; reading it is pure, so the last few are remembered (at most 256 KiB).
_REMEMBER_LIMIT = 1024
_remembered = functools.lru_cache(maxsize=256)(read_head)


def _body_length(lowered: bytes, minor: bytes) -> int | Bad:
    sized = lowered.count(b"\r\ncontent-length:")
    encoded = lowered.count(b"\r\ntransfer-encoding:")
    if not sized and not encoded:
        return 0
    if sized + encoded > 1:
        return Bad(400, "the body's length is given twice")
    if encoded:
        if minor == b"0":
            return Bad(400, "Transfer-Encoding needs HTTP/1.1")
        if _TRANSFER_ENCODING.search(lowered) is None:
            return Bad(400, "the only transfer encoding spoken here is chunked")
        return CHUNKED
    match = _CONTENT_LENGTH.search(lowered)
    return int(match[1]) if match else Bad(400, "Content-Length is not a number")


class RequestFramer:
    """Cuts one client's bytes into requests. Feed it, and act on the events in their order."""

    __slots__ = ("_await", "_trailer", "held_bytes", "left", "phase")

    # Phases
    HEAD, LENGTH, SIZE, CHUNK, CHUNK_END, TRAILER, AWAIT, BROKEN = range(8)

    def __init__(self) -> None:
        self.phase = self.HEAD
        self.held_bytes = bytearray()  # of a head, a chunk-size line or a trailer line that is not yet whole
        self.left = 0
        self._trailer = 0
        self._await = False

    @property
    def head_open(self) -> bool:
        """A head has begun and is not yet whole."""
        return self.phase == self.HEAD and len(self.held_bytes) > 0

    @property
    def between(self) -> bool:
        """No request is under way."""
        return self.phase == self.HEAD and not self.held_bytes

    @property
    def awaiting(self) -> bool:
        """A request to switch protocols is out; `resume` or `release` says how it ended."""
        return self.phase == self.AWAIT

    @property
    def held(self) -> int:
        """How many bytes wait here."""
        return len(self.held_bytes)

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        if self.held_bytes and self.SIZE <= self.phase <= self.TRAILER:
            data = bytes(self.held_bytes) + data
            self.held_bytes.clear()
        position, size, first = 0, len(data), -1  # first: index of the head being read on, if it is in this batch
        while position < size:
            phase = self.phase
            if phase == self.HEAD:
                position = self._feed_head(data, position, events)
                first = len(events) - 1
            elif phase == self.LENGTH:
                end = min(size, position + self.left)
                self.left -= end - position
                events.append(Body(data if not position and end == size else data[position:end], not self.left))
                position = end
                if not self.left:
                    self._end_message()
            elif phase == self.AWAIT:
                self.held_bytes += data[position:]
                break
            elif phase == self.BROKEN:
                break
            else:
                position = self._feed_chunked(data, position, events)
        if events and isinstance(bad := events[-1], Bad) and bad.started and first >= 0:
            # The head is in this very batch: none of this request has left yet, so none of it will.
            del events[first:]
            events.append(Bad(bad.status, bad.reason))
        return events

    def pass_over(self, size: int) -> None:
        """So much of a body of known length has gone by."""
        assert self.phase == self.LENGTH and size <= self.left
        self.left -= size
        if not self.left:
            self._end_message()

    def resume(self) -> list[Event]:
        """The other side did not switch: go on reading requests."""
        assert self.phase == self.AWAIT
        self.phase = self.HEAD
        held = bytes(self.held_bytes)
        self.held_bytes.clear()
        return self.feed(held)

    def release(self) -> bytes:
        """The other side switched: hand over what came early; the framer is done."""
        held = bytes(self.held_bytes)
        self.held_bytes.clear()
        self.phase = self.BROKEN
        return held

    def _end_message(self) -> None:
        self.phase = self.AWAIT if self._await else self.HEAD
        self._await = False

    def _break(self, events: list[Event], status: int, reason: str, *, started: bool = False) -> None:
        self.phase = self.BROKEN
        self.held_bytes.clear()
        events.append(Bad(status, reason, started))

    def _spoil(self, events: list[Event], reason: str, size: int) -> int:
        self._break(events, 400, reason, started=True)
        return size

    def _too_empty(self, events: list[Event], size: int) -> int:
        """Empty lines are looked at again with each piece that comes, so there may not be many."""
        self._break(events, 400, "too many empty lines before a request")
        return size

    def _feed_head(self, data: bytes, position: int, events: list[Event]) -> int:
        """Take a head if it is whole, hold it if not; returns how far `data` is read."""
        held = self.held_bytes
        if not held:
            start = position
            while data.startswith(b"\r\n", start):
                start += 2
                if start - position > LEAD_LIMIT:
                    return self._too_empty(events, len(data))
            end = data.find(_HEAD_END, start) + 4
            if end > 3 and end - position <= HEAD_LIMIT:
                self._take_head(data[position:end], events)
                return end
        known = len(held)
        held += data[position:]
        lead = 0
        while held.startswith(b"\r\n", lead):
            lead += 2
            if lead > LEAD_LIMIT:
                return self._too_empty(events, len(data))
        end = held.find(_HEAD_END, max(lead, known - 3)) + 4
        if 3 < end <= HEAD_LIMIT:
            raw = bytes(held[:end])
            held.clear()
            self._take_head(raw, events)
            return position + end - known
        if _BARE_LF.search(held, max(0, known - 1)) is not None:
            self._break(events, 400, "a line ends without a carriage return")
        elif len(held) > HEAD_LIMIT:
            self._break(events, 431, f"the request's header is larger than {HEAD_LIMIT // 1024} KiB")
        return len(data)

    def _take_head(self, raw: bytes, events: list[Event]) -> None:
        head = _remembered(raw) if len(raw) <= _REMEMBER_LIMIT else read_head(raw)
        if isinstance(head, Bad):
            self._break(events, head.status, head.reason)
            return
        events.append(head)
        self._await = head.switches
        if head.length == CHUNKED:
            self.phase = self.SIZE
        elif head.length:
            self.phase, self.left = self.LENGTH, head.length
        else:
            self._end_message()

    def _feed_chunked(self, data: bytes, position: int, events: list[Event]) -> int:
        """Check as many lines and chunks as are whole, let out what was checked, hold the rest."""
        begin, size = position, len(data)
        while position < size and self.SIZE <= self.phase <= self.TRAILER:
            if self.phase == self.CHUNK:
                step = min(self.left, size - position)
                position += step
                self.left -= step
                if not self.left:
                    self.phase = self.CHUNK_END
                continue
            end = data.find(b"\n", position, position + LINE_LIMIT) + 1
            if self.phase == self.CHUNK_END and not b"\r\n".startswith(data[position : position + 2]):
                return self._spoil(events, "a chunk is not as long as its size says", size)
            if not end and size - position >= LINE_LIMIT:
                return self._spoil(events, "a line of the chunked body is too long", size)
            if not end:
                break
            if reason := self._take_line(data[position:end]):
                return self._spoil(events, reason, size)
            position = end
        if position > begin:
            ended = not self.SIZE <= self.phase <= self.TRAILER
            events.append(Body(data if not begin and position == size else data[begin:position], ended))
        if self.SIZE <= self.phase <= self.TRAILER:
            self.held_bytes += data[position:]
            return size
        return position

    def _take_line(self, line: bytes) -> str:
        """One whole line of a chunked body's framing; returns what is wrong with it, or nothing."""
        if not line.endswith(b"\r\n"):
            return "a line of the chunked body ends without a carriage return"
        text = line[:-2]
        if self.phase == self.CHUNK_END:
            self.phase = self.SIZE
        elif self.phase == self.SIZE:
            match = _CHUNK_LINE.fullmatch(text)
            if match is None:
                return "a chunk's size is not a number"
            self.left = int(match[1], 16)
            self.phase = self.CHUNK if self.left else self.TRAILER
            self._trailer = 0
        elif text:
            self._trailer += len(line)
            name = text.partition(b":")[0].lower()
            if self._trailer > TRAILER_LIMIT or name in _NEVER_TRAILERS or _TRAILER_LINE.fullmatch(text) is None:
                return "a trailer of the chunked body is malformed, forbidden or too long"
        else:
            self._end_message()
        return ""
