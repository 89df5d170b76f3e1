"""The whole daemon as a process: how fast it starts with a past, how much memory it keeps, who gets a lock."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from abliterate.contract.ids import new_id
from abliterate.contract.messages import Submit
from abliterate.contract.recipe import Recipe
from abliterate.contract.states import TERMINAL
from abliterated.jobs.journal import Journal
from e2e.daemons import BIN, House, house

LOCK_RACE = """
import sys, time
from pathlib import Path
from abliterated.jobs.gpu import device_lock
root = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with device_lock(root / "GPU.lock", waiting=lambda who: None, cancelled=lambda: False, job="race"):
        (root / "held").mkdir()  # fails where somebody else holds the lock
        (root / "held").rmdir()
"""


def with_a_past(state: Path, jobs: int) -> None:
    """A journal with so many ended jobs, each with its folder."""
    for folder in (state, state / "jobs"):
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(state / "journal.sqlite3")
    journal._db.execute("PRAGMA synchronous=OFF")
    for number in range(jobs):
        job, _ = journal.add(new_id(), f"past-{number}", Recipe(model="ollama:m", name=f"m{number}"))
        for new in ("starting", "running", "registering", "succeeded"):
            journal.move(job.id, new)
        (state / "jobs" / job.id).mkdir()
        (state / "jobs" / job.id / "recipe.toml").write_bytes(b'model = "ollama:m"\n')
    journal.close()


def start_with_a_past(jobs: int = 10_000, times: int = 3) -> dict[str, float]:
    """Seconds from exec to the first answer, with and without a past."""
    told: dict[str, float] = {"jobs": jobs}
    for name, count in (("empty", 0), ("past", jobs)):
        with house() as home:
            home.configure("ollama")
            with_a_past(home.state, count)
            best = float("inf")
            for _ in range(times):
                begun = time.monotonic()
                _start(home)
                best = min(best, time.monotonic() - begun)
                home.stop()
            told[f"{name}_seconds"] = round(best, 2)
    return told


def _start(home: House) -> None:
    """Until it accepts on its socket; `House.serve` asks for every job's view."""
    with (home.home / "daemon.log").open("ab") as log:
        home.process = subprocess.Popen(
            [str(BIN / "abliterated"), "serve", "--config", str(home.config)], stdout=log, stderr=log
        )
    home.until(lambda: b"200" in _get(home, "/v1/openapi.json"), "answering")


def _get(home: House, path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(60)
        link.connect(str(home.state / "control.sock"))
        link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return link.recv(64)


def memory(jobs: int = 100, requests: int = 10_000) -> dict[str, float]:
    """MB resident: idle, and after jobs with real workers and proxied requests."""
    with house() as home, some_engine() as port:
        home.upstream = port
        home.configure("ollama")
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            process = home.serve()
        finally:
            del os.environ["HF_HUB_OFFLINE"]
        resident = psutil.Process(process.pid)
        time.sleep(3)
        idle = resident.memory_info().rss / 1e6
        # The hub is not asked: each job has a worker of its own, and a reason why it failed.
        ids = [home.control.submit(Submit(recipe=f'model = "hf:org/m{n}"\n')).id for n in range(jobs)]
        with ThreadPoolExecutor(8) as pool:
            good = sum(pool.map(lambda _: _proxied(home, requests // 8), range(8)))
        home.until(lambda: all(job.state in TERMINAL for job in home.control.jobs()), "the end of all jobs", 500)
        time.sleep(2)
        after = resident.memory_info().rss / 1e6
        assert len(ids) == jobs
        return {"idle_mb": round(idle, 1), "after_mb": round(after, 1), "jobs": jobs, "requests": good}


class _Version(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b'{"version":"0.34.4"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def some_engine() -> Iterator[int]:
    """Something that answers as an engine does when asked its version."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Version)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def get(home: House, path: str) -> tuple[int, bytes]:
    """Status and body, through the proxy."""
    link = http.client.HTTPConnection("127.0.0.1", home.proxy, timeout=60)
    try:
        link.request("GET", path)
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def _proxied(home: House, count: int) -> int:
    link = http.client.HTTPConnection("127.0.0.1", home.proxy, timeout=60)
    good = 0
    for _ in range(count):
        link.request("GET", "/api/version")
        answer = link.getresponse()
        answer.read()
        good += answer.status == 200
    link.close()
    return good


def second_daemon(times: int = 3) -> dict[str, float]:
    """Seconds until a second daemon on the same home has said who holds it and gone; the best of some."""
    with house() as home:
        home.configure("ollama")
        first = home.serve()
        argv = [str(BIN / "abliterated"), "serve", "--config", str(home.config)]
        seconds = float("inf")
        for _ in range(times):
            begun = time.monotonic()
            second = subprocess.run(argv, capture_output=True, timeout=60)
            seconds = min(seconds, time.monotonic() - begun)
        named = f"pid {first.pid}".encode() in second.stderr
        return {"seconds": round(seconds, 2), "code": second.returncode, "names_the_holder": named}


def lock_races(processes: int = 4, rounds: int = 25) -> dict[str, int]:
    """So many processes that take one lock so often; who finds another inside fails."""
    with tempfile.TemporaryDirectory(prefix="abl-lock-") as root:
        racers = [
            subprocess.Popen([sys.executable, "-c", LOCK_RACE, root, str(rounds)], stderr=subprocess.PIPE)
            for _ in range(processes)
        ]
        failed = sum(racer.wait(timeout=500) != 0 for racer in racers)
        for racer in racers:
            assert racer.stderr is not None
            racer.stderr.close()
        return {"races": processes * rounds, "two_holders": failed}
