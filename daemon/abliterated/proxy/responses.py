"""Which answers are still owed: a passive reader of the upstream's bytes.

It never holds, changes or refuses a byte; it only counts. What it cannot read makes it `blind`, and the bytes flow on.
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


_REMEMBER_LIMIT: Final = 1024
_FINAL_STATUS = re.compile(rb"HTTP/1\.1 (?:20[0-35-9]|4[0-9][0-9]|5[0-9][0-9]) ")
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]{1,15})\r\n")


@functools.lru_cache(maxsize=256)
def plain_length(head: bytes) -> int:
    """The body's length where this head says it beyond doubt; -1 means ask llhttp."""
    lowered = head.lower()
    found = _LENGTH.findall(lowered)
    if (
        len(found) != 1
        or lowered.count(b"content-length") != 1
        or b"transfer-encoding" in lowered
        or b"upgrade" in lowered
        or _FINAL_STATUS.match(head) is None
    ):
        return -1
    return int(found[0])


class ResponseWatcher:
    """Tell it of every request sent (`expect`) and every byte received (`feed`)."""

    __slots__ = ("_held", "_later", "_parser", "blind", "finished", "kinds", "mark", "started", "streaming", "switched")

    def __init__(self) -> None:
        self.kinds: list[int] = []  # of the requests not yet answered
        self.blind = False
        self.started = False  # the answer to the oldest of them has begun
        self.switched = False
        self.streaming = False  # in the middle of an answer: `go_on` will do
        self.mark: Mark | None = None  # of the oldest of them
        self.finished: list[Mark] | None = None  # whose answers are through
        self._later: list[Mark | None] | None = None  # of the others, where one of them has any
        self._parser: httptools.HttpResponseParser | None = None
        self._held = b""

    @property
    def owed(self) -> int:
        return len(self.kinds)

    def expect(self, kind: int, mark: Mark | None = None) -> None:
        if kind == HEAD and self.kinds:
            # llhttp can't be told in mid-buffer that the next answer has no body.
            self.blind = True
            self.streaming = False
        self.kinds.append(kind)
        if len(self.kinds) == 1:
            self.mark = mark
        elif mark is not None or self._later is not None:
            if self._later is None:
                self._later = [None] * (len(self.kinds) - 2)
            self._later.append(mark)

    def feed(self, data: bytes) -> None:
        if self.blind or self.switched:
            return
        if not self.kinds:
            self.blind = True  # nobody asked
            return
        if not self.started and len(self.kinds) == 1 and self.kinds[0] == PLAIN:
            # A whole short answer in one piece, its head seen before: the usual case, at a tenth of the price.
            end = data.find(b"\r\n\r\n", 0, _REMEMBER_LIMIT) + 4
            if end > 3:
                length = plain_length(data[:end])
                if length >= 0 and length == len(data) - end:
                    self._done()
                    return
        self.started = True
        if self.kinds[0] == HEAD:
            data = self._feed_bodyless(data)
            if not data:
                return
            if not self.kinds:
                self.blind = True
                return
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpResponseParser(self)
            parser.set_dangerous_leniencies(
                lenient_headers=True, lenient_data_after_close=True, lenient_optional_cr_before_lf=True
            )
        self.streaming = True
        self.go_on(data)

    def go_on(self, data: bytes) -> bool:
        """Feed more of an answer that has begun: all that is done for each token. True while it is not over."""
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]
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
        del self.kinds[0]
        self.started = False
        if self.mark is not None:
            self.finished = [self.mark] if self.finished is None else [*self.finished, self.mark]
            self.mark = None
        if self._later is not None:
            self.mark = self._later.pop(0)
            self._later = self._later or None

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        self.started = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self.kinds and self.kinds[0] == TUNNEL and 200 <= status < 300:
            self.switched = True
            self.streaming = False

    def on_message_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status == 101:
            self.switched = True
            self.streaming = False
        elif status >= 200:
            self._done()  # IndexError when nothing is owed: llhttp stops, and we are blind
