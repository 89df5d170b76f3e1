"""The report's drawings: each takes plain numbers and gives one SVG, or nothing where there is nothing to draw. Pure.

Does not know where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from abliterate.contract.report import Candidate, LayerSeparation, Search, TensorReport, Trial
from abliterated.report.axes import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Scale,
    across,
    canvas,
    frame,
    number,
    percent,
    ticks,
    upward,
    whole_ticks,
)
from abliterated.report.markup import Markup, tag

BINS: Final = 18


def heat_map(candidates: Sequence[Candidate], chosen: tuple[float, int] | None) -> Markup | None:
    """Refusal score by layer and position: the fuller the cell, the less refusal is left without that direction."""
    cells = {(one.layer, one.position): one for one in candidates if one.bypass is not None}
    if len(cells) < 2:
        return None
    layers, positions = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells}, reverse=True)
    scores = [one.bypass for one in cells.values() if one.bypass is not None]
    low, high = min(scores), max(scores)
    row = max(16.0, min(34.0, 180.0 / len(positions)))
    height = TOP + row * len(positions) + BOTTOM
    column = (WIDTH - RIGHT - LEFT) / len(layers)
    gap = 1.0 if column > 5 else 0.0
    parts: list[Markup] = []
    for (layer, position), one in sorted(cells.items()):
        score = one.bypass
        assert score is not None
        strength = 0.06 + 0.94 * ((high - score) / (high - low) if high > low else 1.0)
        x, y = LEFT + layers.index(layer) * column, TOP + positions.index(position) * row
        told = f"layer {number(layer)}, position {position}: refusal score {score:.2f}"
        if one.kl is not None:
            told += f", KL {number(one.kl)}"
        if one.induce is not None:
            told += f", induced {one.induce:.2f}"
        picked = chosen is not None and (layer, position) == chosen
        parts.append(
            tag(
                "rect",
                tag("title", told),
                x=x,
                y=y,
                width=max(0.5, column - gap),
                height=row - 1,
                rx=1.5,
                class_="cell",
                fill_opacity=strength,
            )
        )
        if picked:
            parts.append(tag("rect", x=x - 1, y=y - 1, width=column + 1, height=row + 1, rx=2, class_="picked"))
    floor = TOP + row * len(positions)
    every = max(1, math.ceil(len(layers) / 12))
    for place, layer in enumerate(layers):
        if place % every == 0:
            x = LEFT + (place + 0.5) * column
            parts.append(tag("text", number(layer), x=x, y=floor + 16, text_anchor="middle"))
    for place, position in enumerate(positions):
        y = TOP + (place + 0.5) * row + 4
        parts.append(tag("text", str(position), x=LEFT - 7, y=y, text_anchor="end"))
    parts.append(tag("text", "layer", x=(LEFT + WIDTH - RIGHT) / 2, y=floor + 36, text_anchor="middle", class_="title"))
    middle = (TOP + floor) / 2
    parts.append(
        tag(
            "text",
            "position",
            x=12,
            y=middle,
            text_anchor="middle",
            transform=f"rotate(-90 12 {middle:.0f})",
            class_="title",
        )
    )
    text = f"Lowest score {low:.2f}, highest {high:.2f}."
    return canvas("heat", "Refusal score left without each direction", *parts, height=height, text=text)


def apart_by_layer(layers: Sequence[LayerSeparation]) -> Markup | None:
    """How far the classes lie apart along the direction, behind each layer."""
    if len(layers) < 2:
        return None
    top = max(0.5, *(abs(one.apart) for one in layers))
    low = min(0.0, *(one.apart for one in layers))
    x, y = across(layers[0].layer, layers[-1].layer), upward(low, top * 1.05)
    sides = frame(
        Axis(x, whole_ticks(layers[0].layer, layers[-1].layer), "layer"),
        Axis(y, ticks(low, top * 1.05), "standard deviations apart"),
    )
    line = " ".join(f"{x(one.layer):.1f},{y(one.apart):.1f}" for one in layers)
    parts = [sides, tag("polyline", points=line, class_="line harmful-line")]
    for one in layers:
        told = f"layer {one.layer}: {one.apart:.2f} standard deviations apart"
        kind = "picked-dot" if one.chosen else "dot harmful"
        radius = 6 if one.chosen else 3
        parts.append(tag("circle", tag("title", told), cx=x(one.layer), cy=y(one.apart), r=radius, class_=kind))
    return canvas("apart", "Separation of the classes by layer", *parts)


def histogram(layer: LayerSeparation, name: str) -> Markup | None:
    """Both classes' projections behind one layer, one above the other."""
    values = [*layer.harmful, *layer.harmless]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [_binned(kind, low, high) for kind in (layer.harmful, layer.harmless)]
    top = max(1, *counts[0], *counts[1])
    height = 180.0
    x, y = across(low, high), upward(0, top, height)
    parts = [
        frame(
            Axis(x, ticks(low, high), "projection on the direction"), Axis(y, whole_ticks(0, top, 3), "prompts"), height
        )
    ]
    wide = (x.end - x.start) / BINS
    for kind, found in zip(("harmful", "harmless"), counts, strict=True):
        for place, count in enumerate(found):
            if count:
                parts.append(
                    tag(
                        "rect",
                        tag("title", f"{count} {kind}"),
                        x=x.start + place * wide + 0.5,
                        y=y(count),
                        width=wide - 1,
                        height=y(0) - y(count),
                        class_=f"bar {kind}",
                    )
                )
    return canvas(name, f"Projections behind layer {layer.layer}", *parts, height=height)


