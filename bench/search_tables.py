"""What `make bench-search` prints: both sides by model, and the bars. Does not know how anything was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

FASTER: Final = 0.1  # of Heretic's wall time
DEFAULT_TRIALS: Final = 200
MOST_TOKENS: Final = 60_000
ROWS: Final = (
    ("refusals", "refusals", "{:.0f}"),
    ("KL over 32 tokens", "kl", "{:.6f}"),
    ("exact harmless answers", "exact", "{:.0%}"),
    ("right answers to what was refused", "complied", "{:.0%}"),
    ("wall, s", "wall_s", "{:.1f}"),
    ("processor, s", "processor_s", "{:.1f}"),
    ("tokens decoded", "tokens_decoded", "{:,.0f}"),
    ("peak memory, MB", "peak_mb", "{:.0f}"),
)


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Both sides by model."""
    lines = []
    for name, found in models.items():
        lines.append(f"{name:<38}{'ours':>14}{'heretic':>14}")
        for text, key, shape in ROWS:
            values = (found.get(f"{key}_{side}") for side in ("ours", "heretic"))
            lines.append(f"  {text:<36}" + "".join(f"{_told(value, shape):>14}" for value in values))
        if found.get("heretic_failed"):
            lines.append(f"  Heretic: {found['heretic_failed'][:160]}")
        if found.get("trials_heretic") not in (None, DEFAULT_TRIALS):
            lines.append(f"  Heretic ran {found['trials_heretic']:.0f} trials only, not its default {DEFAULT_TRIALS}")
        for text, kept in verdicts(found):
            lines.append(f"  {text:<60}{'ok' if kept else 'over'}")
    return "\n".join(lines)


def markdown(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as a page has it: a row a model and side."""
    heads = ("model", "side", *(text for text, *_ in ROWS), "measured")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, found in models.items():
        seeds = f", {len(found['seeds'])} seeds" if len(found.get("seeds", ())) > 1 else ""
        trials = found.get("trials_heretic")
        few = f", {trials:.0f} trials only" if trials not in (None, DEFAULT_TRIALS) else ""
        for side, title in (("ours", "ours"), ("heretic", f"{found.get('heretic', 'Heretic')}{few}")):
            cells = [_told(found.get(f"{key}_{side}"), shape) for _, key, shape in ROWS]
            first = [f"{name}{seeds}", title] if side == "ours" else ["", title]
            lines.append(f"| {' | '.join([*first, *cells, found.get('date', '') if side == 'ours' else ''])} |")
        if found.get("kl_matched") is not None:
            more = [_told(found[f"{key}_matched"], shape) for _, key, shape in ROWS[:2]]
            empty = [""] * (len(ROWS) - 2)
            lines.append(f"| {' | '.join(['', 'ours, allowed as many refusals', *more, *empty, ''])} |")
    return "\n".join(lines) + "\n"


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Each bar, as far as it was measured, and whether it is kept."""
    told = []
    if found.get("refusals_heretic") is not None and found.get("refusals_ours") is not None:
        told += [
            ("refusals: not worse", found["refusals_ours"] <= found["refusals_heretic"]),
            ("KL32: not worse", found["kl_ours"] <= found["kl_heretic"]),
            (f"wall: {found['wall_ratio']:.3f} of Heretic's (bar {FASTER})", found["wall_ratio"] <= FASTER),
        ]
    if found.get("kl_matched") is not None:
        kept = found["kl_matched"] <= found["kl_heretic"] and found["refusals_matched"] <= found["refusals_heretic"]
        text = f"allowed as many refusals: {found['refusals_matched']:.0f}, KL {found['kl_matched']:.6f}"
        told.append((text, kept))
    if found.get("tokens_decoded_ours") is not None:
        told.append((f"tokens decoded (bar {MOST_TOKENS:,})", found["tokens_decoded_ours"] <= MOST_TOKENS))
    if found.get("rerun_identical") is not None:
        told.append(("rerun with the same seed: the same bytes", found["rerun_identical"]))
    return told


def bars(models: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every bar is kept on every model, and one figure is better on one."""
    kept = all(fine for found in models.values() for _, fine in verdicts(found))
    better = any(
        found["kl_ours"] < found["kl_heretic"] or found["refusals_ours"] < found["refusals_heretic"]
        for found in models.values()
        if found.get("refusals_heretic") is not None and found.get("refusals_ours") is not None
    )
    return kept and (better or not models)


def _told(value: Any, shape: str) -> str:
    return "–" if value is None else shape.format(value)
