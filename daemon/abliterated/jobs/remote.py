"""The same worker on a Ray cluster: submitted over HTTP, heard through files on storage that both sides see.

A job's folder must have the same path here and there. What the worker tells and writes lies beside its task; the log is
bounded and cleaned on this side. The daemon that comes after a death stops what its predecessor had submitted.
Does not know the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from abliterate.contract.errors import DiskError
from abliterate.contract.messages import Failure, Progress, Result, Task, WorkerEvent
from abliterated.files import write_whole
from abliterated.jobs.cluster import Cluster, ClusterAway, Submission
from abliterated.jobs.job_log import JobLog
from abliterated.jobs.runner import end_orphan, must_fetch
from abliterated.jobs.scheduler import Device

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
AWAY_SECONDS = 600.0  # a cluster that is silent for so long has lost its jobs
BEHIND_SECONDS = 60.0  # how far a network's filesystem may lag behind what its writer did
STOP_SECONDS = 20  # what Ray gives the worker to end by itself
MARK = "ray:"


class Tail:
    """What was appended to a file since the last look. Opened anew each time: a network's filesystem asks then."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def more(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return b""
        self._offset += len(data)
        return data


@dataclass
class RemoteWorker:
    """A worker on the cluster."""

    cluster: Cluster
    submission: str
    events: Tail
    output: Tail
    log: JobLog
    word: Result | Failure | None = None
    look_seconds: float = LOOK_SECONDS
    _line: bytes = b""
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def mark(self) -> str:
        return MARK + self.submission

    async def follow(self, tell: Callable[[Progress], None]) -> int:
        loop = asyncio.get_running_loop()
        heard = loop.time()
        waits = ""
        try:
            while True:
                now: Submission | None = None
                try:
                    now = await self.cluster.look(self.submission) or Submission("FAILED", message="it forgot the job")
                    heard = loop.time()
                except ClusterAway as error:
                    if loop.time() - heard >= AWAY_SECONDS:
                        return self._lost(str(error))
                await self._hear(tell)
                if now is not None and now.ended:
                    return await self._end(now, tell)
                if now is not None and now.status == "PENDING" and waits != (waits := now.message or "Ray"):
                    tell(Progress(stage="load", message=f"waits for the device: {waits[:200]}"))
                await asyncio.sleep(self.look_seconds)
        finally:
            self._gone.set()
            self.log.close()
            for tail in (self.events, self.output):
                tail.path.unlink(missing_ok=True)

    async def stop(self, patience: float = 10.0) -> None:
        """Ray asks the worker, and ends it where it does not listen."""
        self._asked.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience + STOP_SECONDS):
                while not self._gone.is_set():
                    with contextlib.suppress(ClusterAway):
                        await self.cluster.stop(self.submission)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._gone.wait(), 5)

    def work_done(self) -> float | None:
        return None

    async def _hear(self, tell: Callable[[Progress], None]) -> None:
        lines = (self._line + await asyncio.to_thread(self.events.more)).split(b"\n")
        self._line = lines.pop()
        for line in lines:
            try:
                event: WorkerEvent = msgspec.json.decode(line, type=WorkerEvent)
            except msgspec.DecodeError:
                continue
            if isinstance(event, Progress):
                tell(event)
            else:
                self.word = event
        if written := await asyncio.to_thread(self.output.more):
            self.log.feed(written)

    async def _end(self, ended: Submission, tell: Callable[[Progress], None]) -> int:
        """The exit status, after its last word, which storage may bring later than the cluster its end."""
        code = ended.driver_exit_code
        if ended.status == "SUCCEEDED":
            code = 0
        if ended.status == "STOPPED" or (self._asked.is_set() and code != 0):
            return 86
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (BEHIND_SECONDS if code is not None and code >= 0 else 0)
        while self.word is None and loop.time() < deadline:
            await asyncio.sleep(self.look_seconds)
            await self._hear(tell)
        if code is None:
            return self._lost(ended.message or "the cluster lost it")
        return code

    def _lost(self, why: str) -> int:
        if self.word is None:
            self.word = Failure(failure="timeout", message=f"on the cluster: {why[:500]}", remedy="See Ray's dashboard")
        return 4


