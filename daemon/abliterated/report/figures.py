"""The report's numbers as tables and tiles. Pure.

Does not know how the page is put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from abliterate.contract.report import Report, Suite, TensorReport
from abliterated.report.axes import number, percent
from abliterated.report.charts import interval
from abliterated.report.markup import Markup, join, tag

# name, key without _before and _after, what it is a share of
RATES: Final = (
    ("Harmful prompts refused", "refusal", "harmful_prompts"),
    ("Harmless prompts refused", "false_refusal", "harmless_prompts"),
    ("Answers that run in circles", "degenerate", ""),
    ("Empty answers", "empty", ""),
)
SINGLES: Final = (
    ("KL from the original, mean", "kl_mean", "nats a token"),
    ("KL, median prompt", "kl_median", "nats a token"),
    ("KL, worst prompt", "kl_max", "nats a token"),
    ("KL of the first token, mean", "kl_first", "nats"),
)
WORST: Final = 8


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numeric: int = 1) -> Markup:
    """A table; the first cell of a row is its head, columns from `numeric` on are numbers."""
    top = [tag("th", cell, scope="col", class_="n" if place >= numeric else None) for place, cell in enumerate(head)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *[tag("td", cell, class_="n" if place + 1 >= numeric else None) for place, cell in enumerate(row[1:])],
        )
        for row in rows
    ]
    made = tag("table", tag("caption", caption), tag("thead", tag("tr", *top)), tag("tbody", *body))
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def tiles(report: Report) -> Markup:
    """What one wants to know first."""
    told, made = report.evaluation, []
    if "refusal_before" in told and "refusal_after" in told:
        target, after = wish(report, "search", "refusal_target"), told["refusal_after"]
        missed = isinstance(target, int | float) and after > target and not inverted(report)
        made.append(
            _tile(
                join(tag("span", percent(told["refusal_before"]) + " → ", class_="was"), percent(after)),
                "of the harmful prompts are refused",
                "poor" if missed else "good",
            )
        )
    if "kl_mean" in told:
        made.append(_tile(number(told["kl_mean"]), "nats a token from the original, on harmless answers"))
    if "harmless_exact" in told:
        made.append(_tile(percent(told["harmless_exact"]), "of the harmless answers are word for word the original's"))
    if report.edit.tensors:
        edited = f"of the {'chosen ' if spared(report) else ''}tensors that write to the residual stream are edited"
        if wholly(report):
            edited += f"; {share(report.edit.residual)} of the direction left"
        made.append(_tile(percent(report.edit.coverage), edited, "good" if report.edit.coverage >= 1 else "poor"))
    return tag("div", *made, class_="tiles") if made else Markup("")


def _tile(value: str, what: str, kind: str = "") -> Markup:
    return tag("div", tag("b", value), tag("span", what), class_=f"tile {kind}".strip())


def before_and_after(told: Mapping[str, float]) -> Markup:
    """The rates with their intervals, and what harmless answers lost."""
    rows: list[list[str]] = []
    for name, key, total in RATES:
        if f"{key}_before" not in told and f"{key}_after" not in told:
            continue
        count = told.get(total, 0)
        label = join(name, " ", tag("small", f"of {count:.0f}", class_="soft")) if count else name
        rows.append([label, _rate(told, key, "before"), _rate(told, key, "after")])
    if "cross_entropy_before" in told or "cross_entropy_after" in told:
        label = "Cross-entropy of the original's harmless answers"
        rows.append([label, *(_plain(told, f"cross_entropy_{when}") for when in ("before", "after"))])
    if "harmless_exact" in told:
        rows.append(["Harmless answers word for word the original's", "", percent(told["harmless_exact"])])
    for name, key, unit in SINGLES:
        if key in told:
            rows.append([join(name, " ", tag("small", unit, class_="soft")), "", number(told[key])])
    tokens = told.get("kl_tokens", 0)
    caption = "Greedy answers to prompts that were not measured on; in brackets the 95 % Wilson interval."
    if tokens:
        caption += f" KL and cross-entropy are over the first {tokens:.0f} tokens of the original's own answers."
    return table(caption, ["", "before", "after"], rows)


def _rate(told: Mapping[str, float], key: str, when: str) -> str:
    rate = told.get(f"{key}_{when}")
    if rate is None:
        return Markup("–")
    low, high = told.get(f"{key}_{when}_low"), told.get(f"{key}_{when}_high")
    if low is None or high is None:
        return percent(rate)
    brackets = tag("small", f"({100 * low:.0f}–{100 * high:.0f})")
    return join(interval(rate, low, high, when), " ", percent(rate), " ", brackets)


def _plain(told: Mapping[str, float], key: str) -> str:
    return number(told[key]) if key in told else "–"


def suites(found: Sequence[Suite]) -> Markup:
    """The probe sets, each with what was counted."""
    rows = [
        [
            join(one.name, " ", tag("small", one.counted, class_="soft")),
            _of(one.before, one.total),
            _of(one.after, one.total),
        ]
        for one in found
    ]
    return table("Probes of our own, small sets: a hint, no benchmark.", ["suite", "before", "after"], rows)


def _of(count: int | None, total: int) -> str:
    return "–" if count is None else f"{count} of {total}"


def worst_tensors(tensors: Sequence[TensorReport]) -> Markup:
    """Those that keep most of the direction."""
    worst = sorted(tensors, key=lambda one: (-one.residual, one.name))[:WORST]
    rows = [
        [
            tag("code", one.name),
            f"{one.promoted_from} → {one.type}" if one.promoted_from else one.type,
            share(one.residual),
            share(one.rounding),
        ]
        for one in worst
    ]
    caption = "The tensors with the largest share of the direction left, and how much of it rounding alone left."
    return table(caption, ["tensor", "type", "left", "rounding"], rows, numeric=2)


def kinds(tensors: Sequence[TensorReport]) -> Markup:
    """What was edited, by kind."""
    names = sorted({one.kind or "other" for one in tensors})
    rows = []
    for name in names:
        some = [one for one in tensors if (one.kind or "other") == name]
        rows.append(
            [
                name,
                str(len(some)),
                str(len({one.layer for one in some})),
                share(max(one.residual for one in some)),
            ]
        )
    return table("Edited tensors by what they belong to.", ["kind", "tensors", "layers", "largest share left"], rows)


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def share(value: float) -> str:
    """A small share as a person says it."""
    return (
        percent(value)
        if value == 0 or value >= 0.01
        else f"{number(round(100 * value, 4))}\u00a0%"
        if value > 1e-6
        else "< 0.0001\u00a0%"
    )


def wholly(report: Report) -> bool:
    """Whether the direction was to be removed wholly, everywhere it was removed."""
    values = [value for pair in report.edit.strengths for value in pair if value]
    return all(abs(value - 1.0) < 1e-6 for value in values)


def spared(report: Report) -> bool:
    """Whether layers, or parts of them, were to be left as they are."""
    return any(not value for pair in report.edit.strengths for value in pair)


def inverted(report: Report) -> bool:
    """Whether refusal was strengthened."""
    return bool(wish(report, "edit", "invert"))


def wish(report: Report, table: str, key: str) -> object:
    """What the recipe says there; None where it says nothing."""
    found = report.recipe.get(table)
    return found.get(key) if isinstance(found, dict) else None