def trade_off(search: Search) -> Markup | None:
    """The trials: KL to the right, refusals upward; the lower left is where one wants to be."""
    trials = search.trials
    if len(trials) < 2:
        return None
    far = max(one.kl for one in trials) or 1e-6
    high = max(0.05, *(one.refusal for one in trials), search.refusal_target or 0.0) * 1.05
    x, y = across(0, far * 1.05), upward(0, high)
    parts = [
        frame(
            Axis(x, ticks(0, far * 1.05), "KL from the original, nats a token"),
            Axis(y, ticks(0, high), "refused", percent),
        )
    ]
    if search.refusal_target is not None:
        at = y(search.refusal_target)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="target"))
    asked = [_prompts(one) for one in trials]
    for one in sorted(trials, key=lambda trial: (trial.chosen, _prompts(trial))):
        told = f"trial {one.number}: refused {percent(one.refusal)}, KL {number(one.kl)}"
        few = _prompts(one) < max(asked)
        if _prompts(one):
            told += f", on {_prompts(one)} prompts"
        if one.verified is not None:
            told += f", by answers {percent(one.verified)}"
        kind = "dot trial verified" if one.verified is not None else "dot trial few" if few else "dot trial"
        kind, size = ("picked-dot", 7) if one.chosen else (kind, 3 if few else 4)
        parts.append(tag("circle", tag("title", told), cx=x(one.kl), cy=y(one.refusal), r=size, class_=kind))
    if search.refusal_target is not None:
        said, at = f"target {percent(search.refusal_target)}", y(search.refusal_target) - 5
        parts.append(tag("text", said, x=WIDTH - RIGHT - 2, y=at, text_anchor="end", class_="over"))
    chosen = next((one for one in trials if one.chosen), None)
    text = f"{len(trials)} trials."
    if chosen:
        text += f" Chosen: refused {percent(chosen.refusal)}, KL {number(chosen.kl)}."
    return canvas("trials", "KL against refusals, by trial", *parts, text=text)


def _prompts(trial: Trial) -> int:
    """On how many prompts it was tried; 0 where nobody said."""
    found = trial.parameters.get("prompts")
    return found if isinstance(found, int) else 0


