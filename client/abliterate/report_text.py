"""A report as text for a terminal: before and after, closeness, the edit, time. Pure: gives text, prints nothing.

Does not know the daemon, nor the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from abliterate.render import clean, duration, size

if TYPE_CHECKING:
    from abliterate.contract.report import Report

_RATES: Final = (
    ("harmful prompts refused", "refusal"),
    ("harmless prompts refused", "false_refusal"),
    ("running in circles", "degenerate"),
    ("empty answers", "empty"),
)
_SINGLES: Final = (
    ("harmless answers the same", "harmless_exact", "{:.1%}"),
    ("KL from the original, mean", "kl_mean", "{:.4f} nats a token"),
    ("KL, worst prompt", "kl_max", "{:.4f} nats a token"),
)


def report_text(report: Report) -> str:
    """The summary, in lines without colour."""
    told = report.evaluation
    lines = [clean(f"{report.base.name or 'a model'} → {report.product.name}"), ""]
    rows: list[tuple[str, str, str]] = [("", "before", "after")]
    for name, key in _RATES:
        if f"{key}_before" in told or f"{key}_after" in told:
            rows.append((name, _rate(told, f"{key}_before"), _rate(told, f"{key}_after")))
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [
            f"  {row[0].ljust(widths[0])}  {row[1].rjust(widths[1])}  {row[2].rjust(widths[2])}".rstrip()
            for row in rows
        ]
        lines.append("")
    facts = [(name, shape.format(told[key])) for name, key, shape in _SINGLES if key in told]
    if report.edit.tensors:
        facts.append(
            ("writers edited", f"{report.edit.coverage:.0%}, {report.edit.residual:.2%} of the direction left")
        )
    if method := report.direction.get("method"):
        place = [f"{key} {report.direction[key]}" for key in ("layer", "position") if key in report.direction]
        facts.append(("direction", ", ".join([str(method), *place])))
    if report.search and report.search.trials:
        facts.append(("search", _search(report)))
    facts += [
        (f"suite {one.name}", f"{one.before} → {one.after} of {one.total} ({one.counted})") for one in report.suites
    ]
    if report.seconds:
        facts.append(("time", duration(sum(report.seconds.values()))))
    if report.peak_memory:
        facts.append(("peak memory", size(report.peak_memory)))
    wide = max((len(name) for name, _ in facts), default=0)
    lines += [f"  {name.ljust(wide)}  {clean(value)}" for name, value in facts]
    lines += [f"  note: {clean(note)}" for note in report.notes]
    return "\n".join(lines).rstrip()


def _search(report: Report) -> str:
    assert report.search is not None
    chosen = next((one for one in report.search.trials if one.chosen), None)
    text = f"{len(report.search.trials)} trials"
    if chosen:
        text += f", number {chosen.number} chosen"
    return text + (", short of its target" if report.search.reached is False else "")


def _rate(told: Mapping[str, float], key: str) -> str:
    if key not in told:
        return "-"
    text = f"{told[key]:.1%}"
    if f"{key}_low" in told and f"{key}_high" in told:
        text += f" ({told[f'{key}_low']:.0%}-{told[f'{key}_high']:.0%})"
    return text
