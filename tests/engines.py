"""The engines tests run against: our embedded one, and every real Ollama found; how each is started and ended.

A real Ollama comes from `OLLAMA_BIN`, `PATH`, or the cache of `tools/install_ollama.py`; one that should be in that
cache and isn't is listed too, with the reason, so that its tests skip visibly. Every start is private: free port of
127.0.0.1, models and HOME in temporary folders, log in a file, and at the end the whole process group is gone.

Does not know: what an engine must answer (that is `contract/`), what a model is.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
START_DEADLINE = 120.0
Version = tuple[int, int, int]


@dataclass(frozen=True)
class RunningEngine:
    """One started engine. `models` is its folder of blobs and manifests, `log` the file its output goes to."""

    engine: Engine
    port: int
    process: subprocess.Popen[bytes]
    models: Path
    log: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass(frozen=True)
class Engine:
    """An engine that can be started, or (`missing` says why) one that can't be had here."""

    id: str
    embedded: bool
    version: Version | None = None  # None: ours
    binary: Path | None = None
    missing: str = ""

    def command(self, port: int, models: Path) -> list[str]:
        if self.embedded:
            listen = ["--listen", f"127.0.0.1:{port}", "--models", str(models)]
            return [sys.executable, "-m", "abliterated.engine", *listen]
        return [str(self.binary), "serve"]

    @contextlib.contextmanager
    def start(
        self, models: Path | None = None, *, log: Path | None = None, environment: dict[str, str] | None = None
    ) -> Iterator[RunningEngine]:
        """Start it, wait until it answers, give its address; at the end nothing of it is left running."""
        if self.missing:
            raise RuntimeError(f"{self.id} can't be started: {self.missing}")
        with tempfile.TemporaryDirectory(prefix=f"{self.id}-", ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch)
            models = models or folder / "models"
            models.mkdir(parents=True, exist_ok=True)
            home = folder / "home"
            home.mkdir()
            running = self._launch(models, log or folder / "engine.log", home, environment or {})
            try:
                yield running
            finally:
                end_group(running.process)

    def _launch(self, models: Path, log: Path, home: Path, extra: dict[str, str]) -> RunningEngine:
        for attempt in range(3):  # between finding a free port and binding it, somebody else may have it
            port = free_port()
            environment = private_environment(port, models, home) | extra
            with log.open("ab") as output:
                process = subprocess.Popen(
                    self.command(port, models), env=environment, cwd=home,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            running = RunningEngine(self, port, process, models, log)
            try:
                if wait_until_it_answers(running):
                    return running
            except BaseException:
                end_group(process)
                raise
            end_group(process)
            taken = "address already in use" in running.log_tail().lower()
            if not taken or attempt == 2:
                break
        raise RuntimeError(
            f"{self.id} did not answer (exit code {process.poll()}); its log ends:\n{running.log_tail()}"
        )


def private_environment(port: int, models: Path, home: Path) -> dict[str, str]:
    """Nothing of the user's Ollama: no proxy, no host, no models, no cloud; only what a process needs to run."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(models),
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "LLAMA_SERVER_PYTHON": sys.executable,  # the shim's interpreter: the one that runs the tests
        "NO_PROXY": "*",
    }


def free_port() -> int:
    """One of those no system gives to who asks for any: nobody's connection, not even one to it, takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until_it_answers(running: RunningEngine) -> bool:
    """True when `GET /api/version` says 200; False when the process ended or the deadline passed."""
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline and running.process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)
        try:
            connection.request("GET", "/api/version")
            if connection.getresponse().status == 200:
                return True
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=0.05)  # a pause that ends early if it dies
    return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask, then make sure: an engine's runners are in its group and go with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- finding ---------------------------------------------------------------------------------------------------------


@functools.cache
def find_engines() -> tuple[Engine, ...]:
    """The embedded engine, then the real ones by version; each id once, `OLLAMA_BIN` and `PATH` before the cache."""
    real: dict[str, Engine] = {}
    for binary in given_binaries():
        engine = engine_of(binary)
        real.setdefault(engine.id, engine)
    for engine in installed_engines():
        if engine.id not in real or real[engine.id].missing:
            real[engine.id] = engine
    embedded = Engine("embedded", embedded=True)
    if importlib.util.find_spec("xllamacpp") is None:
        embedded = replace(embedded, missing="xllamacpp is not installed: pip install 'abliterated[pipeline]'")
    return (embedded, *sorted(real.values(), key=lambda engine: (engine.version or (0, 0, 0), engine.id)))


def real_ollamas() -> tuple[Engine, ...]:
    """Those that can be started."""
    return tuple(engine for engine in find_engines() if not engine.embedded and not engine.missing)


def engine_parameters() -> list[Any]:
    """For `pytest.mark.parametrize` and fixtures: one parameter an engine, the real ones marked. See `require`."""
    return [
        pytest.param(engine, id=engine.id, marks=() if engine.embedded else (pytest.mark.real_ollama,))
        for engine in find_engines()
    ]


def require(engine: Engine) -> Engine:
    """Skip the test, with the reason, where this engine can't be had."""
    if engine.missing:
        pytest.skip(f"{engine.id}: {engine.missing}")
    return engine


def given_binaries() -> Iterator[Path]:
    if given := os.environ.get("OLLAMA_BIN"):
        yield Path(given)
    if found := shutil.which("ollama"):
        yield Path(found)


def engine_of(binary: Path) -> Engine:
    """What `ollama --version` says, asked without a server (the address has nobody listening)."""
    with tempfile.TemporaryDirectory() as home:
        environment = private_environment(1, Path(home), Path(home))
        try:
            done = subprocess.run(
                [binary, "--version"], env=environment, capture_output=True, text=True, timeout=60, cwd=home
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Engine(f"ollama-at-{binary.name}", embedded=False, binary=binary, missing=f"{binary}: {error}")
    version = parse_version(done.stdout + done.stderr)
    if version is None:
        return Engine(f"ollama-at-{binary.name}", embedded=False, binary=binary, missing=f"{binary} tells no version")
    return Engine(identity(version), embedded=False, version=version, binary=binary.resolve())


def installed_engines() -> Iterator[Engine]:
    """The generations the installer knows, and whatever else stands in its cache."""
    installer = load_installer()
    root: Path = installer.tools_root()
    names = {known.version for known in installer.GENERATIONS}
    if root.is_dir():
        names |= {folder.name for folder in root.glob("v*") if (folder / "bin" / "ollama").is_file()}
    for name in sorted(names):
        version = parse_version(name)
        if version is None:
            continue
        binary: Path = installer.executable(root, name)
        missing = ""
        if not binary.is_file():
            reason: Path = installer.reason_file(root, name)
            missing = reason.read_text().strip() if reason.is_file() else "not installed; `make ollama` installs it"
        yield Engine(identity(version), embedded=False, version=version, binary=binary, missing=missing)


def load_installer() -> ModuleType:
    """A script beside the packages, not one of them."""
    spec = importlib.util.spec_from_file_location("install_ollama", REPOSITORY / "tools" / "install_ollama.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parse_version(text: str) -> Version | None:
    found = re.findall(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[-1][0]), int(found[-1][1]), int(found[-1][2])) if found else None


def identity(version: Version) -> str:
    return "ollama-" + ".".join(map(str, version))