@dataclass
class RayExecutor:
    """Workers on a Ray cluster: `cpus` and `gpus` for each, `jobs` at a time; `python` runs them there."""

    cluster: Cluster
    python: str = "python3"
    cpus: float = 1
    gpus: float = 1
    jobs: int = 1
    look_seconds: float = LOOK_SECONDS
    here: bool = False

    def devices(self) -> tuple[Device, ...]:
        """Places in the cluster's queue; on which machine, Ray decides."""
        return tuple(Device(f"ray-{number}", number) for number in range(self.jobs))

    async def start(self, task: Task, folder: Path, device: Device) -> RemoteWorker:
        prefix = f"abliterated-{task.job}-"
        for earlier in await self.cluster.at_work(prefix):
            await self._ended(earlier)
        submission = prefix + secrets.token_hex(4)
        events, output = folder / f"{submission}.ndjson", folder / f"{submission}.log"
        try:
            await asyncio.to_thread(_remove_older, folder)
            await asyncio.to_thread(write_whole, folder / "task.json", msgspec.json.encode(_there(task)), mode=0o640)
            job_log = JobLog(folder / "log.txt")
        except OSError as error:
            raise DiskError(f"{folder}: can't be written ({error.strerror})", remedy="Free some space there") from error
        argv = [self.python, "-m", "abliterated.jobs.worker", "--task", str(folder / "task.json")]
        argv += ["--progress-file", str(events)]
        gpus = 0 if task.recipe.run.device == "cpu" else self.gpus
        try:
            await self.cluster.submit(
                f"exec {shlex.join(argv)} >> {shlex.quote(str(output))} 2>&1",
                submission,
                environment(task),
                self.cpus,
                gpus,
            )
        except ClusterAway:
            job_log.close()
            raise
        return RemoteWorker(
            self.cluster, submission, Tail(events), Tail(output), job_log, look_seconds=self.look_seconds
        )

    def end_orphan(self, mark: str) -> bool:
        if not mark.startswith(MARK):
            return end_orphan(mark)
        try:
            return asyncio.run(self._ended(mark.removeprefix(MARK)))
        except ClusterAway as error:
            # It is looked for again before the job is submitted anew.
            log.warning("%s: not stopped (%s)", mark, error, extra={"action": "orphan"})
            return False

    async def _ended(self, submission: str) -> bool:
        """Stop an earlier submission and see it ended; whether it was still there. Raises ClusterAway."""
        found = await self.cluster.look(submission)
        if found is None or found.ended:
            return False
        await self.cluster.stop(submission)
        deadline = asyncio.get_running_loop().time() + 2 * STOP_SECONDS
        while found is not None and not found.ended:
            if asyncio.get_running_loop().time() > deadline:
                raise ClusterAway(f"{submission} does not end on the cluster", remedy="Stop it in Ray's dashboard")
            await asyncio.sleep(self.look_seconds)
            found = await self.cluster.look(submission)
        return True


def environment(task: Task) -> dict[str, str]:
    """What a worker there is given besides its node's own. No secrets: the cluster shows this to whoever asks."""
    offline = {} if must_fetch(task) else {"HF_HUB_OFFLINE": "1"}
    own = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return offline | own | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


def _remove_older(folder: Path) -> None:
    for path in folder.glob("abliterated-*-*.*"):
        path.unlink(missing_ok=True)


def _there(task: Task) -> Task:
    """The task as a node sees it: Ray chooses its GPUs, and locks of this machine say nothing there."""
    recipe = task.recipe
    if recipe.run.device.startswith("cuda:"):
        recipe = msgspec.structs.replace(recipe, run=msgspec.structs.replace(recipe.run, device="cuda"))
    return msgspec.structs.replace(task, recipe=recipe, lock="")
