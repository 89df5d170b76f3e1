"""Restarts under load: no request fails, every stream is whole."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterated.succession import SOCKETS, Inheritance
from e2e.daemons import House
from engines import free_port
from proxy.corpus import VERSION, chunk
from proxy.script import DEADLINE

TOKENS = [b'{"content":"t%d"}\n' % number for number in range(60)]


@contextlib.contextmanager
def small_ollama() -> Iterator[int]:
    """Answers GETs at once, POSTs with a stream of half a second."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                if data.startswith(b"GET"):
                    connection.sendall(VERSION * data.count(b"\r\n\r\n"))
                    continue
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for token in TOKENS:
                    connection.sendall(chunk(token)[:-5])
                    time.sleep(0.01)  # the pace of a model
                connection.sendall(b"0\r\n\r\n")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


class Load:
    """Clients that keep their connections while they may, and note every failure."""

    def __init__(self, port: int, getters: int = 4, streamers: int = 3) -> None:
        self.port = port
        self.failures: list[str] = []
        self.answered = self.streams = 0
        self._stop = threading.Event()
        work: list[Callable[[], None]] = [self._get] * getters + [self._stream] * streamers
        self._threads = [threading.Thread(target=self._guard, args=(one,), daemon=True) for one in work]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _guard(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.failures.append(repr(error))

    def _get(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            while not self._stop.is_set():
                connection.request("GET", "/api/version")
                answer = connection.getresponse()
                assert answer.read() == b'{"version":"0.34.1"}'
                self.answered += 1
                if answer.will_close:
                    return

    def _stream(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("POST", "/api/chat", b'{"model":"m"}')
            assert connection.getresponse().read() == b"".join(TOKENS)
            self.streams += 1


def until(holds: Callable[[], bool], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(log: Path) -> list[int]:
    """The pids of those who came after the first, as the log names them."""
    lines = log.read_text().splitlines()
    return [int(line.split("pid ")[1].split()[0]) for line in lines if "serves now" in line]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(") ")[2][:1] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_hangup_hands_the_sockets_on_and_no_request_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with small_ollama() as upstream:
        port = free_port()
        command = [sys.executable, "-m", "abliterated.cli", "proxy", "--listen", f"127.0.0.1:{port}"]
        with log.open("ab") as out:
            first = subprocess.Popen(
                [*command, "--upstream", f"http://127.0.0.1:{upstream}"], stdin=subprocess.DEVNULL, stderr=out
            )
        pids = [first.pid]
        try:
            until(lambda: "listening on" in log.read_text())
            with Load(port) as load:
                for generation in range(1, 4):
                    before = load.streams
                    os.kill(pids[-1], signal.SIGHUP)
                    until(lambda: len(children(log)) == generation)  # noqa: B023 (used at once)
                    pids.append(children(log)[-1])
                    until(lambda: load.streams > before + 2)  # noqa: B023
                until(lambda: first.poll() is not None and not alive(pids[1]))
                until(lambda: load.answered > 200)
            assert load.failures == []
            assert load.streams >= 9
            assert first.returncode == 0
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            until(lambda: not any(alive(pid) for pid in pids))
            first.wait(DEADLINE)


def test_a_successor_that_does_not_come_up_leaves_the_old_one_serving(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # The program as it was started is this very script; with the sockets inherited it fails.
    script = tmp_path / "fails_later.py"
    script.write_text(
        "import os, sys\n"
        f"if {SOCKETS!r} in os.environ: sys.exit(3)\n"
        "from abliterated import logs, succession\n"
        "from abliterated.proxy import alone\n"
        "logs.set_up()\n"
        "sys.exit(alone.run(alone.Proxy('127.0.0.1:0', sys.argv[1]), hand_over=succession.hand_over))\n"
    )
    with small_ollama() as upstream, log.open("ab") as out:
        process = subprocess.Popen([sys.executable, str(script), f"http://127.0.0.1:{upstream}"], stderr=out)
        try:
            until(lambda: "listening on" in log.read_text())
            port = int(log.read_text().split("127.0.0.1:")[1].split("'")[0])
            process.send_signal(signal.SIGHUP)
            until(lambda: "we go on" in log.read_text())
            with Load(port, 1, 0) as load:
                until(lambda: load.answered > 5)
            assert load.failures == [] and process.poll() is None
        finally:
            process.terminate()
            assert process.wait(DEADLINE) == 0


def test_the_daemon_becomes_itself_anew_on_a_hangup_and_no_request_is_lost(tmp_path: Path) -> None:
    with small_ollama() as upstream:
        house = House(tmp_path, upstream=upstream)
        house.configure("ollama")
        process = house.serve()
        try:
            with Load(house.proxy) as load:
                for lives in (2, 3):
                    answered = load.answered
                    process.send_signal(signal.SIGHUP)
                    until(lambda: lives_of(house) == lives)  # noqa: B023 (used at once)
                    until(lambda: load.answered > answered + 20)  # noqa: B023
                until(lambda: load.streams > 3)
            assert load.failures == []
            assert house.control.status().pid == process.pid
        finally:
            assert house.stop() == 0


def lives_of(house: House) -> int:
    """How often it has said that it serves."""
    return (house.home / "daemon.log").read_text().count("action=ready")


def test_nothing_inherited_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, Any] = {}
    left = Inheritance(environment)
    left.serving()
    assert left.sockets == []
