"""Elements of HTML and SVG as text, everything escaped that was not made here. Pure.

Text that would hide or turn itself around (controls, direction marks, lone surrogates) is shown as U+FFFD. Does not
know what a report is.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Final

VOID: Final = frozenset({"meta", "br", "hr", "link", "img"})
_JOINERS: Final = "\u200c\u200d"  # of scripts and emoji: harmless, and needed
_ESCAPED: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})

Value = str | int | float | None


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Any text, as the same text in markup."""
    if not text.isprintable():
        text = "".join(_shown(char) for char in text)
    return Markup(text.translate(_ESCAPED))


def tag(name: str, /, *children: str, **attributes: Value) -> Markup:
    """An element. A child that is no Markup is escaped; `class_` is class, `stroke_width` stroke-width; an attribute of
    None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several elements or texts as one."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def _text(value: str | int | float) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return "0"
        return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
    return str(value)


def _shown(char: str) -> str:
    if char in "\n\t" or char in _JOINERS:
        return char
    return "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char
