"""Which answers are still owed: a passive reader of the upstream's bytes.

It never holds, changes or refuses a byte; it only counts. What it cannot read makes it `blind`, and the bytes flow on.
Heads seen before, bodies of a known length and pieces that are one whole chunk are counted here, at a fraction of a
parser's price and memory; whatever looks otherwise is llhttp's to read, from that place on.
The relay needs the count for three things: to know when a connection is idle (drain, stats), when an answer of our
own may be put behind the upstream's, and whether an upgrade was accepted.

Does not know: what an answer says.
"""

from __future__ import annotations

import functools
import re
from typing import Final

import httptools

from abliterated.proxy import framing
from abliterated.proxy.marks import Mark

PLAIN: Final = 0
HEAD: Final = 1  # the answer has no body, whatever its header says
TUNNEL: Final = 2  # CONNECT: any 2xx opens it
HEAD_LIMIT: Final = 1024 * 1024


def kind_of(head: framing.Head) -> int:
    if head.method == b"HEAD":
        return HEAD
    return TUNNEL if head.method == b"CONNECT" else PLAIN


REMEMBER_LIMIT: Final = 1024
CHUNKED: Final = -1
UNSURE: Final = -2
_FINAL_STATUS = re.compile(rb"HTTP/1\.1 (?:20[0-35-9]|4[0-9][0-9]|5[0-9][0-9]) ")
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]{1,15})\r\n")
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"


