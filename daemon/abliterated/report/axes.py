"""The frame of a chart: scales from numbers to places, ticks at round numbers, grid lines and labels. Pure.

Every chart is drawn on the same small canvas, so that its text stays readable where the page is narrow. Does not know
what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from abliterated.report.markup import Markup, join, tag

WIDTH: Final = 440.0
HEIGHT: Final = 260.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 20.0, 14.0, 44.0
LETTER: Final = 7.5  # about as wide as one of a label's is


@dataclass(frozen=True)
class Scale:
    """From `low`…`high` to `start`…`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = 0.5 if span == 0 else (value - self.low) / span
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def across(low: float, high: float) -> Scale:
    """The scale of the horizontal axis."""
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def upward(low: float, high: float, height: float = HEIGHT) -> Scale:
    """The scale of the vertical axis."""
    return Scale(low, high, height - BOTTOM, TOP)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About so many round numbers between the two."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(low: int, high: int, wanted: int = 8) -> list[float]:
    """The same, of whole numbers."""
    return [tick for tick in ticks(low, high, wanted) if tick == int(tick)] or [float(low)]


def number(value: float) -> str:
    """A short way to write it."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10000 or size < 0.0001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if size < 10 else f"{value:.1f}".rstrip("0").rstrip(".")


def percent(value: float) -> str:
    """A share as a person says it: 12.5 %, 0 %, the sign never alone on a line."""
    return f"{100 * value:.1f}".rstrip("0").rstrip(".") + "\u00a0%"


@dataclass(frozen=True)
class Axis:
    """What stands along one side."""

    scale: Scale
    ticks: Sequence[float]
    title: str
    label: Callable[[float], str] = number


def frame(horizontal: Axis, vertical: Axis, height: float = HEIGHT) -> Markup:
    """Grid, ticks and titles."""
    floor = height - BOTTOM
    parts: list[Markup] = []
    for tick in vertical.ticks:
        at = vertical.scale(tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", vertical.label(tick), x=LEFT - 7, y=at + 4, text_anchor="end"))
    for tick in horizontal.ticks:
        at = horizontal.scale(tick)
        parts.append(tag("line", x1=at, x2=at, y1=floor, y2=floor + 4, class_="tick"))
        label = horizontal.label(tick)
        wide = at + LETTER * len(label) / 2 > WIDTH  # it would be cut at the edge
        place, anchor = (WIDTH, "end") if wide else (at, "middle")
        parts.append(tag("text", label, x=place, y=floor + 18, text_anchor=anchor))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", horizontal.title, x=middle, y=height - 6, text_anchor="middle", class_="title"))
    upright = (TOP + floor) / 2
    turned = f"rotate(-90 12 {upright:.0f})"
    parts.append(tag("text", vertical.title, x=12, y=upright, text_anchor="middle", transform=turned, class_="title"))
    return join(*parts)


def canvas(name: str, title: str, *parts: Markup, height: float = HEIGHT, text: str = "") -> Markup:
    """A whole drawing that says what it shows to who can't see it."""
    described = f"{name}-title" + (f" {name}-text" if text else "")
    told = [tag("title", title, id=f"{name}-title")] + ([tag("desc", text, id=f"{name}-text")] if text else [])
    return tag(
        "svg",
        *told,
        *parts,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_labelledby=described,
        xmlns="http://www.w3.org/2000/svg",
    )


def legend(items: Sequence[tuple[str, str]]) -> Markup:
    """Names and classes of what is drawn, above the chart."""
    return tag(
        "ul",
        *[
            tag(
                "li",
                tag(
                    "svg", tag("rect", width=12, height=12, rx=2, class_=kind), width=12, height=12, aria_hidden="true"
                ),
                f" {name}",
            )
            for name, kind in items
        ],
        class_="legend",
    )
