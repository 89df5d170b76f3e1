"""The page: how late an event reaches fifty that look, through the daemon, its control socket and the page's server;
and the first paint in a real browser, where there is one."""

from __future__ import annotations

import asyncio
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from abliterate.api import Daemon
from abliterate.contract.ids import new_id
from abliterate.contract.messages import Submit
from abliterate.ui.server import PageServer
from bench.daemon import daemon

CLIENTS = 50


def measure(quick: bool) -> dict[str, float]:
    """Milliseconds. `event_*`: from the moment the change is asked for to its arrival at each client."""
    rounds = 20 if quick else 100
    with daemon() as (_, incoming, _process):
        state = incoming.parents[1]
        control = Daemon(state / "control.sock")
        server = PageServer(control, state / "jobs")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            lags = event_lags(control, server, rounds)
            painted = asyncio.run(first_paints(server, 5 if quick else 20))
        finally:
            server.end()
            thread.join()
    lags.sort()
    found = {
        "clients": float(CLIENTS),
        "event_lag_p50_ms": statistics.median(lags) * 1e3,
        "event_lag_p99_ms": lags[int(len(lags) * 0.99)] * 1e3,
    }
    if painted:
        found |= {"first_paint_p50_ms": statistics.median(painted), "first_paint_worst_ms": max(painted)}
    return found


def event_lags(control: Daemon, server: PageServer, rounds: int) -> list[float]:
    """Seconds, one a client and a change."""
    arrived: dict[str, list[float]] = defaultdict(list)
    listening, lock = threading.Semaphore(0), threading.Lock()
    cookie = _enter(server)

    def listen() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=120)
        connection.request("GET", "/api/events", headers={"Cookie": cookie})
        for line in connection.getresponse():
            if line.startswith(b": listening"):
                listening.release()
            elif line.startswith(b"data: "):
                now = time.perf_counter()
                label = json.loads(line[6:])["label"]
                with lock:
                    arrived[label].append(now)
        connection.close()

    threads = [threading.Thread(target=listen, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        listening.acquire()
    lags: list[float] = []
    for number in range(rounds):
        label = f"round-{number}"
        asked = time.perf_counter()
        control.submit(Submit(recipe='model = "ollama:nothing"\n[schedule]\nhold = true\n', id=new_id(), label=label))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and len(arrived[label]) < CLIENTS:
            time.sleep(0.002)
        with lock:
            lags += [moment - asked for moment in arrived[label][:CLIENTS]]
            if len(arrived[label]) < CLIENTS:
                raise SystemExit(f"{label}: {len(arrived[label])} of {CLIENTS} heard of it")
    return lags


async def first_paints(server: PageServer, rounds: int) -> list[float]:
    """Milliseconds to the first contentful paint; empty where there is no Chromium."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from client.browser import CHROMIUM, chromium

    if not CHROMIUM:
        return []
    painted = []
    paint = "performance.getEntriesByName('first-contentful-paint')"
    with tempfile.TemporaryDirectory() as profile:
        async with chromium(Path(profile)) as tab:
            await tab.do("Page.navigate", url=server.gate.link())
            await tab.until(f"location.search === '' && {paint}.length")
            for _ in range(rounds):
                await tab.do("Page.reload")
                await tab.until(f"{paint}.length")
                painted.append(float(await tab.ask(f"{paint}[0].startTime")))
    return painted


def _enter(server: PageServer) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", "/?" + server.gate.link().partition("?")[2])
    cookie = connection.getresponse().getheader("Set-Cookie") or ""
    connection.close()
    return cookie.partition(";")[0]
