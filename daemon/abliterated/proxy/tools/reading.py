"""An answer read as it streams: text, thoughts and calls told apart, whatever the pieces it comes in.

Ours, though transformers has a `ResponseParser`: that one raises where a call is cut off, where its JSON is bad, where
`</tool_call>` stands in a string and where prose only speaks of a tag, and by then the raw text is gone; it needs
transformers in the process, and it wants a region's end before it judges its beginning. Here every answer can be read,
what turns out to be no call is given back as text, and a piece of text costs about a microsecond.

Nothing of a call leaks: what may be the beginning of a mark waits until that is known. What only looks like a call is
text: in a code block, in quotes, naming a tool there isn't, with keys no call has.

Does not know: APIs, how the answer comes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final

from abliterated.proxy.tools import schema
from abliterated.proxy.tools.calls import Calls
from abliterated.proxy.tools.dialects import Dialect, by_mark
from abliterated.shapes.talk import Piece, ToolCall

LONGEST_CALL: Final = 1 << 20  # characters; beyond that it is text
_QUOTES: Final = ("`", "'", '"', "“", "‘")
_SPACE: Final = " \t\r\n"


def new_id() -> str:
    return f"call_{secrets.token_hex(4)}"


class Reader:
    """No `spoken` dialects, or no tools: no calls are looked for. `thinking`: the prompt has opened a thought already.

    `several` False: after the first call `done` is True, and the rest is nobody's.
    """

    __slots__ = (
        "_bare", "_by_mark", "_calls", "_depth", "_dialect", "_fence", "_first", "_handle", "_held", "_in_string",
        "_is_bare", "_last", "_line", "_marks", "_names", "_open", "_out", "_scanned", "_several", "_sure",
        "_thoughts", "_tools", "_tried", "done",
    )  # fmt: skip

    def __init__(
        self,
        spoken: Sequence[Dialect],
        thoughts: tuple[str, str] | None,
        tools: schema.Tools,
        *,
        thinking: bool = False,
        several: bool = True,
    ) -> None:
        self._tools = tools
        self._names = frozenset(tools)
        self._by_mark, self._bare = by_mark(spoken) if self._names else ({}, None)
        self._dialect: Dialect | None = None  # of the call being read
        self._thoughts = thoughts
        self._several = several
        self._marks = tuple(self._by_mark)
        self._first = frozenset(mark[0] for mark in self._marks) | frozenset(_SPACE)
        self._held = ""  # not told yet
        self._out: list[Piece] = []
        self._calls = 0
        self._last = ""  # the last character told
        self._line = ""  # the beginning of the line being told, where it may be a fence
        self._fence = False
        self._open = ""  # the mark that opened what is held
        self._scanned = self._depth = self._tried = 0
        self._in_string = self._sure = self._is_bare = False
        self.done = False
        self._handle: Callable[[bool], bool] = self._thought if thinking and thoughts else self._start

    @property
    def calls(self) -> int:
        return self._calls

    def feed(self, text: str) -> list[Piece]:
        if not self._held and self._handle == self._text and self._first.isdisjoint(text) and not self._line:
            self._last = text[-1:] or self._last
            return [Piece(text)] if text else []
        self._held += text
        return self._run(False)

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """No more comes. `cut`: it ended for want of tokens; a call it was in the middle of is dropped."""
        if cut and self._handle == self._call and self._begins():
            self._held = self._open = ""
            self._handle = self._text
        return self._run(True)

    def _run(self, end: bool) -> list[Piece]:
        while not self.done and self._handle(end):
            pass
        out, self._out = self._out, []
        return out

    # Each of these takes what it can of what is held, and says whether another look is worth while.

    def _start(self, end: bool) -> bool:
        rest = self._held.lstrip(_SPACE)
        if not rest and not end:
            return False
        if self._thoughts:
            mark = self._thoughts[0].strip()
            if rest.startswith(mark):
                self._held = rest[len(mark) :]
                self._handle = self._thought
                return True
            if not end and mark.startswith(rest):
                return False
        if self._bare and rest.startswith(("{", "[")) and not rest.startswith(self._marks):
            if not end and any(mark.startswith(rest) for mark in self._marks):
                return False
            self._enter("", rest, blank=self._held[: len(self._held) - len(rest)])
            return True
        self._handle = self._text
        return bool(self._held)

    def _thought(self, end: bool) -> bool:
        assert self._thoughts is not None
        opening, closing = (mark.strip() for mark in self._thoughts)
        if not self._last:  # the thought's first words
            rest = self._held.lstrip(_SPACE)
            if rest.startswith(opening):  # said though the prompt has said it
                rest = rest[len(opening) :].lstrip(_SPACE)
            elif not end and (not rest or opening.startswith(rest)):
                return False
            self._held = rest
        at = self._held.find(closing)
        if at >= 0:
            self._think(self._held[:at].rstrip(_SPACE))
            self._held = self._held[at + len(closing) :].lstrip(_SPACE)
            self._last = ""
            self._handle = self._after_thought
            return True
        keep = 0 if end else _tail(self._held, (closing,))
        ready = self._held[: len(self._held) - keep]
        told = ready if end else ready.rstrip(_SPACE)
        self._think(told)
        self._held = self._held[len(told) :]
        return False

    def _after_thought(self, end: bool) -> bool:
        """White space behind a thought is no text."""
        self._held = self._held.lstrip(_SPACE)
        if not self._held:
            return False
        self._handle = self._start
        return True

    def _text(self, end: bool) -> bool:
        held = self._held
        if not held:
            return False
        places = [(at, -len(mark), mark) for mark in self._marks if (at := held.find(mark)) >= 0]
        if places:
            at, _, mark = min(places)
            before = held[:at]
            if self._is_prose(before):
                self._say(before + mark)
                self._held = held[at + len(mark) :]
                return True
            blank = len(before) - len(before.rstrip(_SPACE))
            self._say(before[: at - blank])
            self._enter(mark, held[at + len(mark) :], blank=before[at - blank :])
            return True
        keep = 0 if end else _tail(held, self._marks)
        ready = held[: len(held) - keep]
        # White space waits: before a call it is no text.
        told = ready if end or not self._names else ready.rstrip(_SPACE)
        if end and self._calls:
            told = ready.rstrip(_SPACE)
        self._say(told)
        self._held = "" if end else held[len(told) :]
        return False

    def _call(self, end: bool) -> bool:
        dialect = self._dialect
        assert dialect is not None
        begins = True if self._sure else dialect.begins(self._held, self._names)
        self._sure = begins is True
        if begins is False or len(self._held) > LONGEST_CALL:
            return self._let_go()
        at = self._end_of_call(dialect)
        while at is not None:
            stop, after = at
            found = dialect.parse(self._held[:stop], self._names)
            if found:
                return self._made(found, self._held[after:])
            if dialect.close and dialect.later(self._held[:stop]):
                self._tried = after
                at = self._end_of_call(dialect)
                continue
            return self._let_go()
        if not end:
            return False
        found = dialect.parse(self._held, self._names)  # its last mark was the answer's end
        return self._made(found, "") if found else self._let_go()

    def _begins(self) -> bool:
        return self._dialect is not None and self._dialect.begins(self._held, self._names) is True

    def _end_of_call(self, dialect: Dialect) -> tuple[int, int] | None:
        """Where what is held ends as a call, and where the rest begins; None while it has no end."""
        if self._is_bare:
            return None  # the whole answer
        if dialect.close:
            at = self._held.find(dialect.close, self._tried)
            if at >= 0:
                return at, at + len(dialect.close)
            self._tried = max(self._tried, len(self._held) - len(dialect.close) + 1)
            return None
        held, place = self._held, self._scanned
        if not place:
            start = held.find("{")
            if start < 0:
                return None
            place = held.find("[") if held[:start].strip(_SPACE) == "[" else start
        while place < len(held):
            char = held[place]
            place += 1
            if self._in_string:
                if char == "\\":
                    if place == len(held):  # what it escapes has yet to come
                        place -= 1
                        break
                    place += 1
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth <= 0:
                    self._scanned = place
                    return place, place
        self._scanned = place
        return None

    # turns from one to the other

    def _enter(self, mark: str, rest: str, *, blank: str = "") -> None:
        self._open = blank + mark
        self._is_bare = not mark
        self._dialect = self._by_mark[mark] if mark else self._bare
        self._held = rest
        self._scanned = self._depth = self._tried = 0
        self._in_string = self._sure = False
        self._handle = self._call

    def _let_go(self) -> bool:
        """It is no call: its mark is text, and what follows is looked at anew."""
        told = self._open + (self._held[:1] if self._is_bare else "")
        self._held = self._held[1:] if self._is_bare else self._held
        self._open = ""
        self._say(told)
        self._handle = self._text
        return bool(self._held)

    def _made(self, found: Calls, rest: str) -> bool:
        if not self._several:
            found = found[:1]
            self.done = True
        calls = tuple(ToolCall(new_id(), name, schema.typed(arguments, self._tools[name])) for name, arguments in found)
        self._calls += len(calls)
        self._out.append(Piece(calls=calls))
        self._open = ""
        self._held = rest
        self._handle = self._after_call
        return bool(rest)

    def _after_call(self, end: bool) -> bool:
        """White space and separators between calls are no text; without its own mark, another may follow."""
        dialect = self._dialect
        assert dialect is not None
        rest = self._held.lstrip(_SPACE + (";," if not dialect.close else ""))
        if not rest:
            self._held = ""
            return False
        self._held = rest
        if dialect.bare and rest.startswith("{"):
            self._enter("", rest)
            return True
        self._handle = self._text
        return True

    # telling

    def _think(self, text: str) -> None:
        if text:
            self._out.append(Piece(thinking=text))
            self._last = text[-1]

    def _say(self, text: str) -> None:
        if not text:
            return
        self._out.append(Piece(text))
        self._last = text[-1]
        *lines, last = (self._line + text).split("\n")
        for line in lines:
            self._fence ^= line.lstrip().startswith(("```", "~~~"))
        # Only a line's beginning matters, and only where it may yet be a fence's.
        self._line = last[:8] if last.lstrip()[:3] in ("", "`", "``", "```", "~", "~~", "~~~") else ""

    def _is_prose(self, before: str) -> bool:
        """A mark behind `before` is one that is spoken of, not one that is meant."""
        last = before[-1:] or self._last
        if last in _QUOTES:
            return True
        fence, line = self._fence, self._line
        *lines, _ = (line + before).split("\n")
        for whole in lines:
            fence ^= whole.lstrip().startswith(("```", "~~~"))
        return fence


def _tail(text: str, marks: tuple[str, ...]) -> int:
    """How much of the text's end may be the beginning of a mark."""
    longest = 0
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest
