"""Deaths at every place: runs of `MiniDaemon` in forked children, each killed where it is told, then one left to end.

`python -m faults.matrix --kills pairs --random 1000 [--power strict|lucky] [--points N]` prints what came of it as
JSON. A child costs a fork, not a start of Python.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.contract.states import TRANSITIONS
from abliterated import failpoints
from abliterated.jobs.journal import Journal
from faults.house import MiniDaemon, product_of
from faults.power import PowerCut

RECIPES = 2
REJECTED = {"bad.toml", "bad.reason.txt", "bad.reason.json"}
BAD = b'modle = "ollama:m"\n'


@dataclass(frozen=True)
class Death:
    """Where a child dies: the nth time it reaches `name`; `index` counts every place instead."""

    name: str = ""
    time: int = 1
    index: int = 0


def drop(root: Path, count: int = RECIPES) -> dict[str, bytes]:
    """Recipes as `abliterate submit` leaves them: written aside, renamed in; good ones and a bad one."""
    incoming = root / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    recipes = {f"r{n}": f'model = "ollama:base{n}"\n'.encode() for n in range(count)}
    for label, data in [*recipes.items(), ("bad", BAD)]:
        hidden = incoming / f".{label}.tmp"
        hidden.write_bytes(data)
        hidden.chmod(0o640)
        hidden.rename(incoming / f"{label}.toml")
    return recipes


@dataclass(frozen=True)
class Way:
    """How a story goes: what the disk does at a death (`power`), what happens there, and which care is left out."""

    power: str = ""
    action: str = "kill"
    sabotage: str = ""


def child(root: Path, death: Death | None, way: Way, seed: int) -> int:
    """Run one daemon in a fork, to its death or its end; returns the wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 70
    try:
        cut = None
        if way.power:
            luck = random.Random(seed) if way.power == "lucky" else None
            cut = PowerCut(root, root.with_name(root.name + ".grave"), luck)
            cut.install()
        if way.sabotage:
            SABOTAGES[way.sabotage]()
        if death is not None:
            _arm(death, cut, way.action)
        asyncio.run(MiniDaemon(root).serve())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _arm(death: Death, cut: PowerCut | None, action: str) -> None:
    seen = 0
    named = 0

    def reached(name: str) -> None:
        nonlocal seen, named
        seen += 1
        named += name == death.name
        if (death.index and seen == death.index) or (name == death.name and named == death.time):
            if action == "enospc":
                raise OSError(28, "No space left on device", name)
            if cut is not None:
                cut.cut()
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hook(reached)


def _is_folder(descriptor: Any) -> bool:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return stat.S_ISDIR(os.fstat(number).st_mode)


def _forgets_claims() -> None:
    Journal.claimed = lambda self, claim: None  # type: ignore[method-assign]


def _unlinks_first() -> None:
    from abliterated.spool import tray

    accept = tray.Tray._accept

    def hasty(self: tray.Tray, folder: int, entry: tray.Entry, recipe: tray.Recipe) -> float | None:
        tray.remove_entry(folder, entry)
        return accept(self, folder, entry, recipe)

    tray.Tray._accept = hasty  # type: ignore[method-assign]


def _files_unsynced() -> None:
    real = os.fsync
    os.fsync = lambda fd: real(fd) if _is_folder(fd) else None


def _folders_unsynced() -> None:
    real = os.fsync
    os.fsync = lambda fd: None if _is_folder(fd) else real(fd)


def _trusts_the_engine() -> None:
    from abliterated.jobs import registrations

    registrations._all_on_disk = lambda: None


# Each leaves one care out of the daemon; a matrix worth its name finds what that loses.
SABOTAGES: dict[str, Callable[[], None]] = {
    "forgets-claims": _forgets_claims,
    "unlinks-first": _unlinks_first,
    "files-unsynced": _files_unsynced,
    "folders-unsynced": _folders_unsynced,
    "trusts-the-engine": _trusts_the_engine,
}


def traced(work: Path) -> list[str]:
    """Every place a whole run reaches, in order."""
    root = work / "trace"
    drop(root)
    file = work / "trace.txt"
    pid = os.fork()
    if not pid:
        failpoints.arm(f"*=trace:{file}")
        asyncio.run(MiniDaemon(root).serve())
        os._exit(0)
    os.waitpid(pid, 0)
    return file.read_text().split()


