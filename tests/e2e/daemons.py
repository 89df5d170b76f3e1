"""Real daemons for tests: a home of their own, free ports, their log in the failure's message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from abliterate.api import Daemon
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView
from abliterate.contract.states import TERMINAL
from abliterated import refuser
from engines import free_port

BIN = Path(sys.executable).parent


@dataclass
class House:
    """A home, its configuration, and the daemon that serves it."""

    home: Path
    proxy: int = field(default_factory=free_port)
    upstream: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.home / "config.toml"

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def incoming(self) -> Path:
        return self.state / "spool" / "incoming"

    @property
    def control(self) -> Daemon:
        return Daemon(self.state / "control.sock")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy}"

    def configure(self, kind: str = "embedded", **sections: dict[str, object]) -> None:
        settings: dict[str, dict[str, object]] = {
            "paths": {"state": str(self.state), "models": [str(self.home), str(refuser.files().model.parent)]},
            "proxy": {"listen": f"127.0.0.1:{self.proxy}", "upstream": f"http://127.0.0.1:{self.upstream}"},
            "engine": {"kind": kind},
        }
        for name, values in sections.items():
            settings.setdefault(name, {}).update(values)
        self.config.write_text(tomli_w.dumps(settings))

    def serve(self) -> subprocess.Popen[bytes]:
        with (self.home / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "abliterated"), "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.until(lambda: self.control.status().pid == self.process.pid if self.process else False, "serving")
        return self.process

    def engine_answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.upstream), timeout=60):
            return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        code = self.process.wait(timeout=150)
        self.process = None
        return code

    def client(self, *arguments: str, code: int = 0, stdin: bytes | None = None) -> str:
        told = subprocess.run(
            [str(BIN / "abliterate"), "--config", str(self.config), *arguments],
            input=stdin,
            capture_output=True,
            timeout=500,
        )
        assert told.returncode == code, told.stderr.decode() + told.stdout.decode()
        return told.stdout.decode()

    def drop(self, recipe: bytes, label: str) -> str:
        """Put a recipe into the spool as a person would; returns the id the job will have."""
        job_id = new_id()
        self.incoming.mkdir(parents=True, exist_ok=True)
        hidden = self.incoming / f".{job_id}.tmp"
        hidden.write_bytes(recipe)
        hidden.chmod(0o640)
        hidden.rename(self.incoming / f"{job_id}.{label}.toml")
        return job_id

    def ended(self, job_id: str, seconds: float = 500) -> JobView:
        """Wait until the job has ended."""
        found: list[JobView] = []

        def look() -> bool:
            found[:] = [self.control.job(job_id)]
            return found[0].state in TERMINAL

        self.until(look, f"job {job_id} to end", seconds)
        return found[0]

    def until(self, good: Callable[[], bool], what: str, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if good():
                    return
            except (AbliteratedError, OSError):
                pass
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.05)
        logs = "".join(
            f"\n--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.home.rglob("*log*")) if log.is_file()
        )
        raise AssertionError(f"waited in vain for {what}{logs}")


@contextmanager
def house() -> Iterator[House]:
    """A home in a short path (unix sockets need one); its daemon is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="abl-") as name:
        made = House(Path(name))
        try:
            yield made
        finally:
            if made.process is not None:
                made.stop(signal.SIGTERM)
