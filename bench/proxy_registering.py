"""All that is asked of the proxy, asked of a real `abliterated serve` while that registers a 2 GB model with a real
engine: beside nginx, which stands before the same upstream at the same time.

The machine's processors are shared by all: what a registration takes of them is taken from both. CPU is that of the
thread the proxy runs in, with what that does for the registration. Does not know how a registration is kept going
(`proxy_daemon`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from abliterated.proxy.server import new_event_loop
from bench import proxy_daemon as serving
from bench import proxy_loads as loads
from bench import proxy_servers as servers
from bench.proxy_bars import Row
from bench.proxy_rounds import AGAINST_NGINX, LIMITS, Paths, Rows, medians, memory, one_round, ratios, small_gets
from bench.registration import make_product

SIZE = 2_000_000_000
WITHIN = 1.15
WHILE = "while 2 GB are registered"


def measure(quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """The seven with the bars they have there, and the figures behind them."""
    if not servers.installed("nginx"):
        raise SystemExit("nginx is not installed: it is what the proxy is measured beside")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-registering-")))
        product = stack.enter_context(make_product(folder, 0, SIZE >> 3 if quick else SIZE))
        engine = stack.enter_context(_engine().start(folder / "models")).port
        upstream, port, beside = (servers.free_port() for _ in range(3))
        stack.enter_context(servers.process(serving.serve_either, upstream, engine, port=upstream))
        pid = stack.enter_context(serving.daemon(folder, port, upstream))
        nginx = stack.enter_context(servers.other("nginx", beside, upstream))
        jobs = stack.enter_context(serving.registering(folder, product, engine))
        paths: Paths = {"proxy": (port, loads.FirstThread(pid)), "nginx": (beside, nginx)}
        rows: Rows = {name: {} for name in paths}
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            jobs.wait()
            memory(runner, paths, rows)
            rows["proxy"]["upload_growth_mb"] = [loads.upload(*paths["proxy"], (1 if quick else 4) << 29)[1]]
            draw = random.Random(0)
            for number in range(6 if quick else 16):
                small_gets(paths, rows, draw)
                for name in list(paths)[:: -1 if number % 2 else 1]:
                    one_round(runner, *paths[name], rows[name], upstream, quick, number)
        ended, busy = jobs.ended, jobs.busy
    found: dict[str, Any] = medians(rows)
    found["ratios"] = ratios(rows, AGAINST_NGINX)
    found["registering"] = {"ended": ended, "share_of_time": round(busy, 3)}
    return rows_of(found), found


def rows_of(found: dict[str, Any]) -> list[Row]:
    rows = []
    for key, mine, theirs, bar, sense in AGAINST_NGINX:
        relaxed = bar * WITHIN if sense == "<=" else bar * (2 - WITHIN)
        rows.append(Row(f"{key}: serve/{theirs}, {WHILE}", found["ratios"][f"{key}: {mine}/{theirs}"], sense, relaxed))
    rows += [Row(f"{key}: serve, {WHILE}", found["proxy"][key], "<=", bar * WITHIN) for key, bar in LIMITS]
    share = found["registering"]["share_of_time"]
    return [*rows, Row("share of that time in which a model was registered", share, ">=", 0.9)]


def _engine() -> Any:
    """The newest real Ollama here, else ours; the tests know how engines are found and started."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    found = importlib.import_module("engines").find_engines()
    return [engine for engine in found if not engine.missing][-1]
