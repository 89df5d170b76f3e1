"""The daemon's own costs: idle memory, what it loads, the client's cold start, and how fast a dropped file is a job."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import tomli_w

from abliterate.api import Daemon
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.ids import new_id

RECIPE = b'model = "ollama:nothing"\n'


@contextmanager
def daemon() -> Iterator[tuple[Path, Path, subprocess.Popen[bytes]]]:
    """A daemon in a home of its own, without proxy or engine; (config, incoming, process)."""
    with tempfile.TemporaryDirectory(prefix="abliterated-") as name:
        home = Path(name)
        config = home / "config.toml"
        config.write_text(
            tomli_w.dumps(
                {
                    "paths": {"state": str(home / "state")},
                    "proxy": {"listen": "127.0.0.1:0", "upstream": "http://127.0.0.1:9"},
                    "engine": {"kind": "ollama"},
                }
            )
        )
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "abliterated.cli", "serve", "--config", str(config)], stdout=log, stderr=log
            )
        try:
            _wait(Daemon(home / "state" / "control.sock"))
            yield config, home / "state" / "spool" / "incoming", process
        finally:
            process.terminate()
            process.wait(timeout=60)


def measure(quick: bool) -> dict[str, float]:
    """All figures of this file. Seconds, bytes and counts."""
    rounds = 20 if quick else 100
    with daemon() as (config, incoming, process):
        control = Daemon(incoming.parents[1] / "control.sock")
        resident = psutil.Process(process.pid).memory_info().rss
        cold = cold_status(config, 5 if quick else 15)
        bare = bare_python(5 if quick else 15)
        delays = [drop_to_queued(control, incoming) for _ in range(rounds)]
        maps = Path(f"/proc/{process.pid}/maps")
        torch = maps.exists() and "torch" in maps.read_text()
    delays.sort()
    return {
        "idle_resident_mb": resident / 2**20,
        "torch_loaded": float(torch),
        "status_cold_ms": cold * 1e3,
        "status_cold_vs_bare_python": cold / bare,
        "drop_to_queued_p50_ms": statistics.median(delays) * 1e3,
        "drop_to_queued_p99_ms": delays[min(len(delays) - 1, int(len(delays) * 0.99))] * 1e3,
    }


def cold_status(config: Path, rounds: int) -> float:
    """Median seconds of `abliterate status` as a new process."""
    command = [str(Path(sys.executable).with_name("abliterate")), "--config", str(config), "status", "--json"]
    return _median(command, rounds)


def bare_python(rounds: int) -> float:
    """Median seconds of a Python that does nothing, for comparison."""
    return _median([sys.executable, "-c", "pass"], rounds)


def drop_to_queued(control: Daemon, incoming: Path) -> float:
    """Seconds from the rename into the folder until the daemon knows the job."""
    job_id = new_id()
    hidden = incoming / f".{job_id}.tmp"
    hidden.write_bytes(RECIPE)
    start = time.perf_counter()
    os.rename(hidden, incoming / f"{job_id}.bench.toml")  # noqa: PTH104 - nothing but the rename is timed
    while True:
        try:
            control.job(job_id)
            return time.perf_counter() - start
        except AbliteratedError:
            time.sleep(0.0005)


def _median(command: list[str], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(control: Daemon) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            control.status()
            return
        except AbliteratedError:
            time.sleep(0.05)
    raise SystemExit("the daemon did not come up")
