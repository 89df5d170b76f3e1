"""What an answer is made of, whatever dialect it was written in and whatever API it is told in.

Does not know: either.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Thought(msgspec.Struct, frozen=True, gc=False):
    text: str


class Text(msgspec.Struct, frozen=True, gc=False):
    text: str


class Call(msgspec.Struct, frozen=True):
    """`arguments` as the tool's schema types them."""

    id: str
    name: str
    arguments: dict[str, Any]


class End(msgspec.Struct, frozen=True):
    """`counters`: Ollama's own durations and counts, as its last line gave them."""

    reason: str = "stop"
    counters: dict[str, int] = {}

    @property
    def prompt_tokens(self) -> int:
        return self.counters.get("prompt_eval_count", 0)

    @property
    def tokens(self) -> int:
        return self.counters.get("eval_count", 0)


Event = Thought | Text | Call
