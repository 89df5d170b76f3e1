"""A night in seconds: an event loop whose clock jumps, a journal in the same thread, workers that only pretend."""

from __future__ import annotations

import asyncio
import datetime
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from abliterate.contract.errors import DiskError
from abliterate.contract.messages import Failure, Progress, Result, Task
from abliterated.jobs.clock import Clock
from abliterated.jobs.journal import Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.scheduler import Device

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Waits for nothing: where it would, the loop's clock goes on."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for ever"
            self.loop.now += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` jumps to the next timer; threads are run in place."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> Any:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class InlineLedger(Ledger):
    """The journal without its thread."""

    def __init__(self, path: Path, wall: Callable[[], float]) -> None:
        self._journal = Journal(path, wall)
        # Nothing of these tests asks what a power cut leaves.
        self._journal._db.execute("PRAGMA synchronous=OFF")

    async def do(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(self._journal, *args, **kwargs)

    def close(self) -> None:
        self._journal.close()


def clock(loop: VirtualLoop, begin: datetime.datetime, zone: ZoneInfo) -> Clock:
    def wall() -> float:
        return begin.timestamp() + loop.now

    return Clock(wall, lambda: datetime.datetime.fromtimestamp(wall(), zone))


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop))


@dataclass(frozen=True)
class Act:
    """What a pretended worker does: `kind`, after `seconds`, having reached `stage`."""

    kind: str
    seconds: float = 60.0
    stage: str = "edit"


RESULT = Result(product="model.gguf", format="gguf", digest="d")
STATUS = {"crash": -11, "killed": -9, "silent": 0}


@dataclass
class PretendedWorker:
    task: Task
    act: Act
    device: Device
    executor: PretendedExecutor
    word: Result | Failure | None = None
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    mark: str = "1:1.0"

    async def follow(self, tell: Callable[[Progress], None]) -> int:
        try:
            return await self._follow(tell)
        finally:
            self.executor.at_work.pop(self.task.job, None)

    async def _follow(self, tell: Callable[[Progress], None]) -> int:
        if not self.task.source:
            tell(Progress(stage="fetch"))
            if await self._rest(self.act.seconds):
                return 86
        # As the worker itself would wait at the device's lock.
        while self.device.name in self.executor.held:
            tell(Progress(stage="load", message="waits for the device: somebody"))
            if await self._rest(10.0):
                return 86
        self.executor.held[self.device.name] = self.task.job
        try:
            tell(Progress(stage="load"))
            tell(Progress(stage=self.act.stage))  # type: ignore[arg-type]
            if self.act.kind == "hang":
                await self.asked.wait()
                return -9
            if await self._rest(self.act.seconds):
                self.word = Failure(failure="cancelled", message="stopped")
                return 86
            if self.act.kind == "good":
                out = Path(self.task.output) / RESULT.product
                out.write_bytes(b"GGUF")
                self.word = RESULT
                return 0
            if self.act.kind in STATUS:
                return STATUS[self.act.kind]
            self.word = Failure(failure=self.act.kind, message=f"a {self.act.kind}")  # type: ignore[arg-type]
            return 4
        finally:
            del self.executor.held[self.device.name]

    async def _rest(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.asked.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def stop(self, patience: float = 10.0) -> None:
        self.asked.set()
        while self.task.job in self.executor.at_work:
            await asyncio.sleep(0.1)

    def work_done(self) -> float | None:
        return 0.0 if self.act.kind == "hang" else asyncio.get_running_loop().time()


@dataclass
class PretendedExecutor:
    """Each job's acts, one for each attempt the journal counted; the last is done again and again."""

    attempts: Callable[[str], int] = lambda job_id: 0
    acts: dict[str, list[Act]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    at_work: dict[str, PretendedWorker] = field(default_factory=dict)
    started: list[tuple[str, float, str]] = field(default_factory=list)
    here: bool = True

    async def start(self, task: Task, folder: Path, device: Device) -> PretendedWorker:
        acts = self.acts.get(task.job) or [Act("good")]
        act = acts[min(self.attempts(task.job), len(acts) - 1)]
        assert task.job not in self.at_work, "two workers for one job"
        if act.kind == "no-start":
            raise DiskError("no worker could be started")
        self.started.append((task.job, asyncio.get_running_loop().time(), device.name))
        self.at_work[task.job] = PretendedWorker(task, act, device, self)
        return self.at_work[task.job]

    def end_orphan(self, mark: str) -> bool:
        return False