def strength_by_layer(strengths: Sequence[tuple[float, float]]) -> Markup | None:
    """How strongly the direction was removed, attention and MLP apart."""
    if len(strengths) < 2:
        return None
    values = [value for pair in strengths for value in pair]
    low = min(0.0, *values) * 1.1  # below nil where refusal is strengthened
    top = max(0.0 if low else 1.0, *values) * 1.1
    last = len(strengths) - 1
    height = 220.0
    x, y = across(-0.5, last + 0.5), upward(low, top, height)
    parts = [frame(Axis(x, whole_ticks(0, last), "layer"), Axis(y, ticks(low, top), "strength"), height)]
    wide = (x.end - x.start) / len(strengths)
    bar = max(0.5, wide * 0.38)
    for layer, pair in enumerate(strengths):
        for shift, name, value in ((-bar, "attention", pair[0]), (0.0, "MLP", pair[1])):
            if value:
                told = f"layer {layer}, {name}: {number(value)}"
                parts.append(
                    tag(
                        "rect",
                        tag("title", told),
                        x=x(layer) + shift,
                        y=y(max(0.0, value)),
                        width=bar,
                        height=y(min(0.0, value)) - y(max(0.0, value)),
                        class_=f"bar {name.lower()}",
                    )
                )
    return canvas("strength", "Strength of the edit by layer", *parts, height=height)


def residual_spread(tensors: Sequence[TensorReport]) -> Markup | None:
    """How many tensors keep how much of the direction; by powers of ten."""
    if len(tensors) < 2:
        return None
    least = 1e-9
    powers = [math.floor(math.log10(max(least, min(10.0, abs(one.residual))))) for one in tensors]
    if not powers:
        return None
    low, high = min(-4, *powers), max(-1, *powers)
    counts = {power: powers.count(power) for power in range(low, high + 1)}
    top = max(counts.values())
    height = 200.0
    x, y = across(low, high + 1), upward(0, top, height)
    labels = [float(power) for power in range(low, high + 2) if (high + 1 - low) <= 7 or (power - low) % 2 == 0]
    parts = [
        frame(
            Axis(x, labels, "share of the direction left", _power), Axis(y, whole_ticks(0, top, 4), "tensors"), height
        )
    ]
    for power, count in counts.items():
        if count:
            told = f"{count} tensors between {_power(power)} and {_power(power + 1)}"
            parts.append(
                tag(
                    "rect",
                    tag("title", told),
                    x=x(power) + 1,
                    y=y(count),
                    width=x(power + 1) - x(power) - 2,
                    height=y(0) - y(count),
                    class_="bar residual",
                )
            )
    return canvas("residual", "Share of the direction left, by tensor", *parts, height=height)


def seconds_by_stage(seconds: Mapping[str, float]) -> Markup | None:
    """Where the time went."""
    stages = list(seconds.items())
    if not stages:
        return None
    longest = max(value for _, value in stages) or 1.0
    row, left = 26.0, 86.0
    scale = Scale(0, longest, 0, WIDTH - left - 76)
    parts: list[Markup] = []
    for place, (name, value) in enumerate(stages):
        y = 4 + place * row
        parts.append(tag("text", name[:14], x=left - 8, y=y + 15, text_anchor="end"))
        parts.append(
            tag("rect", x=left, y=y + 3, width=max(1.5, scale(value)), height=row - 10, rx=2, class_="bar time")
        )
        parts.append(tag("text", clock(value), x=left + max(1.5, scale(value)) + 7, y=y + 15))
    return canvas("time", "Seconds by stage", *parts, height=row * len(stages) + 8)


def interval(rate: float, low: float, high: float, kind: str) -> Markup:
    """A rate with its interval, as small as a word."""
    scale = Scale(0, 1, 5, 115)
    return tag(
        "svg",
        tag("line", x1=2, x2=118, y1=7, y2=7, class_="grid"),
        tag("line", x1=scale(low), x2=scale(high), y1=7, y2=7, class_=f"whisker {kind}"),
        tag("circle", cx=scale(rate), cy=7, r=4, class_=f"dot {kind}"),
        viewBox="0 0 120 14",
        class_="interval",
        aria_hidden="true",
    )


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _power(power: float) -> str:
    return f"{10.0 ** (power + 2):g}\u00a0%" if power >= -5 else f"1e{int(power)}"


def _binned(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    return counts


__all__ = [
    "apart_by_layer",
    "clock",
    "heat_map",
    "histogram",
    "interval",
    "residual_spread",
    "seconds_by_stage",
    "strength_by_layer",
    "trade_off",
]
