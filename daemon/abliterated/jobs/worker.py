"""The worker: one process a job. Takes the device lock, runs the pipeline, tells its progress.

Started by `jobs/runner.py` as `python -m abliterated.jobs.worker`. Its stdout and stderr are the job's log; progress
goes as NDJSON through a pipe of its own; its exit status tells the class of a failure. It dies with the daemon.
Does not know the journal, Ollama or the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec
import psutil

from abliterate.contract.errors import AbliteratedError, Cancelled
from abliterate.contract.messages import Failure, Progress, Result, Task, WorkerEvent
from abliterated.failpoints import failpoint
from abliterated.jobs.gpu import device_lock

CANCEL_SECONDS = 20.0


class Channel:
    """The progress pipe: one JSON line an event. A daemon that is gone is no error: the worker is told otherwise."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()

    def send(self, event: WorkerEvent) -> None:
        line = self._encoder.encode(event) + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class Stop:
    """Whether the run was asked to end. Asked in time, it ends by itself; after CANCEL_SECONDS it is ended."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        if self._asked.is_set():
            return
        self._asked.set()
        timer = threading.Timer(CANCEL_SECONDS, os._exit, args=(Cancelled.exit_code,))
        timer.daemon = True
        timer.start()


def die_with_parent(parent: int | None, stop: Stop) -> None:
    """End when the daemon does: by the kernel's signal on Linux, by the end of a pipe everywhere."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    if parent is not None:

        def watch() -> None:
            with contextlib.suppress(OSError):
                while os.read(parent, 1):
                    pass
            stop.ask()

        threading.Thread(target=watch, name="parent", daemon=True).start()


def be_polite() -> None:
    """Lower priority for processor and disk; first to go when memory is short. Not every system has each."""
    process = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError):
        process.nice(10)
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        process.ionice(psutil.IOPRIO_CLASS_IDLE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")


def learn(descriptor: int) -> None:
    """Take the secrets of the fetching stage into this process's own memory; /proc shows what it was started with."""
    with os.fdopen(descriptor, "rb") as pipe:
        os.environ.update(msgspec.json.decode(pipe.read() or b"{}", type=dict[str, str]))


def run_task(task: Task, channel: Channel, stop: Stop) -> int:
    """Fetch what is not here, run the pipeline under the lock; returns the exit status, after the last word."""
    try:
        task, fetching = _here(task, channel, stop)
        if task.lock:
            with device_lock(
                Path(task.lock),
                waiting=lambda who: channel.send(Progress(stage="load", message=f"waits for the device: {who}")),
                cancelled=stop,
                job=task.job,
            ):
                result = _pipeline(task, channel, stop)
        else:
            result = _pipeline(task, channel, stop)
    except AbliteratedError as error:
        print(f"failed: {error}", file=sys.stderr)  # noqa: T201 - stderr is the job's log
        channel.send(Failure(failure=error.failure, message=error.message, remedy=error.remedy))
        return error.exit_code
    except MemoryError:
        channel.send(
            Failure(failure="oom-host", message="out of memory", remedy="Free some memory, or use a smaller model")
        )
        return 70
    except ModuleNotFoundError as error:
        message = f"the pipeline needs {error.name}, which is not installed"
        channel.send(Failure(failure="recipe", message=message, remedy="pip install 'abliterated[pipeline]'"))
        return 2
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        channel.send(Failure(failure="bug", message=message, remedy="Report it with the job's log (`abliterate logs`)"))
        return 1
    failpoint("worker.product-made")
    channel.send(msgspec.structs.replace(result, seconds=fetching | result.seconds))
    failpoint("worker.result-sent")
    return 0


def _here(task: Task, channel: Channel, stop: Stop) -> tuple[Task, dict[str, float]]:
    """The task with its model on this machine, and the seconds it took. Others may use the device meanwhile."""
    from abliterated.pipeline.fetching import fetched
    from abliterated.pipeline.watch import Watch

    watch = Watch(channel.send, stop)
    return fetched(task, watch), watch.seconds


def _pipeline(task: Task, channel: Channel, stop: Stop) -> Result:
    from abliterated.pipeline.run import run

    return run(task, channel.send, stop)


def main(argv: list[str] | None = None) -> int:
    """Entry of the worker process."""
    parser = argparse.ArgumentParser(prog="abliterated-worker")
    parser.add_argument("--task", type=Path, required=True)
    progress = parser.add_mutually_exclusive_group(required=True)
    progress.add_argument("--progress-fd", type=int)
    progress.add_argument("--progress-file", type=Path, help="where the daemon is on another machine")
    parser.add_argument("--parent-fd", type=int)
    parser.add_argument("--secrets-fd", type=int)
    options = parser.parse_args(argv)
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    signal.signal(signal.SIGINT, lambda *_: stop.ask())
    if options.progress_file is not None:
        progress_to = os.open(options.progress_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    else:
        # Children (none are expected) must not keep the pipes open.
        os.set_inheritable(progress_to := options.progress_fd, False)
    die_with_parent(options.parent_fd, stop)
    be_polite()
    if options.secrets_fd is not None:
        learn(options.secrets_fd)
    task = msgspec.json.decode(options.task.read_bytes(), type=Task)
    print(f"job {task.job}: {task.base}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)  # noqa: T201
    return run_task(task, Channel(progress_to), stop)


if __name__ == "__main__":
    sys.exit(main())
