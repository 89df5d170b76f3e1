"""`make nightly`: every proof of the queue at its full size. Figures go to bench/reliability.json as they come, and
docs/reliability.md is written from them.

    python -m nightly [NAME…] [--quick] [--page]       with PYTHONPATH=tests
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "bench" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Proof:
    """A row of the page. `holds` is the bar; `told` the measured figures in words."""

    name: str
    what: str
    bar: str
    measure: Callable[[bool], Figures]
    holds: Callable[[Figures], bool]
    told: Callable[[Figures], str]


def matrix(*arguments: str, count: int = 0) -> Callable[[bool], Figures]:
    def measure(quick: bool) -> Figures:
        asked = [("each" if quick and part == "pairs" else part) for part in arguments]
        asked += ["--random", str(50 if quick else count)] if count else []
        told = subprocess.run([sys.executable, "-m", "faults.matrix", *asked], capture_output=True, text=True)
        found: Figures = json.loads(told.stdout[told.stdout.index("{") :])
        return found

    return measure


def filled(quick: bool) -> Figures:
    argv = [sys.executable, "-m", "faults.full", "--step", "65536" if quick else "4096"]
    found: Figures = json.loads(subprocess.run(argv, capture_output=True, text=True).stdout)
    return found


def tested(*names: str) -> Callable[[bool], Figures]:
    def measure(quick: bool) -> Figures:
        begun = time.monotonic()
        argv = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *names]
        told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        last = told.stdout.strip().split("\n")[-1]
        return {
            "passed": told.returncode == 0,
            "told": last,
            "tests": " ".join(names),
            "seconds": round(time.monotonic() - begun, 1),
        }

    return measure


def measured(module: str, function: str, quick: dict[str, int]) -> Callable[[bool], Figures]:
    def measure(is_quick: bool) -> Figures:
        found: Figures = getattr(__import__(f"nightly.{module}", fromlist=[function]), function)(
            **(quick if is_quick else {})
        )
        return found

    return measure


def clean(figures: Figures) -> bool:
    return figures["lost"] == figures["doubled"] == figures["wrong"] == 0 and figures["runs"] > 0


def deaths(figures: Figures) -> str:
    return (
        f"{figures['runs']} runs, {figures['deaths']} deaths at {figures['points']} points: {figures['lost']} lost, "
        f"{figures['doubled']} doubled, {figures['wrong']} wrong"
    )


def passed(figures: Figures) -> bool:
    return bool(figures["passed"])


def words(figures: Figures) -> str:
    return f"{'passed' if figures['passed'] else 'FAILED'}: `{figures['tests']}`"


LOSSLESS = "0 lost, 0 doubled, 0 wrong"
PROOFS = (
    Proof(
        "kill-each",
        "`kill -9` at every failpoint, up to its third time",
        LOSSLESS,
        matrix("--kills", "each"),
        clean,
        deaths,
    ),
    Proof("kill-pairs", "… at all ordered pairs of failpoints", LOSSLESS, matrix("--kills", "pairs"), clean, deaths),
    Proof(
        "kill-random",
        "… at 1,000 random places, one to three times",
        LOSSLESS,
        matrix("--kills", "none", count=1000),
        clean,
        deaths,
    ),
    Proof(
        "power-pairs",
        "the same pairs as power cuts: what was not fsynced is rolled back",
        LOSSLESS,
        matrix("--kills", "pairs", "--power", "strict"),
        clean,
        deaths,
    ),
    Proof(
        "power-random",
        "1,000 random power cuts, some of the rest kept",
        LOSSLESS,
        matrix("--kills", "none", "--power", "lucky", count=1000),
        clean,
        deaths,
    ),
    Proof(
        "disk-full",
        "disk full at each write",
        LOSSLESS,
        matrix("--kills", "each", "--action", "enospc"),
        clean,
        lambda f: f"{f['runs']} writes failed once: {f['lost']} lost, {f['doubled']} doubled, {f['wrong']} wrong",
    ),
    Proof(
        "disk-room",
        "a filesystem with so many pages left, each number in turn: journal intact, then all ends well",
        LOSSLESS,
        filled,
        clean,
        lambda f: (
            f"{f['runs']} runs with 0 to {f['room'] // 1024} KiB left, too little in {f['full']}: {f['lost']} lost, "
            f"{f['doubled']} doubled, {f['wrong']} wrong"
        ),
    ),
    Proof(
        "disk-full-real",
        "a full filesystem: the failure recorded, the proxy answers, the queue goes on when there is room",
        "all",
        tested("tests/faults/test_disk_full.py"),
        passed,
        words,
    ),
    Proof(
        "drop",
        "drop → queued, p99, best of three series: renamed in · in place · polling · every event lost",
        "50 ms · 0.6 s · 2.5 s · 30 s",
        measured("spool", "drop_to_queued", {"count": 20}),
        lambda f: f["renamed"] <= 0.05 and f["in_place"] <= 0.6 and f["polling"] <= 2.5 and f["events_lost"] <= 30,
        lambda f: (
            f"{f['renamed'] * 1000:.0f} ms · {f['in_place'] * 1000:.0f} ms · {f['polling']:.2f} s"
            f" · {f['events_lost']:.1f} s; an fsync of that disk took {f['fsync'] * 1000:.1f} ms (p99)"
        ),
    ),
    Proof(
        "burst",
        "10,000 files in a burst",
        "0 lost, 0 doubled",
        measured("spool", "burst", {"count": 500}),
        lambda f: f["lost"] == f["doubled"] == 0,
        lambda f: f"{f['files']} files in {f['seconds']} s: {f['lost']} lost, {f['doubled']} doubled",
    ),
    Proof(
        "slow-writers",
        "200 random slow-write schedules",
        "0 truncated recipes accepted",
        measured("spool", "slow_writers", {"count": 40}),
        lambda f: f["truncated"] == f["rejected"] == 0,
        lambda f: f"{f['schedules']} schedules: {f['truncated']} truncated, {f['rejected']} wrongly rejected",
    ),
    Proof(
        "start",
        "start-up with 10,000 past jobs",
        "≤ 2 s",
        measured("life", "start_with_a_past", {"jobs": 500}),
        lambda f: f["past_seconds"] <= 2,
        lambda f: f"{f['past_seconds']} s ({f['empty_seconds']} s without a past)",
    ),
    Proof(
        "engine-away",
        "the engine away for a simulated day",
        "device free meanwhile, then exactly one model",
        tested("tests/jobs/test_night.py", "-k", "away_for_a_day"),
        passed,
        words,
    ),
    Proof(
        "fuzz",
        "100,000 fuzzed recipes ≤ 64 KiB",
        "verdict ≤ 100 ms, ≤ 64 MB, 0 uncaught",
        measured("recipes", "fuzz", {"count": 2000}),
        lambda f: f["slowest_ms"] <= 100 and f["grown_mb"] <= 64 and f["uncaught"] == 0,
        lambda f: (
            f"{f['recipes']} recipes: slowest {f['slowest_ms']} ms of processor time, "
            f"{f['grown_mb']} MB more, {f['uncaught']} uncaught"
        ),
    ),
    Proof(
        "hostile-spool",
        "25 hostile spool entries",
        "none followed, none fatal",
        tested("tests/spool/test_hostile.py"),
        passed,
        words,
    ),
    Proof(
        "hostile-control",
        "30 hostile control requests",
        "all 4xx",
        tested("tests/control/test_hostile.py"),
        passed,
        words,
    ),
    Proof(
        "memory",
        "resident memory idle; after 100 jobs and 10,000 proxied requests",
        "≤ 60 MB; ≤ 80 MB",
        measured("life", "memory", {"jobs": 3, "requests": 800}),
        lambda f: f["idle_mb"] <= 60 and f["after_mb"] <= 80,
        lambda f: f"{f['idle_mb']} MB; {f['after_mb']} MB after {f['jobs']} jobs and {f['requests']} requests",
    ),
    Proof(
        "second-daemon",
        "a second daemon on the same home",
        "gone ≤ 1 s",
        measured("life", "second_daemon", {}),
        lambda f: f["seconds"] <= 1 and f["code"] == 75 and f["names_the_holder"],
        lambda f: f"{f['seconds']} s; exit {f['code']}, names the holder",
    ),
    Proof(
        "locks",
        "100 lock races",
        "never two holders",
        measured("life", "lock_races", {}),
        lambda f: f["two_holders"] == 0,
        lambda f: f"{f['races']} races: {f['two_holders']} times two holders",
    ),
    Proof(
        "night",
        "8 simulated hours of 200 mixed jobs with random faults, restarts and drains",
        "every job ended rightly",
        tested("tests/jobs/test_night.py", "-k", "eight_hours"),
        passed,
        words,
    ),
)


def known() -> dict[str, Figures]:
    """The figures so far; read anew each time, for proofs may be made side by side."""
    return json.loads(FIGURES.read_text())["proofs"] if FIGURES.exists() else {}


def page(found: dict[str, Figures]) -> str:
    """docs/reliability.md."""
    lines = [
        "# Reliability: what was proved, and how",
        "",
        "Written by `make nightly` from bench/reliability.json; every row can be made again with",
        "`PYTHONPATH=tests .venv/bin/python -m nightly NAME`. Smaller sizes of the same run with every `make test`.",
        "",
        "| proof | bar | measured | holds |",
        "|---|---|---|---|",
    ]
    for proof in PROOFS:
        figures = found.get(proof.name)
        if figures is None:
            lines.append(f"| {proof.what} (`{proof.name}`) | {proof.bar} | not yet | – |")
        else:
            holds = "yes" if proof.holds(figures) else "**no**"
            lines.append(f"| {proof.what} (`{proof.name}`) | {proof.bar} | {proof.told(figures)} | {holds} |")
    return "\n".join([*lines, "", *METHOD]) + "\n"


METHOD = """\
## How

