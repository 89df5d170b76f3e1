"""What the proxy costs: the same small upstream asked directly, through the proxy (with and without everything that may
look at a request), through nginx and through haproxy, where installed.

`measure(quick)` returns the figures; as a program it prints them as a table, with the bars and whether they hold.
Rounds are interleaved, and the bars are medians of ratios within a round: others' load hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import re
import subprocess
import sys
from pathlib import Path

from abliterated.proxy.server import new_event_loop
from bench import proxy_bars as bars
from bench import proxy_loads as loads
from bench import proxy_servers as servers
from bench.proxy_rounds import AGAINST_NGINX, LIMITS, Paths, Rows, medians, memory, one_round, ratios, small_gets

Figures = dict[str, dict[str, float]]

BARS = (
    *AGAINST_NGINX,
    ("get_p50_us", "armed", "proxy", 1.1, "<="),
    ("requests_per_second_64", "armed", "proxy", 0.9, ">="),
    ("cpu_us_per_token", "armed", "proxy", 1.1, "<="),
    ("memory_kb_per_stream", "armed", "proxy", 1.1, "<="),
    ("upload_mb_per_second", "armed", "proxy", 0.9, ">="),
)
STATES = ("proxy", "armed")


def measure(quick: bool) -> Figures:
    """Figures by path (`direct`, `proxy`, `armed`; `nginx`, `haproxy` where installed), medians; and `ratios`."""
    upstream = servers.free_port()
    with contextlib.ExitStack() as stack:
        answering = stack.enter_context(servers.process(servers.serve_upstream, upstream, port=upstream))
        paths: Paths = {"direct": (upstream, None)}
        for name, target in (("proxy", servers.serve_proxy), ("armed", servers.serve_armed)):
            port = servers.free_port()
            paths[name] = (port, stack.enter_context(servers.process(target, port, upstream, port=port)))
        for name in ("nginx", "haproxy"):
            if servers.installed(name):
                port = servers.free_port()
                paths[name] = (port, stack.enter_context(servers.other(name, port, upstream)))
        rows: Rows = {name: {} for name in paths}
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            memory(runner, paths, rows)
            _growth(rows, upstream, quick)
            draw = random.Random(0)
            for _ in range(6 if quick else 48):
                small_gets(paths, rows, draw, answering)
            for number in range(6 if quick else 16):
                for name in draw.sample(list(paths), len(paths)):
                    port, pid = paths[name]
                    one_round(runner, port, pid, rows[name], upstream, quick, number)
    found = medians(rows)
    found["ratios"] = ratios(rows, BARS)
    return found


def _growth(rows: Rows, upstream: int, quick: bool) -> None:
    """How much a process grows by one upload, asked of fresh ones."""
    for name, target in (("proxy", servers.serve_proxy), ("armed", servers.serve_armed)):
        port = servers.free_port()
        with servers.process(target, port, upstream, port=port) as pid:
            loads.latency(port, 0.1)
            rows[name]["upload_growth_mb"] = [loads.upload(port, pid, (1 if quick else 4) << 29)[1]]


def table(found: Figures) -> str:
    names = [name for name in found if name != "ratios"]
    lines = [f"{'':28}" + "".join(f"{name:>12}" for name in names)]
    for key in found["proxy"]:
        lines.append(f"{key:28}" + "".join(f"{found[name].get(key, math.nan):12.2f}" for name in names))
    return "\n".join([*lines, "", bars.table(rows_of(found))])


def rows_of(found: Figures) -> list[bars.Row]:
    """The figures that have a bar."""
    rows = []
    for key, mine, theirs, bar, sense in BARS:
        if (value := found["ratios"].get(f"{key}: {mine}/{theirs}")) is not None:
            rows.append(bars.Row(f"{key}: {mine}/{theirs}", value, sense, bar))
    rows += [bars.Row(f"{key}: {name}", found[name][key], "<=", limit) for key, limit in LIMITS for name in STATES]
    return rows


def _tell(rows: list[bars.Row], figures: dict[str, object] | None = None) -> bool:
    bars.record(rows, figures)
    sys.stdout.write(bars.table(rows) + "\n")
    return all(row.good for row in rows)


def transparency() -> list[bars.Row]:
    """The differential tests' own word: exchanges recorded directly and through the proxy."""
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/proxy/test_transparency.py"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    counted = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error)", told)}
    same = counted.get("passed", 0)
    return [
        bars.Row("exchanges byte-identical, share of them", same / max(sum(counted.values()), 1), "==", 1),
        bars.Row("exchanges compared", same, ">=", 200),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-proxy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--part",
        choices=("transparency", "figures", "assist", "registering", "restarts", "soak"),
        help="one part of it",
    )
    parser.add_argument("--restarts", type=int, default=40, metavar="N", help="restarts under load (default 40)")
    parser.add_argument("--soak", type=float, default=2.0, metavar="MINUTES", help="mixed load with faults (default 2)")
    options = parser.parse_args()
    good = True
    if options.part in (None, "transparency"):
        good = _tell(transparency()) and good
    if options.part in (None, "figures"):
        found = measure(options.quick)
        sys.stdout.write(table(found) + "\n")
        rows = rows_of(found)
        bars.record(rows, {"proxy": found})
        good = all(row.good for row in rows)
    if options.part in (None, "assist"):
        from bench import proxy_assist

        cost = proxy_assist.measure(options.quick)
        added = bars.Row("assist: CPU added per token, µs, the dearest API", cost["added"], "<=", 50.0)
        good = _tell([added], {"proxy_assist": cost}) and good
    if options.part in (None, "registering"):
        from bench import proxy_registering

        rows, counted = proxy_registering.measure(options.quick)
        good = _tell(rows, {"proxy_registering": counted}) and good
    if options.part in (None, "restarts"):
        from bench import proxy_restarts

        counted = proxy_restarts.measure(4 if options.quick else options.restarts)
        good = _tell([
            bars.Row("restarts: requests failed", counted["failed"], "==", 0),
            bars.Row("restarts: streams broken", counted["streams_broken"], "==", 0),
            bars.Row("restarts: requests answered", counted["requests"], ">=", 60_000),
            bars.Row("restarts: how many", counted["restarts"], ">=", 40),
        ], {"proxy_restarts": counted}) and good  # fmt: skip
    if options.part in (None, "soak"):
        from bench import proxy_soak

        counted = proxy_soak.measure(0.3 if options.quick else options.soak)
        good = _tell([
            bars.Row("soak: minutes", options.soak, ">=", 30),
            bars.Row("soak: growth of memory, MB", counted["drift_mb"], "<", 2),
            bars.Row("soak: connections hung", counted["hung"], "==", 0),
            bars.Row("soak: answers wrong", counted["wrong"], "==", 0),
        ], {"proxy_soak": counted}) and good  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