def problems(root: Path, recipes: dict[str, bytes]) -> list[str]:
    """What is lost, doubled or wrong after the last, undisturbed run."""
    found: list[str] = []
    journal = Journal(root / "journal.sqlite3")
    jobs = journal.jobs()
    for label, data in recipes.items():
        mine = [job for job in jobs if job.label == label]
        if not mine:
            found.append(f"lost {label}")
            continue
        if len(mine) > 1:
            found.append(f"doubled {label}")
        job = mine[0]
        if job.state != "succeeded":
            found.append(f"wrong {label}: {job.state} {job.failure}")
        copy = root / "jobs" / job.id / "recipe.toml"
        if not copy.exists() or copy.read_bytes() != data:
            found.append(f"wrong {label}: copy of the recipe")
        states = [(old, new) for old, new, *_ in journal.history(job.id)]
        if any(new not in TRANSITIONS[old] for old, new in states if old):  # type: ignore[index]
            found.append(f"wrong {label}: path {states}")
        if [new for _, new in states].count("succeeded") != 1:
            found.append(f"doubled {label}: {states}")
    made = MiniDaemonModels(root)
    wanted = {f"{job.target.replace(':', '_')}": product_of(job.model) for job in jobs}
    if made != wanted:
        found.append(f"wrong models: {sorted(made)} for {sorted(wanted)}")
    left = [p.name for p in (root / "incoming").iterdir()]
    rejected = {p.name: p.read_bytes() for p in (root / "rejected").iterdir()}
    if set(rejected) != REJECTED or rejected["bad.toml"] != BAD or b"modle" not in rejected["bad.reason.txt"]:
        found.append(f"wrong reason: {sorted(rejected)}")
    left += [str(p) for p in (root / "jobs").rglob("*.tmp")] + [str(p) for p in (root / "jobs").rglob("*.gguf")]
    left += [p.name for p in (root / "jobs").iterdir() if p.name not in {job.id for job in jobs}]
    if left:
        found.append(f"left over: {left}")
    journal.close()
    return found


def MiniDaemonModels(root: Path) -> dict[str, bytes]:
    from faults.house import CarelessEngine

    return CarelessEngine(root / "engine").models()


def run(work: Path, deaths: Iterable[Death], way: Way, seed: int) -> tuple[list[str], int]:
    """One story: a death after the other, then a run to the end. What is wrong, and how many deaths happened."""
    root = work / f"run{seed}"
    recipes = drop(root)
    died = 0
    for number, death in enumerate(deaths):
        status = child(root, death, way, seed * 10 + number)
        if os.WIFSIGNALED(status):
            died += 1
        elif os.WEXITSTATUS(status) == 70 and way.action == "kill":
            return [f"a daemon fell: {death}"], died
    status = child(root, None, Way(sabotage=way.sabotage), 0)
    found = problems(root, recipes) if status == 0 else [f"the last daemon ended with {status}"]
    if not found:
        shutil.rmtree(root)
        shutil.rmtree(root.with_name(root.name + ".grave"), ignore_errors=True)
    return found, died


def stories(trace: list[str], kind: str, count: int, seed: int) -> Iterator[list[Death]]:
    names = list(dict.fromkeys(trace))
    if kind == "each":
        for name in names:
            for nth in range(1, min(trace.count(name), 3) + 1):
                yield [Death(name, nth)]
    elif kind == "pairs":
        for first, second in itertools.product(names, names):
            yield [Death(first), Death(second)]
    luck = random.Random(seed)
    for _ in range(count):
        yield [Death(index=luck.randint(1, len(trace))) for _ in range(luck.randint(1, 3))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", choices=("none", "each", "pairs"), default="each")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--power", choices=("", "strict", "lucky"), default="")
    parser.add_argument("--action", choices=("kill", "enospc"), default="kill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sabotage", choices=("", *SABOTAGES), default="", help="leave a care out: it must be found")
    options = parser.parse_args()
    way = Way(options.power, options.action, options.sabotage)
    begun = time.monotonic()
    wrong: list[str] = []
    # Thousands of runs: in memory where that can be had; what is durable there, PowerCut decides.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="abl-faults-", dir=memory) as name:
        work = Path(name)
        trace = traced(work)
        runs = deaths = 0
        for number, story in enumerate(stories(trace, options.kills, options.random, options.seed), 1):
            if options.action == "enospc" and not all(d.name.startswith(("write.", "desk.")) for d in story):
                continue
            found, died = run(work, story, way, number)
            runs, deaths = runs + 1, deaths + died
            wrong += [f"{story}: {one}" for one in found]
            if wrong and options.sabotage:
                break
    return tell({"points": len(set(trace)), "places": len(trace), "runs": runs, "deaths": deaths}, wrong, begun)


def tell(counts: dict[str, int], wrong: list[str], begun: float) -> int:
    """Print what was counted and what was found wrong, by kind; returns the exit code."""
    told = {
        **counts,
        "lost": sum(": lost" in one for one in wrong),
        "doubled": sum(": doubled" in one for one in wrong),
        "wrong": len([one for one in wrong if ": lost" not in one and ": doubled" not in one]),
        "seconds": round(time.monotonic() - begun, 1),
        "examples": wrong[:5],
    }
    print(json.dumps(told, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
