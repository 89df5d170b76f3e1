"""A report without numbers that can't be drawn: whatever is no number is left out, and none is beyond all measure.

Pure. Does not know how anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from abliterate.contract.report import Report

MOST = 1e12
replace = msgspec.structs.replace


def sound(report: Report) -> Report:
    """The same report with drawable numbers. A share that is none counts as all: nothing is made to look better."""
    search, edit = report.search, report.edit
    if search:
        trials = [one for one in search.trials if math.isfinite(one.refusal) and math.isfinite(one.kl)]
        trials = [replace(one, refusal=bound(one.refusal), kl=bound(one.kl)) for one in trials]
        target = search.refusal_target
        search = replace(search, trials=trials, refusal_target=None if target is None else bound(target))
    return replace(
        report,
        candidates=[
            replace(one, layer=bound(one.layer), bypass=known(one.bypass), kl=known(one.kl), induce=known(one.induce))
            for one in report.candidates
        ],
        search=search,
        separation=[
            replace(one, harmful=finite(one.harmful), harmless=finite(one.harmless), apart=bound(one.apart))
            for one in report.separation
        ],
        edit=replace(
            edit,
            coverage=bound(edit.coverage),
            residual=share(edit.residual),
            strengths=[(bound(one), bound(other)) for one, other in edit.strengths],
            tensors=[replace(one, residual=share(one.residual), rounding=share(one.rounding)) for one in edit.tensors],
        ),
        evaluation=numbers(report.evaluation),
        seconds={name: max(0.0, value) for name, value in numbers(report.seconds).items()},
    )


def bound(value: float) -> float:
    """A number within measure; nil where it is none."""
    return max(-MOST, min(MOST, value)) if math.isfinite(value) else 0.0


def known(value: float | None) -> float | None:
    """The same; None where it is none."""
    return bound(value) if value is not None and math.isfinite(value) else None


def share(value: float) -> float:
    """A share; all of it where it is none."""
    return bound(value) if math.isfinite(value) else 1.0


def finite(values: Sequence[float]) -> list[float]:
    """Those that are numbers."""
    return [bound(value) for value in values if math.isfinite(value)]


def numbers(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers, by name."""
    return {name: bound(value) for name, value in values.items() if math.isfinite(value)}
