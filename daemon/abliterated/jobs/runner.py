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
from abliterated.failpoints import failpoint
from abliterated.files import write_whole
from abliterated.jobs.job_log import JobLog, pump
from abliterated.jobs.scheduler import Device

TERM_SECONDS = 10.0
LINE_LIMIT = 1024 * 1024
LOG_SECONDS = 2.0
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


# Told through a pipe: what stands in /proc/PID/environ stays there as long as the process lives.
SECRETS = ["HF_TOKEN"]


@dataclass
class Worker:
    """A running worker. `started` identifies it together with `pid`."""

    process: asyncio.subprocess.Process
    pid: int
    started: float
    alive: int
    events: asyncio.StreamReader
    transport: asyncio.BaseTransport
    logging: asyncio.Task[None]
    log_transport: asyncio.BaseTransport
    word: Result | Failure | None = None

    @property
    def mark(self) -> str:
        return f"{self.pid}:{self.started}"

    async def follow(self, tell: Callable[[Progress], None]) -> int:
        return await follow(self, tell)

    async def stop(self, patience: float = TERM_SECONDS) -> None:
        await stop_worker(self, patience)

    def work_done(self) -> float | None:
        """Of the worker and its children."""
        try:
            process = psutil.Process(self.pid)
            family = [process, *process.children(recursive=True)]
            used = [(one.cpu_times(), _bytes_moved(one)) for one in family]
        except psutil.Error:
            return None
        return sum(times.user + times.system + moved / 1e6 for times, moved in used)


class LocalExecutor:
    """Workers on this machine."""

    here = True

    async def start(self, task: Task, folder: Path, device: Device) -> Worker:
        return await start_worker(task, folder, device)

    def end_orphan(self, mark: str) -> bool:
        return end_orphan(mark)


def worker_environment(environ: Mapping[str, str], task: Task, device: Device | None = None) -> dict[str, str]:
    """What a worker gets to see: no sockets of the service manager, no tokens, no network for the hub's libraries.

    One whose model must still be fetched may go online; it gives that up after that stage. Of several GPUs it sees
    its own.
    """
    fetches = must_fetch(task)
    kept = {key: environ[key] for key in KEPT_VARIABLES + FETCH_VARIABLES * fetches if key in environ}
    offline = {} if fetches else {"HF_HUB_OFFLINE": "1"}
    own: dict[str, str] = {}
    if device is not None and device.name.startswith("GPU-"):
        own = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # as nvidia-smi counts
        if task.recipe.run.device == "auto":
            own["CUDA_VISIBLE_DEVICES"] = device.name
    return kept | offline | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}


def secrets(environ: Mapping[str, str], task: Task) -> bytes:
    """What only the fetching stage may know, as JSON; less than a pipe holds."""
    return msgspec.json.encode({key: environ[key][:4096] for key in SECRETS if key in environ and must_fetch(task)})


def must_fetch(task: Task) -> bool:
    """Whether the worker's first stage needs the network."""
    return not task.source and task.recipe.model.startswith("hf:")


async def start_worker(task: Task, folder: Path, device: Device | None = None) -> Worker:
    """Start a worker for `task`; its log is `folder/log.txt`. Raises DiskError."""
    try:
        write_whole(folder / "task.json", msgspec.json.encode(task), mode=0o640)
        failpoint("worker.task-written")
        job_log = JobLog(folder / "log.txt")
    except OSError as error:
        raise DiskError(f"{folder}: can't be written ({error.strerror})", remedy="Free some space there") from error
    read_end, write_end = os.pipe()
    parent_read, alive = os.pipe()
    log_read, log = os.pipe()
    secrets_read, secrets_write = os.pipe()
    os.write(secrets_write, secrets(os.environ, task))
    os.close(secrets_write)
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
            "--secrets-fd",
            str(secrets_read),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(write_end, parent_read, secrets_read),
            env=worker_environment(os.environ, task, device),
            cwd=folder,
        )
    except OSError as error:
        for descriptor in (read_end, alive, log_read):
            os.close(descriptor)
        job_log.close()
        raise DiskError(f"no worker could be started ({error.strerror})", remedy="Free some memory and disk") from error
    finally:
        for descriptor in (log, write_end, parent_read, secrets_read):
            os.close(descriptor)
    reader, transport = await _reader(read_end)
    log_reader, log_transport = await _reader(log_read)
    logging = asyncio.get_running_loop().create_task(pump(log_reader, job_log), name=f"log {task.job}")
    return Worker(process, process.pid, _started(process.pid), alive, reader, transport, logging, log_transport)


async def _reader(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return reader, transport


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
        status = await worker.process.wait()
        # A child it left may hold the log open; what the worker itself wrote is in the pipe already.
        await asyncio.wait({worker.logging}, timeout=LOG_SECONDS)
        return status
    finally:
        worker.logging.cancel()
        worker.log_transport.close()
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


def _bytes_moved(process: psutil.Process) -> float:
    try:
        moved = process.io_counters()
    except (psutil.Error, AttributeError):
        return 0.0
    return float(moved.read_bytes + moved.write_bytes)


def _started(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
