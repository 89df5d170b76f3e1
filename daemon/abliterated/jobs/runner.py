"""Starts a worker, listens to it, stops it. One process group a worker; its environment is an allow-list.

Does not know what a worker's end means (`jobs/outcome.py`) nor the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from abliterate.contract.errors import DiskError
from abliterate.contract.messages import Failure, Progress, Result, Task, WorkerEvent
from abliterated.files import write_whole

TERM_SECONDS = 10.0
LINE_LIMIT = 1024 * 1024
KEPT_VARIABLES = [
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "USER",
    "LOGNAME",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
]
# What the one stage that may use the network needs, and only a worker whose model is at a hub gets.
FETCH_VARIABLES = [
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "CREDENTIALS_DIRECTORY",
    "HF_HUB_OFFLINE",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
]


@dataclass
class Worker:
    """A running worker. `started` identifies it together with `pid`."""

    process: asyncio.subprocess.Process
    pid: int
    started: float
    alive: int
    events: asyncio.StreamReader
    transport: asyncio.BaseTransport
    word: Result | Failure | None = None

    @property
    def mark(self) -> str:
        return f"{self.pid}:{self.started}"


def worker_environment(environ: Mapping[str, str], task: Task) -> dict[str, str]:
    """What a worker gets to see: no sockets of the service manager, no tokens, no network for the hub's libraries.

    One whose model must still be fetched gets the hub's token and may go online; it gives both up after that stage.
    """
    fetches = not task.source and task.recipe.model.startswith("hf:")
    kept = {key: environ[key] for key in KEPT_VARIABLES + FETCH_VARIABLES * fetches if key in environ}
    offline = {} if fetches else {"HF_HUB_OFFLINE": "1"}
    return kept | offline | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}


async def start_worker(task: Task, folder: Path) -> Worker:
    """Start a worker for `task`; its log is `folder/log.txt`. Raises DiskError."""
    try:
        write_whole(folder / "task.json", msgspec.json.encode(task), mode=0o640)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DiskError(f"{folder}: can't be written ({error.strerror})", remedy="Free some space there") from error
    read_end, write_end = os.pipe()
    parent_read, alive = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "abliterated.jobs.worker",
            "--task",
            str(folder / "task.json"),
            "--progress-fd",
            str(write_end),
            "--parent-fd",
            str(parent_read),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(write_end, parent_read),
            env=worker_environment(os.environ, task),
            cwd=folder,
        )
    except OSError as error:
        os.close(read_end)
        os.close(alive)
        raise DiskError(f"no worker could be started ({error.strerror})", remedy="Free some memory and disk") from error
    finally:
        for descriptor in (log, write_end, parent_read):
            os.close(descriptor)
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", buffering=0)
    )
    return Worker(process, process.pid, _started(process.pid), alive, reader, transport)


async def follow(worker: Worker, tell: Callable[[Progress], None]) -> int:
    """Hear the worker to its end; returns its exit status (negative: the signal). Garbage is passed over."""
    decoder = msgspec.json.Decoder(WorkerEvent)
    try:
        while True:
            try:
                line = await worker.events.readline()
            except ValueError:
                continue
            if not line:
                break
            try:
                event = decoder.decode(line)
            except msgspec.DecodeError:
                continue
            if isinstance(event, Progress):
                tell(event)
            else:
                worker.word = event
        return await worker.process.wait()
    finally:
        worker.transport.close()
        os.close(worker.alive)


async def stop_worker(worker: Worker, patience: float = TERM_SECONDS) -> None:
    """Ask the worker to end; after `patience` seconds end its whole process group."""
    _signal_group(worker.pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(asyncio.shield(worker.process.wait()), patience)
    except TimeoutError:
        _signal_group(worker.pid, signal.SIGKILL)
        await worker.process.wait()


def end_orphan(mark: str) -> bool:
    """End a worker an earlier daemon left behind, if that very process is still there."""
    pid, _, started = mark.partition(":")
    if not pid.isdigit() or _started(int(pid)) != float(started or -1):
        return False
    _signal_group(int(pid), signal.SIGKILL)
    with contextlib.suppress(psutil.Error):
        psutil.Process(int(pid)).wait(timeout=10)
    return True


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _started(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
