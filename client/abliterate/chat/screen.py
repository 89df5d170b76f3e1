"""What an answer looks like: streamed as it comes, thinking dimmed, tools' calls on lines of their own.

On a terminal nothing a model says is obeyed by it; in a pipe the answer's text stands alone and as it came. Knows the
two streams; does not know who answers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import IO, Any, Final

from abliterate.render import clean, colours

_OVERRIDES: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """`out` gets answers, `notes` everything else. `live`: a person sits before `out`."""

    def __init__(self, out: IO[str], notes: IO[str], *, show_thinking: bool = True) -> None:
        self._out = out
        self._notes = notes
        self.live = out.isatty()
        self.show_thinking = show_thinking
        self._colour = colours(out)
        self._thinking = False
        self._column = 0  # 0: at the beginning of a line

    def think(self, text: str) -> None:
        """A piece of what the model thinks; nothing in a pipe."""
        if not text or not self.live or not self.show_thinking:
            return
        if not self._thinking:
            self._thinking = True
            self._write(f"{_DIM if self._colour else ''}Thinking …\n")
        self._write(printable(text))

    def say(self, text: str) -> None:
        """A piece of the answer."""
        if text:
            self._end_thinking()
            self._write(printable(text) if self.live else text)

    def call(self, shown: str, result: str) -> None:
        """A tool's call and what it answered."""
        self._end_thinking()
        self.end_line()
        self.note(f"  tool {shown} → {result}")

    def note(self, text: str) -> None:
        """A line of commentary."""
        dim = self._colour and self._notes.isatty()
        for line in text.splitlines():
            self._notes.write(f"{_DIM}{clean(line)}{_PLAIN}\n" if dim else f"{clean(line)}\n")
        self._notes.flush()

    def end_line(self) -> None:
        """Let whatever follows begin on a line of its own."""
        self._end_thinking()
        if self._column:
            self._write("\n")

    def speed(self, numbers: Mapping[str, Any]) -> None:
        """How fast it was, as the engine counts."""
        self.note(speed_text(numbers))

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write(f"{'' if self._column == 0 else chr(10)}… done thinking.{_PLAIN if self._colour else ''}\n\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._column = 0 if text.endswith("\n") else 1


def printable(text: str) -> str:
    """`text` with what a terminal would obey spelt out; lines, tabs and joined signs stay."""
    if text.isprintable():
        return text
    return "".join(char if _harmless(char) else clean(char) for char in text)


def _harmless(char: str) -> bool:
    if char in "\n\t":
        return True
    return unicodedata.category(char) not in ("Cc", "Cs") and char not in _OVERRIDES


def speed_text(numbers: Mapping[str, Any]) -> str:
    """Tokens and tokens a second of prompt and answer, and the time to load; what isn't told is left out."""
    parts = []
    for name, label in (("prompt_eval", "prompt"), ("eval", "answer")):
        count, spent = numbers.get(f"{name}_count"), numbers.get(f"{name}_duration")
        if isinstance(count, int) and count:
            rate = f", {count / (spent / 1e9):.1f}/s" if isinstance(spent, int) and spent > 0 else ""
            parts.append(f"{label} {count} tokens{rate}")
    if isinstance(load := numbers.get("load_duration"), int) and load > 5e7:
        parts.append(f"loaded in {load / 1e9:.1f} s")
    return " · ".join(parts)