def _chunks(limit: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """By the size of a piece: what it lies between, in the order of bytes, if it is one whole chunk.

    So the line it begins with is asked for without `startswith`, which costs 6 % of a token's way.
    """
    low, high = [b"\1"] * limit, [b""] * limit
    for content in range(1, limit):
        line = b"%x\r\n" % content
        if (whole := len(line) + content + 2) < limit:
            low[whole], high[whole] = line, line[:-1] + b"\v"
    return tuple(low), tuple(high)


CHUNK, BEHIND = _chunks(1024)  # tokens are smaller than that
TOKEN_LIMIT: Final = len(CHUNK)


@functools.lru_cache(maxsize=256)
def body_length(head: bytes) -> int:
    """The body's length, or CHUNKED, where this head (its empty line left out) says it beyond doubt; else UNSURE."""
    lowered = head.lower() + b"\r\n"
    if b"upgrade" in lowered or _FINAL_STATUS.match(head) is None:
        return UNSURE
    found = _LENGTH.findall(lowered)
    sized, encoded = lowered.count(b"content-length"), lowered.count(b"transfer-encoding")
    if not sized and encoded == 1 and _CHUNKED in lowered:
        return CHUNKED
    return int(found[0]) if len(found) == sized == 1 and not encoded else UNSURE


class ResponseWatcher:
    """Tell it of every request sent (`expect`) and every byte received (`feed`)."""

    __slots__ = (
        "_held", "_kinds", "_later", "_parser", "blind", "finished", "last", "left", "mark", "owed", "started",
        "streaming", "switched",
    )  # fmt: skip

    def __init__(self) -> None:
        self.owed = 0  # requests not yet answered
        self._kinds: list[int] | None = None  # theirs, where not all are PLAIN
        self.blind = False
        self.started = False  # the answer to the oldest of them has begun
        self.switched = False
        self.streaming = False  # in the middle of an answer: `go_on` will do
        self.left = 0  # of its body; CHUNKED: a chunk may begin; 0: llhttp knows
        self.mark: Mark | None = None  # of the oldest of them
        self.last = b""  # the answer's last piece that may count its tokens
        self.finished: list[Mark] | None = None  # whose answers are through
        self._later: list[Mark | None] | None = None  # of the others, where one of them has any
        self._parser: httptools.HttpResponseParser | None = None
        self._held = b""

    def expect(self, kind: int, mark: Mark | None = None) -> None:
        if kind == HEAD and self.owed:
            # llhttp can't be told in mid-buffer that the next answer has no body.
            self.blind = True
            self.streaming = False
        if self._kinds is not None:
            self._kinds.append(kind)
        elif kind != PLAIN:
            self._kinds = [*[PLAIN] * self.owed, kind]
        self.owed += 1
        if self.owed == 1:
            self.mark = mark
        elif mark is not None or self._later is not None:
            if self._later is None:
                self._later = [None] * (self.owed - 2)
            self._later.append(mark)

    def forget(self) -> None:
        """Nothing was sent after all."""
        self.owed = 0
        self._kinds = None

    def feed(self, data: bytes) -> None:
        if self.blind or self.switched:
            return
        if not self.owed:
            self.blind = True  # nobody asked
            return
        if not self.started and self._kinds is None:
            end = data.find(b"\r\n\r\n", 0, REMEMBER_LIMIT)
            length = body_length(data[:end]) if end >= 0 else UNSURE
            left = length - len(data) + end + 4 if end >= 0 else UNSURE
            if left == 0:
                self._done()  # a whole short answer in one piece: the usual case
                return
            if left > 0 or length == CHUNKED:
                self.started = self.streaming = True
                self.left = max(left, CHUNKED)
                if length == CHUNKED and len(data) > end + 4:
                    self.go_on(data[end + 4 :])
                return
        self.started = True
        if self._kinds is not None and self._kinds[0] == HEAD:
            data = self._feed_bodyless(data)
            if not data:
                return
            if not self.owed:
                self.blind = True
                return
        self.streaming = True
        self._read(data)

    def go_on(self, data: bytes) -> bool:
        """Feed more of an answer that has begun: all that is done for each token. True while it is not over."""
        left = self.left
        if left == CHUNKED:
            size = len(data)
            if size < TOKEN_LIMIT and CHUNK[size] <= data < BEHIND[size] and data.endswith(b"\r\n"):
                return True
            if data == _LAST_CHUNK:
                return self._end()
            self._hand_over(b"Transfer-Encoding: chunked")
        elif left:
            left -= len(data)
            if left > 0:
                self.left = left
                return True
            if not left:
                return self._end()
            self._hand_over(b"Content-Length: %d" % self.left)
        return self._read(data)

    def _end(self) -> bool:
        self.left = 0
        self.streaming = False
        self._done()
        return False

    def _hand_over(self, framing: bytes) -> None:
        """From here on it is llhttp's to read: what is left looks to it like a whole answer."""
        self.left = 0
        self._read(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing)

    def _read(self, data: bytes) -> bool:
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpResponseParser(self)
            parser.set_dangerous_leniencies(
                lenient_headers=True, lenient_data_after_close=True, lenient_optional_cr_before_lf=True
            )
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.switched = True
        except httptools.HttpParserError:
            # An answer beyond the ones owed ends here as well (the callback raises).
            self.blind = True
        else:
            if self.started:
                return True
        self.streaming = False
        return False

    def close(self) -> list[Mark]:
        """No more will come; returns the marks of what was never answered whole."""
        self.streaming = False
        self._parser = None  # it holds our callbacks, and we hold it
        if self.mark is not None:
            self.mark.read(self.last)
        self.last = b""
        left = [mark for mark in (self.mark, *(self._later or ())) if mark is not None]
        self._later = self.mark = None
        return left

    def _feed_bodyless(self, data: bytes) -> bytes:
        """Read answers that are heads only; returns what lies behind the final one."""
        data = self._held + data
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._held = data
                self.blind = len(data) > HEAD_LIMIT
                return b""
            interim = data[9:10] == b"1"
            data = data[end:]
            if not interim:
                self._held = b""
                self._done()
                return data

    def _done(self) -> None:
        if not self.owed:
            raise IndexError
        self.owed -= 1
        if self._kinds is not None:
            del self._kinds[0]
            if not any(self._kinds):
                self._kinds = None
        self.started = False
        if self.mark is not None:
            self.mark.read(self.last)
            self.finished = [self.mark] if self.finished is None else [*self.finished, self.mark]
            self.mark = None
        self.last = b""
        if self._later is not None:
            self.mark = self._later.pop(0)
            self._later = self._later or None

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        self.started = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self._kinds and self._kinds[0] == TUNNEL and 200 <= status < 300:
            self.switched = True
            self.streaming = False

    def on_message_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status == 101:
            self.switched = True
            self.streaming = False
        elif status >= 200:
            self._done()  # raises when nothing is owed: llhttp stops, and we are blind
