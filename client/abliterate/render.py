"""Text for people and for programs: tables, one job in detail, times and sizes, JSON. Pure: gives text, prints nothing.

Whatever came from elsewhere is cleaned of what a terminal would obey. Does not know the daemon's address, nor rich.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from abliterate.contract.messages import JobView, Status

_COLOURS: Final = {
    "running": "36",
    "starting": "36",
    "registering": "36",
    "cancelling": "33",
    "held": "33",
    "succeeded": "32",
    "failed": "31",
    "rejected": "31",
    "cancelled": "2",
}
_HEADINGS: Final = ("ID", "NAME", "MODEL → TARGET", "STATE", "REASON", "%", "ETA", "AGE")
_FLEXIBLE: Final = (2, 4, 1)  # what gives way in a narrow terminal
_LEAST: Final = 12  # and how far
_DISPENSABLE: Final = (1, 7, 6, 5)  # what goes where that is not enough: the target tells the name, `status ID` all
_GONE: Final = -2  # the width of a column that isn't drawn: the gap before it goes too


def clean(text: str) -> str:
    """`text` on one line, with every character a terminal might obey or hide spelt out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _spelt(char) for char in text)


def duration(seconds: float | None) -> str:
    """Seconds in two units at most: 45s, 3m20s, 2h05m, 3d04h."""
    if seconds is None or seconds != seconds or seconds < 0:
        return ""
    whole = int(min(seconds, 8.64e9))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(job: JobView) -> str:
    """How far the stage is; nothing where that isn't known."""
    if job.state not in ("running", "registering") or job.total <= 0:
        return ""
    return f"{int(max(0.0, min(100.0, 100 * (job.done / job.total))))}%"


def why(job: JobView) -> str:
    """The REASON column: the stage of a job that runs, why another one doesn't, what a failed one failed of."""
    if job.failure is not None and job.state in ("failed", "rejected"):
        return f"{job.failure.failure}: {job.failure.message}"
    if job.state in ("running", "registering") and job.stage:
        return job.stage
    return ": ".join(part for part in (job.reason, job.explanation) if part)


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """The shortest endings of at least six characters that tell `ids` apart."""
    for length in range(6, 26):
        short = {full: full[-length:] for full in ids}
        if len(set(short.values())) == len(short):
            return short
    return {full: full for full in ids}


def job_cells(job: JobView, short: str, now: float) -> list[str]:
    """The cells of a job's row, under the headings."""
    arrow = clean(f"{job.model} → {job.target}")
    age = duration(max(0.0, now - job.submitted)) if job.submitted else ""
    eta = duration(job.remaining) if job.state in ("running", "registering") else ""
    return [short, clean(job.label), arrow, job.state, clean(why(job)), percent(job), eta, age]


