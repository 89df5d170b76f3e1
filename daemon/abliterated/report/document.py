"""The page: a report as one HTML file without scripts or anything from elsewhere. Pure: same report, same bytes.

What a run has not measured is left out. Does not know files.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any, TypeGuard

from abliterate.contract.report import Certification, LayerSeparation, Report
from abliterated.report import charts, figures
from abliterated.report.axes import legend, number, percent
from abliterated.report.markup import Markup, join, tag
from abliterated.report.sound import sound
from abliterated.report.style import STYLE


def page(report: Report) -> str:
    """The whole file."""
    report = sound(report)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{report.product.name}: report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"abliterated {report.abliterated}"),
        # An icon of its own, so that no browser asks for one.
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", _header(report), *_sections(report), _footer(report)))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _header(report: Report) -> Markup:
    invert = figures.inverted(report)
    what = "strengthened in" if invert else "removed from"
    lede = join(
        tag("bdi", report.base.name or "a model"),
        f", with its refusal direction {what} its weights",
        f" by abliterated {report.abliterated}" if report.abliterated else "",
        ".",
    )
    return join(tag("h1", tag("bdi", report.product.name)), tag("p", lede, class_="lede"), figures.tiles(report))


def _sections(report: Report) -> Iterator[Markup]:
    if report.evaluation:
        yield _section("Before and after", figures.before_and_after(report.evaluation), _target(report))
    if report.suites:
        yield _section("Probes", figures.suites(report.suites))
    yield from _choice(report)
    if report.edit.tensors or len(report.edit.strengths) > 1:
        yield _edit(report)
    yield _cost(report)
    if report.certification:
        yield _certified(report.certification)
    if report.prompts:
        yield _prompts(report)
    yield _provenance(report)
    if report.notes:
        yield _section("Notes", tag("ul", *[tag("li", note) for note in report.notes], class_="notes"))


def _section(title: str, *parts: Markup) -> Markup:
    return tag("section", tag("h2", title), *[part for part in parts if part])


def _card(title: str, drawn: Markup | None, caption: str, above: Markup | None = None) -> list[Markup]:
    """A drawing with its name and its words; nothing where nothing was drawn."""
    if drawn is None:
        return []
    inside = [tag("h3", title), tag("figcaption", caption), *([above] if above else []), drawn]
    return [tag("figure", *inside, class_="card")]


def _target(report: Report) -> Markup:
    target, after = figures.wish(report, "search", "refusal_target"), report.evaluation.get("refusal_after")
    if not isinstance(target, int | float) or after is None or figures.inverted(report):
        return Markup("")
    if after <= target:
        return tag("p", f"The target, at most {percent(target)} refused, is met.", class_="note ok")
    told = f"The target, at most {percent(target)} refused, is missed by {percent(after - target)}."
    return tag("p", told, class_="note miss")


def _choice(report: Report) -> Iterator[Markup]:
    """How the direction and the strengths were chosen."""
    facts = report.direction
    layer, position = facts.get("layer"), facts.get("position")
    # Between two layers' directions the nearer layer's cell is framed.
    chosen = (float(round(layer)), int(position)) if _real(layer) and _real(position) else None
    cards: list[Markup] = []
    if report.search:
        cards += _card(
            "Trials of the search",
            charts.trade_off(report.search),
            "Each dot is a trial. Down is fewer refusals, left is closer to the original. Small, faint ones were tried "
            "on few prompts only; what counts is the target, with a margin, on all of them.",
            legend([("trial", "dot trial"), ("chosen", "legend-picked")]),
        )
    cards += _card(
        "Candidates by layer and position",
        charts.heat_map(report.candidates, chosen),
        "Refusal score of held-out harmful prompts without that direction. The fuller the cell, the less refusal is "
        "left; the frame is the one chosen. Position −1 is the last token before the answer.",
        _scale(report),
    )
    cards += _card(
        "Separation by layer",
        charts.apart_by_layer(report.separation),
        "How far harmful and harmless prompts lie apart along the direction, behind each layer; the large dot is the "
        "layer it was taken from.",
    )
    for name, one in enumerate(_shown_layers(report.separation)):
        cards += _card(
            f"Projections behind layer {one.layer}" + (", the chosen one" if one.chosen else ""),
            charts.histogram(one, f"layer{name}"),
            "Held-out prompts along the refusal direction.",
            legend([("harmful", "bar harmful"), ("harmless", "bar harmless")]),
        )
    words = _direction_words(report)
    if cards or words:
        yield _section("How the direction was chosen", words, tag("div", *cards, class_="grid2"))


def _scale(report: Report) -> Markup | None:
    """What a faint and a full cell stand for."""
    scores = [one.bypass for one in report.candidates if one.bypass is not None]
    if not scores:
        return None
    return legend([(f"score {max(scores):.1f}", "cell faint"), (f"score {min(scores):.1f}", "cell")])


def _direction_words(report: Report) -> Markup:
    facts = report.direction
    parts = []
    if facts.get("method"):
        parts.append(f"Method {facts['method']}")
    if _real(facts.get("layer")):
        parts.append(f"layer {number(float(facts['layer']))} of {report.base.layers}")
    if _real(facts.get("position")):
        parts.append(f"position {facts['position']}")
    if _real(facts.get("rank")):
        parts.append(f"rank {facts['rank']}")
    for key, name in (("harmful_prompts", "harmful"), ("harmless_prompts", "harmless")):
        if _real(facts.get(key)):
            parts.append(f"{facts[key]} {name} prompts measured")
    return tag("p", ", ".join(parts) + ".", class_="note") if parts else Markup("")


def _shown_layers(layers: list[LayerSeparation]) -> list[LayerSeparation]:
    """Three at most: the chosen one, an early one, the last."""
    if not layers:
        return []
    chosen = next((place for place, one in enumerate(layers) if one.chosen), len(layers) // 2)
    return [layers[place] for place in sorted({chosen // 2, chosen, len(layers) - 1})]


def _edit(report: Report) -> Markup:
    edit = report.edit
    told = []
    if edit.tensors:
        writers = len(edit.tensors) + len(edit.unknown)
        chosen = "chosen " if figures.spared(report) else ""
        told.append(
            f"{percent(edit.coverage)} of the {chosen}writers edited: {len(edit.tensors)} of {writers} tensors."
        )
        told.append(f"Largest share of the direction left: {figures.share(edit.residual)}")
        told[-1] += "." if figures.wholly(report) else f", as the strengths have it; by rounding: {_rounding(report)}."
    if edit.promoted:
        told.append(f"Given a finer type, so that it holds the edit: {len(edit.promoted)}.")
    if edit.unknown:
        told.append(f"Left as they were, by allow_partial: {', '.join(edit.unknown)}.")
    cards = [
        *_card(
            "Strength by layer",
            charts.strength_by_layer(edit.strengths),
            "−1 doubles the direction." if figures.inverted(report) else "1 removes the direction wholly.",
            legend([("attention", "bar attention"), ("MLP", "bar mlp")]),
        ),
        *_card(
            "Direction left, all tensors",
            charts.residual_spread(edit.tensors),
            "Of the bytes as written. At strength 1 it should be nil; below and above, some is left by design.",
        ),
    ]
    parts = [tag("p", " ".join(told), class_="note"), tag("div", *cards, class_="grid2") if cards else Markup("")]
    if edit.tensors:
        parts += [figures.kinds(edit.tensors), figures.worst_tensors(edit.tensors)]
    return _section("What was edited", *parts)


def _rounding(report: Report) -> str:
    return figures.share(max((one.rounding for one in report.edit.tensors), default=0.0))


def _cost(report: Report) -> Markup:
    facts = []
    if report.peak_memory:
        facts.append(("Peak memory", figures.size(report.peak_memory)))
    if report.product.bytes:
        facts.append(("Written", figures.size(report.product.bytes)))
    if report.base.bytes:
        facts.append(("Base", figures.size(report.base.bytes)))
    # The run's count holds the evaluation's, and a run that went on where another was killed counts its own alone.
    counts = (report.evaluation.get(name, 0) for name in ("tokens_decoded", "tokens_decoded_run"))
    if decoded := max(*counts, report.search.tokens_decoded if report.search else 0):
        facts.append(("Tokens decoded", f"{decoded:,.0f}"))
    total = sum(report.seconds.values())
    cards = _card("Time", charts.seconds_by_stage(report.seconds), f"{charts.clock(total)} in all.")
    if facts:
        listed = tag("dl", *[join(tag("dt", name), tag("dd", value)) for name, value in facts])
        cards.append(tag("div", tag("h3", "Memory and sizes"), listed, class_="card"))
    return _section("What it cost", tag("div", *cards, class_="grid2")) if cards else Markup("")


def _certified(found: Certification) -> Markup:
    """What the engine made of it."""
    failures = [one for one in found.differences if one.failure]
    if failures:
        verdict = tag("p", "It differs from the base: see below.", class_="note bad")
    elif found.compared:
        alike = f"Conversations rendered as the base's are: {', '.join(found.compared)}."
        verdict = tag("p", alike, class_="note ok")
    else:
        verdict = Markup("")
    rows = [[one.what, one.text, "a failure" if one.failure else "to know"] for one in found.differences]
    listed = figures.table("What is other than in the base.", ["", "what", ""], rows, numeric=9) if rows else Markup("")
    diffs = [
        tag("details", tag("summary", f"{one.what}: the difference"), tag("pre", tag("code", one.diff)))
        for one in found.differences
        if one.diff
    ]
    where = join(
        tag("bdi", found.model),
        f" in {found.engine}" if found.engine else "",
        *([", compared with ", tag("bdi", found.reference)] if found.reference else []),
        ".",
    )
    said = tag("p", "Its first words: ", tag("q", found.answer[:300]), class_="note") if found.answer else Markup("")
    notes = tag("ul", *[tag("li", note) for note in found.notes], class_="notes") if found.notes else Markup("")
    return _section("In the engine", tag("p", where, class_="note"), verdict, said, listed, *diffs, notes)


def _prompts(report: Report) -> Markup:
    rows = []
    for one in report.prompts:
        revision = [" ", tag("small", f"at {one.revision[:12]}")] if one.revision else []
        rows.append([one.kind, join(tag("bdi", one.name), *revision), str(one.count), one.licence or "–"])
    heads = ["class", "source", "prompts", "licence"]
    return _section("Prompts", figures.table("Where the prompts came from.", heads, rows, numeric=9))


def _provenance(report: Report) -> Markup:
    facts: list[tuple[str, str]] = [
        ("Base", report.base.name),
        ("Base's digest", report.base.digest),
        ("Base's licence", report.base.licence),
        (
            "Architecture",
            f"{report.base.architecture}, {report.base.layers} layers, {report.base.hidden_size} wide"
            if report.base.architecture
            else "",
        ),
        ("Product", f"{report.product.name} ({report.product.format})"),
        ("Product's digest", report.product.digest),
        ("Edited tensors' digest", report.product.content),
        ("Direction's digest", str(report.direction.get("digest", ""))),
        ("Recipe's digest", str(report.recipe.get("digest", ""))),
        ("abliterated", report.abliterated),
    ]
    listed = tag("dl", *[join(tag("dt", name), tag("dd", tag("code", value))) for name, value in facts if value])
    parts = [listed]
    if report.recipe:
        text = json.dumps(_wishes(report.recipe), indent=1, ensure_ascii=False)
        inside = [tag("pre", tag("code", text))]
        parts.append(tag("details", tag("summary", "The whole recipe"), *inside))
    return _section("Provenance", *parts)


def _wishes(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "digest" and value not in ({}, [])}


def _footer(report: Report) -> Markup:
    return tag(
        "footer",
        "The same figures as JSON: report.json beside this file. Rates are over the prompts asked here, and say "
        "nothing about others; read some answers yourself.",
    )


def _real(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
