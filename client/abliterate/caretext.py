"""Diagnoses, repairs, removals and the list of models as text for people. Pure: gives text, prints nothing.

Does not know who asked, nor the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from abliterate.render import clean, size

if TYPE_CHECKING:
    from abliterate.contract.care import Diagnosis, Models, Repaired, Undone

_MARKS: Final = {"ok": "ok", "note": "note", "warning": "warning", "problem": "PROBLEM"}
_PAINT: Final = {"ok": "32", "note": "2", "warning": "33", "problem": "31"}


def diagnosis_text(diagnosis: Diagnosis, *, colour: bool = False) -> str:
    """The findings, a line each, each with what to do about it."""
    lines: list[str] = []
    if diagnosis.model:
        against = f", held against {diagnosis.base}" if diagnosis.base else ", no base to hold it against"
        abilities = ", ".join(diagnosis.capabilities) or "nothing it tells of"
        lines.append(clean(f"{diagnosis.model} (engine {diagnosis.engine}{against}): {abilities}"))
    for finding in diagnosis.findings:
        mark = _MARKS.get(finding.level, finding.level)
        shown = f"\x1b[{_PAINT.get(finding.level, '0')}m{mark:<8}\x1b[0m" if colour else f"{mark:<8}"
        lines.append(f"{shown} {clean(finding.text)}")
        if finding.remedy:
            lines.append(f"{'':<8} → {clean(finding.remedy)}")
    return "\n".join(lines)


def repaired_text(done: Repaired) -> str:
    """What was changed, and how to go back."""
    if not done.changed:
        return clean(f"{done.model}: nothing that its manifest could mend")
    lines = [clean(f"{done.model}: repaired{f' from {done.base}' if done.base else ''} in {done.seconds:.2f} s")]
    lines += [f"  {clean(change)}" for change in done.changed]
    if done.backup:
        lines.append(clean(f"  kept as it was: {done.backup}; `abliterate repair {done.model} --back` returns to it"))
    return "\n".join(lines)


def undone_text(done: Undone) -> str:
    """What went, and what it gave back."""
    lines = [clean(f"removed {', '.join(done.removed)}; freed {size(done.freed)}")]
    if done.kept_by:
        lines.append(clean(f"  its weights stay: {', '.join(done.kept_by)} hold them too"))
    return "\n".join([*lines, *(f"  {clean(note)}" for note in done.notes)])


def models_table(models: Models) -> str:
    """A row a model: what it is, what it was made from, how often each refused."""
    rows = [["MODEL", "BASE", "SIZE", "QUANT", "REFUSED BEFORE → AFTER"]]
    for row in models.models:
        base = row.base.removeprefix("ollama:") + ("" if row.base_there else " (gone)" if row.base else "")
        rows.append(
            [
                clean(row.name),
                clean(base),
                size(row.size),
                clean(row.quantization),
                _shares(row.refusal_before, row.refusal_after),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shares(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return "not measured"
    return " → ".join("?" if share is None else f"{share:.0%}" for share in (before, after))
