"""The model a request names: JSON bytes in, as they arrive; the top-level `model` out, as soon as it is known.

Nothing is built and nothing is validated: strings, arrays and objects of no interest are stepped over by regular
expressions, however deep and however long, so that a megabyte of images before `model` costs milliseconds and no
memory. Keys are compared without case, as Ollama's decoder does; of two `model` keys the first counts.

Does not know: sockets, HTTP, what the name means.
"""

from __future__ import annotations

import json
import re
from typing import Final

import msgspec

NAME_LIMIT: Final = 1024  # a longer literal is no model's name
STEPS: Final = 50_000  # structural steps before we give up: some 20 ms
_OBJECT, _KEY, _COLON, _VALUE, _NESTED, _STRING = range(6)

_SPACE = re.compile(rb"[ \t\r\n]*+")
_SEPARATORS = re.compile(rb"[ \t\r\n,]*+")
_SCALAR = re.compile(rb"[^\s,}\]\"{\[]*+")
_FIRST = re.compile(rb'[ \t\r\n]*+\{[ \t\r\n]*+"model"[ \t\r\n]*+:[ \t\r\n]*+"([\x20\x21\x23-\x5b\x5d-\x7e]{0,256}+)"')
_LITERAL = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Everything up to the next bracket that is in no string, or to a string that is not whole yet.
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:"(?:[^"\\]++|\\.)*+"[^"{}\[\]]*+)*+', re.DOTALL)


class Found(msgspec.Struct, frozen=True):
    """The name, and where its literal (quotes included) lies in the body."""

    name: str
    start: int
    end: int


class ModelFinder:
    """Feed it the body; `done` says that more bytes will change nothing. `found` is None where no name was given."""

    __slots__ = ("_base", "_buffer", "_depth", "_key", "_position", "_second", "_state", "_steps", "done", "found")

    def __init__(self, *, second: bool = False) -> None:
        """`second`: where `model` is missing, `name` counts (Ollama's older spelling)."""
        self.done = False
        self.found: Found | None = None
        self._second = second
        self._buffer = b""
        self._base = 0  # where the buffer begins in the body
        self._position = 0
        self._depth = 0
        self._state = _OBJECT
        self._key = ""
        self._steps = STEPS

    def feed(self, data: bytes) -> bool:
        if self.done:
            return True
        if self._state == _OBJECT and not self._buffer and (match := _FIRST.match(data)) is not None:
            # Most clients name the model first, and simply.
            self.found = Found(match[1].decode("utf-8", "replace"), match.start(1) - 1, match.end(1) + 1)
            self.done = True
            return True
        self._buffer = self._buffer + data if self._buffer else data
        while not self.done and self._step():
            self._steps -= 1
            if self._steps < 0:
                self.done = True
        if self.done:
            self._buffer = b""
        else:
            self._base += self._position
            self._buffer = self._buffer[self._position :]
            self._position = 0
        return self.done

    def finish(self) -> None:
        """The body has ended."""
        self.done = True
        self._buffer = b""

    def _step(self) -> bool:
        """One step on; False when the next needs more bytes."""
        buffer, state = self._buffer, self._state
        position = self._position
        if state == _NESTED:
            return self._step_nested()
        if state == _STRING:
            position = _match(_REST_OF_STRING, buffer, position)
            self._position = position
            if position >= len(buffer) or buffer[position] != 0x22:
                return False
            self._position = position + 1
            self._state = _NESTED if self._depth else _KEY
            return True
        position = self._position = _match(_SEPARATORS if state == _KEY else _SPACE, buffer, position)
        if position >= len(buffer):
            return False
        character = buffer[position]
        if state == _OBJECT:
            self._expect(character == 0x7B, _KEY)
        elif state == _COLON:
            self._expect(character == 0x3A, _VALUE)
        elif state == _KEY:
            return self._step_key(character)
        else:
            return self._step_value(character)
        return True

    def _expect(self, right: bool, state: int) -> None:
        if right:
            self._position += 1
            self._state = state
        else:
            self.done = True  # not JSON, or not an object: nobody's model is named

    def _step_key(self, character: int) -> bool:
        if character == 0x7D or character != 0x22:
            self.done = True
            return True
        literal = self._literal()
        if literal is None:
            return False
        self._key = (_text(literal) or "").lower()
        self._state = _COLON
        return True

    def _step_value(self, character: int) -> bool:
        if character == 0x22:
            if self._key != "model" and not (self._second and self._key == "name" and self.found is None):
                self._position += 1
                self._state = _STRING
                return True
            start = self._position
            literal = self._literal()
            if literal is None:
                return False
            if self._key == "model":
                self.done = True
                self.found = None  # a `name` seen before it no longer counts
            if (name := _text(literal)) is not None:
                self.found = Found(name, self._base + start, self._base + start + len(literal))
            self._state = _KEY
        elif character in b"{[":
            self._position += 1
            self._depth = 1
            self._state = _NESTED
        else:
            end = _match(_SCALAR, self._buffer, self._position)
            if end >= len(self._buffer):
                return False
            if end == self._position:
                self.done = True
            self._position = end
            self._state = _KEY
        return True

    def _step_nested(self) -> bool:
        buffer = self._buffer
        position = self._position = _match(_TO_BRACKET, buffer, self._position)
        if position >= len(buffer):
            return False
        self._position = position + 1
        character = buffer[position]
        if character == 0x22:
            self._state = _STRING
        elif character in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
            if not self._depth:
                self._state = _KEY
        return True

    def _literal(self) -> bytes | None:
        """The string that begins here; None while it is not whole. One too long to matter ends the search."""
        match = _LITERAL.match(self._buffer, self._position)
        if match is None or match.end() - self._position > NAME_LIMIT:
            self.done = len(self._buffer) - self._position > NAME_LIMIT
            return None
        self._position = match.end()
        return match[0]


def _match(pattern: re.Pattern[bytes], buffer: bytes, position: int) -> int:
    match = pattern.match(buffer, position)
    assert match is not None  # every one of them matches the empty string
    return match.end()


def _text(literal: bytes) -> str | None:
    try:
        text = json.loads(literal)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