def job_table(jobs: Sequence[JobView], *, now: float | None = None, width: int = 0, colour: bool = False) -> str:
    """All jobs as a table; `width` 0 means as wide as it gets."""
    short = short_ids([job.id for job in jobs])
    moment = time.time() if now is None else now
    rows = [list(_HEADINGS), *(job_cells(job, short[job.id], moment) for job in jobs)]
    widths = [max(cell_width(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    if width and sum(widths) + 2 * (len(widths) - 1) > width:
        # What a job makes is worth more than what it is made of, which its name mostly tells.
        for row, name in zip(rows, ("TARGET", *(clean(job.target) for job in jobs)), strict=True):
            row[2] = name
        widths[2] = max(cell_width(row[2]) for row in rows)
    widths = fit(_without_dispensable(widths, rows, width), width)
    lines = []
    for number, row in enumerate(rows):
        cells = [_pad(cell, widths[column], right=column >= 5) for column, cell in enumerate(row)]
        if colour:
            paint = "1" if number == 0 else _COLOURS.get(row[3], "")
            at = range(len(cells)) if number == 0 else (3,)
            for column in at:
                cells[column] = f"\x1b[{paint}m{cells[column]}\x1b[0m" if paint else cells[column]
        lines.append("  ".join(cell for column, cell in enumerate(cells) if widths[column] != _GONE).rstrip())
    return "\n".join(lines)


def _without_dispensable(widths: list[int], rows: Sequence[Sequence[str]], total: int) -> list[int]:
    """Take columns out as long as the row would not fit into `total` cells at its narrowest: the empty ones first."""
    left = list(widths)

    def narrowest() -> int:
        least = (min(wide, _LEAST) if column in _FLEXIBLE else wide for column, wide in enumerate(left))
        return sum(least) + 2 * (len(left) - 1)

    for column in sorted(_DISPENSABLE, key=lambda column: any(row[column] for row in rows[1:])):
        if total and narrowest() > total:
            left[column] = _GONE
    return left


def fit(widths: list[int], total: int) -> list[int]:
    """Shrink the flexible columns, the widest first, until the row fits into `total` cells; none below _LEAST."""
    excess = sum(widths) + 2 * (len(widths) - 1) - total if total else 0
    for _ in range(excess):
        widest = max(_FLEXIBLE, key=widths.__getitem__)
        if widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
    return widths


def job_details(job: JobView, *, now: float | None = None) -> str:
    """One job, a fact a line."""
    moment = time.time() if now is None else now
    facts: list[tuple[str, str]] = [
        ("id", job.id),
        ("name", job.label),
        ("model", job.model),
        ("target", job.target),
        ("state", job.state),
        ("reason", why(job)),
        ("progress", " ".join(part for part in (percent(job), job.message) if part)),
        ("remaining", duration(job.remaining) if job.state in ("running", "registering") else ""),
        ("memory", size(job.memory) if job.memory else ""),
        ("attempts", str(job.attempts) if job.attempts > 1 else ""),
        ("submitted", _ago(job.submitted, moment)),
        ("started", _ago(job.started, moment)),
        ("ended", _ago(job.ended, moment)),
    ]
    if job.failure is not None and job.failure.remedy:
        facts.append(("remedy", job.failure.remedy))
    if job.result is not None:
        facts.append(("product", f"{job.result.product} ({job.result.format})"))
        facts += [(name, f"{value:.4g}") for name, value in sorted(job.result.metrics.items())]
        spent = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in job.result.seconds.items())
        facts += [("seconds", spent), *(("note", note) for note in job.result.notes)]
        facts += certification_facts(job.result.certification)
    kept = [(name, clean(value)) for name, value in facts if value]
    wide = max(len(clean(name)) for name, _ in kept)
    return "\n".join(f"{clean(name):<{wide}}  {value}" for name, value in kept)


def certification_facts(certification: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the proof says, a diff a line each; values of another version are passed over."""
    if not certification:
        return []
    compared, differences = certification.get("compared") or [], certification.get("differences") or []
    against = f"{len(compared)} conversations as {certification.get('reference')}" if compared else "nothing to compare"
    failed = any(one.get("failure") for one in differences if isinstance(one, Mapping))
    facts = [("certified", f"{'no' if failed else 'yes'}: {against}; it says {certification.get('answer', '')!r}")]
    for one in differences:
        if isinstance(one, Mapping):
            kind = "differs" if one.get("failure") else "warning"
            facts.append((kind, f"{one.get('what', '')}: {one.get('text', '')}"))
            facts += [("", line) for line in str(one.get("diff") or "").splitlines()]
    return facts


def summary(status: Status) -> str:
    """One line about the daemon itself."""
    engine = f"engine {status.engine.kind} {status.engine.version}".rstrip()
    parts = [
        f"abliterated {status.version}",
        engine if status.engine.answers else f"{engine} does not answer at {status.engine.url}",
        f"proxy on {status.proxy}" if status.proxy else "no proxy",
        *(["queue paused: `abliterate resume` starts it again"] if status.paused else []),
    ]
    return clean(" · ".join(parts))


def json_text(value: Any) -> str:
    """`value` (structs included) as JSON, indented, nothing in it that a terminal would obey."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    if text.replace("\n", "").isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else _json_spelt(char) for char in text)


def colours(stream: IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """Whether `stream` wants colour: a terminal that isn't dumb, and no NO_COLOR."""
    env = os.environ if environ is None else environ
    return stream.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb"


def terminal_width(stream: IO[str]) -> int:
    """How many cells wide the terminal is; 0 where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0


def _ago(moment: float | None, now: float) -> str:
    if not moment:
        return ""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(max(moment, 0), 253_402_300_799)))
    return f"{stamp} ({duration(max(0.0, now - moment))} ago)"


def _spelt(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_spelt(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def cell_width(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int, *, right: bool) -> str:
    used = cell_width(text)
    if used > width:
        while text and cell_width(text) > width - 1:
            text = text[:-1]
        text += "…"
        used = cell_width(text)
    return " " * (width - used) + text if right else text + " " * (width - used)
