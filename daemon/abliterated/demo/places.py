"""Where the demo happens: a temporary home, free ports, a private engine, a real daemon.

Nothing of the user's is touched. Does not know the story.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import tomli_w

from abliterate.contract.errors import EngineUnavailable, NotFound, RecipeError

START_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """A running daemon with its engine. `proxy` and `upstream` are URLs."""

    home: Path
    config: Path
    socket: Path
    incoming: Path
    proxy: str
    upstream: str
    engine: str


def choose_engine(wanted: str) -> tuple[str, str]:
    """("ollama", its executable) or ("embedded", ""). Raises NotFound, RecipeError."""
    named = os.environ.get("OLLAMA_BIN", "")
    found = shutil.which(named) if named else shutil.which("ollama")
    if named and not found:
        raise RecipeError(f"OLLAMA_BIN: {named!r} is no executable", remedy="Correct it, or unset it")
    if wanted == "ollama" and not found:
        raise NotFound("no `ollama` found", remedy="Install Ollama, set OLLAMA_BIN, or use --engine embedded")
    if wanted == "embedded" or not found:
        return "embedded", ""
    return "ollama", found


@contextlib.contextmanager
def place(engine: str, executable: str, roots: list[Path]) -> Iterator[Place]:
    """Start engine and daemon, stop both at the end. `roots`: folders the recipe may name."""
    with tempfile.TemporaryDirectory(prefix="abliterated-") as name, contextlib.ExitStack() as stack:
        home = Path(name)
        proxy_port, engine_port = free_ports(2)
        config = home / "config.toml"
        settings = {
            "paths": {"state": str(home / "state"), "models": [str(root) for root in roots]},
            "proxy": {"listen": f"127.0.0.1:{proxy_port}", "upstream": f"http://127.0.0.1:{engine_port}"},
            "engine": {"kind": engine},
        }
        config.write_text(tomli_w.dumps(settings))
        if engine == "ollama":
            stack.enter_context(_ollama(executable, home, engine_port))
        parent, alive = os.pipe()
        stack.callback(os.close, alive)
        daemon = [sys.executable, "-m", "abliterated.cli", "serve", "--config", str(config), "--parent-fd", str(parent)]
        stack.callback(os.close, parent)
        stack.enter_context(_process(daemon, home / "daemon.log", dict(os.environ), parent))
        here = Place(
            home=home,
            config=config,
            socket=home / "state" / "control.sock",
            incoming=home / "state" / "spool" / "incoming",
            proxy=f"http://127.0.0.1:{proxy_port}",
            upstream=f"http://127.0.0.1:{engine_port}",
            engine=engine,
        )
        _wait_for(f"{here.upstream}/api/version", home)
        _wait_for(f"{here.proxy}/api/version", home)
        yield here


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, and of those no system gives to who asks for any: they stay free meanwhile."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


@contextlib.contextmanager
def _ollama(executable: str, home: Path, port: int) -> Iterator[None]:
    (home / "ollama").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OLLAMA_")}
    environment |= {
        "HOME": str(home),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(home / "ollama"),
        "OLLAMA_NOPRUNE": "1",
    }
    with _process([executable, "serve"], home / "ollama.log", environment):
        yield


@contextlib.contextmanager
def _process(
    command: list[str], output: Path, environment: dict[str, str], descriptor: int | None = None
) -> Iterator[None]:
    with output.open("wb") as log:
        process = _start(command, log, environment, descriptor)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(
    command: list[str], log: IO[bytes], environment: dict[str, str], descriptor: int | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
        pass_fds=() if descriptor is None else (descriptor,),
    )


def _wait_for(url: str, home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own loopback address
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    tail = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(home.glob("**/*.log")))
    raise EngineUnavailable(f"nothing answers at {url}{tail}", remedy="See the logs above")