- **Deaths.** `abliterated/failpoints.py` names the places between two effects: each write before and after its
  fsync, its rename and the folder's fsync, each commit, each removal, each step of a registration. A run is the
  real tray, desk, journal and dispatcher on real files, with a worker that works in two stages and an engine that
  writes as carelessly as Ollama does (no fsync, manifests in place). It is killed with SIGKILL at the place asked
  for, started again, killed again where two or three deaths are asked for, and at last left to end. Then: one job
  for each file, its copy byte-identical, a legal path of states, exactly one model with the right bytes, one reason
  for the recipe that is none, nothing left over.
- **Could it fail?** `tests/faults/test_matrix.py` leaves one care out at a time (files unsynced, folders unsynced, the
  engine trusted, claims forgotten, unlinked before committed) and asks that the matrix finds each; and that every
  failpoint in the source is one that it dies at.
- **Full disks.** Once each write fails with ENOSPC; and a real filesystem is left every number of pages from none to
  enough, with and without the journal's spare file. The daemon must stay up, and end everything rightly when there is
  room again.
- **Power cuts.** At the place of death the files below the home are put back to what had been fsynced (files by
  fsync, entries by their folder's fsync), inode numbers and times kept; with luck, each later write, entry or
  removal is kept whole, half or not at all. SQLite's own files are left to SQLite, which syncs every commit before
  it answers.
- **A night** runs the real dispatcher and journal on an event loop whose clock jumps; workers only pretend. An
  oracle written for the test says how each job must end.
- **The machine** has two cores and was shared with other work meanwhile; rows that say "best of" left that out.
- What these do not show: a disk that lies about fsync, a kernel that crashes, and the worker's own stages under
  power cuts (they are written by the same `write_whole`; `tests/pipeline/test_run_killed.py` kills real ones).
""".rstrip().split("\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="nightly")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(proof.name for proof in PROOFS))
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT / "tests")
    code = 0
    for proof in () if options.page else PROOFS:
        if options.names and proof.name not in options.names:
            continue
        figures = proof.measure(options.quick)
        holds = proof.holds(figures)
        code = code or int(not holds)
        sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {proof.name}: {proof.told(figures)}\n")
        sys.stdout.flush()
        if not options.quick:
            found = known() | {proof.name: figures}
            told = {"python": platform.python_version(), "system": platform.platform(terse=True), "proofs": found}
            FIGURES.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    if not options.quick:
        PAGE.write_text(page(known()))
    return code


if __name__ == "__main__":
    sys.exit(main())
