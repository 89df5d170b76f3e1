"""One round of all loads on one path, and what many rounds say of two paths side by side.

Does not know which paths there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
from collections.abc import Iterable, Iterator

from bench import proxy_loads as loads

Rows = dict[str, dict[str, list[float]]]
Paths = dict[str, tuple[int, int | None]]

# The figure, what it is compared with, the ratio it must keep, and whether less or more is better.
Bar = tuple[str, str, str, float, str]
AGAINST_NGINX: tuple[Bar, ...] = (
    ("get_p50_us", "proxy", "nginx", 1.1, "<="),
    ("requests_per_second_64", "proxy", "nginx", 0.9, ">="),
    ("cpu_us_per_token", "proxy", "nginx", 1.2, "<="),
    ("memory_kb_per_stream", "proxy", "nginx", 0.25, "<="),
    ("upload_mb_per_second", "proxy", "nginx", 1.5, ">="),
)
STREAMS, RATE = 64, 100  # tokens a second each
LIMITS = (("disconnect_p99_ms", 5.0), ("upload_growth_mb", 2.0))


def memory(runner: asyncio.Runner, paths: Paths, rows: Rows) -> None:
    """First of all, while nothing has grown yet; and uploads next, for the same reason."""
    for name, (port, pid) in paths.items():
        loads.latency(port, 0.1)
        rows[name]["memory_kb_per_stream"] = [runner.run(loads.memory(port, pid))]


def small_gets(paths: Paths, rows: Rows, draw: random.Random, upstream: int | None = None) -> None:
    """One client that asks for little, while nobody else asks; in a drawn order.

    Where the kernel puts three processes on a few processors tells more than what is compared (the same two, asked
    again: 0.76 to 1.44), and stays for seconds. With the pid of the `upstream`, each has its place: the one that is
    measured a processor to itself, who asks and who answers another; and it is asked where they are put by the kernel,
    too, for comparison.
    """
    for name in draw.sample(list(paths), len(paths)):
        port, pid = paths[name]
        if upstream is None:
            rows[name].setdefault("get_p50_us", []).append(loads.latency(port, 0.3))
            continue
        with _apart([0, upstream], [pid]):
            rows[name].setdefault("get_p50_us", []).append(loads.latency(port, 0.3))
        rows[name].setdefault("get_p50_us_anywhere", []).append(loads.latency(port, 0.3))


@contextlib.contextmanager
def _apart(*groups: list[int | None]) -> Iterator[None]:
    """Each group of processes (0: this one) on a processor of its own, where there are enough and the system can."""
    everywhere = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(everywhere) < len(groups):
        yield
        return
    places = zip(groups, everywhere, strict=False)
    placed = [(pid, place) for group, place in places for pid in group if pid is not None]
    for pid, place in placed:
        os.sched_setaffinity(pid, {place})
    try:
        yield
    finally:
        for pid, _ in placed:
            os.sched_setaffinity(pid, everywhere)


def one_round(
    runner: asyncio.Runner,
    port: int,
    pid: int | None,
    row: dict[str, list[float]],
    upstream: int,
    quick: bool,
    number: int,
) -> None:
    """The `number`th; the long ones are not in every round."""
    seconds = 0.15 if quick else 0.2
    per_second, per_request = runner.run(loads.throughput(port, pid, seconds))
    new = {
        "get_p50_us_after_load": loads.latency(port, seconds),
        "requests_per_second_64": per_second,
        "cpu_us_per_request": per_request,
    }
    if number < 2 or not quick:
        new["cpu_us_per_token"] = runner.run(loads.streams(port, pid, STREAMS, RATE, 150))
    if number < (2 if quick else 4):
        used = loads.cpu(pid)
        new["upload_mb_per_second"], _ = loads.upload(port, pid, (1 if quick else 4) << 29)
        new["upload_cpu_ms_per_gb"] = (loads.cpu(pid) - used) * 1000 / (0.54 if quick else 2.15)
        if pid is not None:
            new["disconnect_p99_ms"] = high(loads.disconnects(port, upstream, 50 if quick else 200))
    for key, value in new.items():
        row.setdefault(key, []).append(value)


def high(values: list[float]) -> float:
    return sorted(values)[max(0, math.ceil(len(values) * 0.99) - 1)]


def medians(rows: Rows) -> dict[str, dict[str, float]]:
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()}


def ratios(rows: Rows, bars: Iterable[Bar]) -> dict[str, float]:
    found = {}
    for key, mine, theirs, _, _ in bars:
        if mine in rows and theirs in rows:
            pairs = zip(rows[mine][key], rows[theirs][key], strict=True)
            found[f"{key}: {mine}/{theirs}"] = statistics.median(a / b if b else math.inf for a, b in pairs)
    return found
