"""What is noted of an exchange while it runs, and the sums of what was noted.

Nothing here runs for each token; text is made only when somebody asks for it.

Does not know: sockets, who reads the figures.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

import msgspec

from abliterated.proxy.framing import Head
from abliterated.proxy.routing import Place

COUNTING_BYTES: Final = 100  # an answer's last words, which count its tokens, are no shorter
TAIL_BYTES: Final = 4096  # and they are among these, its last
SERIES_LIMIT: Final = 256  # names come from clients: beyond this many they are counted together
FIRST_BYTE: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WHOLE: Final = (0.01, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = re.compile(rb'"(?:eval_count|completion_tokens|output_tokens)": ?([0-9]{1,9})')


class Mark(msgspec.Struct, gc=False):
    """One exchange. `route` is empty where it is of no model's."""

    head: Head | None  # only where there is an access log to name it
    route: str
    began: float
    model: str = ""
    first: float = 0.0
    status: int = 0
    bytes_before: int = 0
    missing: Place | None = None  # abliterated: a 404 for it may be amended
    tokens: int = 0  # as the answer's own last words count them; 0 where it doesn't say

    def read(self, data: bytes) -> None:
        """The answer's last words, or what came last of them."""
        if (b"_count" in data or b"_tokens" in data) and (found := _TOKENS.findall(data)):
            self.tokens = int(found[-1])


class Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*(f"{bound:g}" for bound in self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_sum{{{labels}}} {self.total:.6f}"
        yield f"{name}_count{{{labels}}} {below}"


class Series:
    """The sums of one route and model."""

    __slots__ = ("assisted", "first_byte", "held", "missing", "statuses", "tokens", "whole")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.tokens = self.held = self.assisted = self.missing = 0
        self.first_byte = Histogram(FIRST_BYTE)
        self.whole = Histogram(WHOLE)


class Tally:
    """The sums by route and model."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str], Series] = {}

    def of(self, route: str, model: str) -> Series:
        key = (route, model)
        found = self.series.get(key)
        if found is None:
            if len(self.series) >= SERIES_LIMIT:
                key = (route, "other")
            found = self.series.setdefault(key, Series())
        return found

    def ended(self, mark: Mark, now: float) -> None:
        series = self.of(mark.route, mark.model)
        series.statuses[mark.status] = series.statuses.get(mark.status, 0) + 1
        if mark.first:
            series.first_byte.add(mark.first - mark.began)
        series.whole.add(now - mark.began)
        series.tokens += mark.tokens

    def text(self) -> str:
        """Prometheus text."""
        lines: list[str] = []
        for name, kind, about in _FAMILIES:
            full = f"abliterated_proxy_{name}"
            lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
            for (route, model), series in self.series.items():
                labels = f'route="{_escape(route)}",model="{_escape(model)}"'
                if name == "requests_total":
                    lines += [
                        f'{full}{{{labels},status="{status}"}} {count}' for status, count in series.statuses.items()
                    ]
                elif kind == "histogram":
                    histogram = series.first_byte if name.startswith("first_byte") else series.whole
                    lines += histogram.lines(full, labels)
                elif value := getattr(series, name.removesuffix("_total")):
                    lines.append(f"{full}{{{labels}}} {value}")
        return "\n".join(lines) + "\n"


_FAMILIES: Final = (
    ("requests_total", "counter", "Requests that name a model, by the answer's status; 0: none came."),
    ("tokens_total", "counter", "Tokens answered, as the answers themselves count them."),
    ("held_total", "counter", "Requests that waited while a job had the device."),
    ("assisted_total", "counter", "Requests answered with help."),
    ("missing_total", "counter", "Requests for an abliterated model that is not there."),
    ("first_byte_seconds", "histogram", "From the request's head to the answer's first byte."),
    ("duration_seconds", "histogram", "From the request's head to the answer's end."),
)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
