"""A daemon small enough to be killed ten thousand times: tray, desk, journal and dispatcher are the real ones.

Its worker works in this process, in two stages with a file each, and its engine is a folder that is written as
carelessly as Ollama writes. `serve` returns when every recipe has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from abliterate.contract.errors import AbliteratedError
from abliterate.contract.messages import EngineView, Failure, JobView, Progress, Result, Task
from abliterate.contract.states import TERMINAL
from abliterated.desk import QueueDesk
from abliterated.failpoints import failpoint
from abliterated.files import sync_folder, write_whole
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.scheduler import Device
from abliterated.ollama.client import EngineDiskFull
from abliterated.spool.settle import PATIENCE
from abliterated.spool.tray import Tray


def product_of(model: str) -> bytes:
    """The only right bytes for a recipe."""
    return hashlib.sha256(model.encode()).digest() * 2000


class CarelessEngine:
    """Blobs and manifests in a folder, written without fsync, a manifest without a temporary name."""

    def __init__(self, root: Path) -> None:
        self.blobs, self.manifests = root / "blobs", root / "manifests"
        for folder in (self.blobs, self.manifests):
            folder.mkdir(parents=True, exist_ok=True)
        os.sync()

    def models(self) -> dict[str, bytes]:
        return {
            path.name: (self.blobs / path.read_text()).read_bytes()
            for path in self.manifests.iterdir()
            if path.read_text()
        }

    def create(self, name: str, product: Path) -> None:
        digest = hashlib.sha256(product.read_bytes()).hexdigest()
        blob = self.blobs / digest
        if not blob.exists() or blob.stat().st_size != product.stat().st_size:
            temporary = blob.with_suffix(f".{os.getpid()}")
            shutil.copyfile(product, temporary)
            failpoint("engine.blob")
            temporary.rename(blob)
        (self.manifests / name.replace(":", "_")).write_text(digest)
        failpoint("engine.manifest")


@dataclass
class QuickWorker:
    """Resumes where an earlier one was killed."""

    task: Task
    word: Result | Failure | None = None
    mark: str = "1:1.0"

    async def follow(self, tell: Callable[[Progress], None]) -> int:
        await asyncio.sleep(0)
        try:
            return await asyncio.to_thread(self._work)
        except OSError as error:
            self.word = Failure(failure="disk", message=str(error))
            return 4

    def _work(self) -> int:
        work, out = Path(self.task.work), Path(self.task.output)
        data = product_of(self.task.recipe.model)
        stage = work / "direction.done"
        if not stage.exists() or stage.read_bytes() != data[:32]:
            write_whole(stage, data[:32])
        failpoint("worker.staged")
        write_whole(out / "model.gguf", stage.read_bytes() * 2000)
        failpoint("worker.product-made")
        digest = hashlib.sha256((out / "model.gguf").read_bytes()).hexdigest()
        self.word = Result(product="model.gguf", format="gguf", digest=digest)
        failpoint("worker.result-sent")
        return 0

    async def stop(self, patience: float = 10.0) -> None:
        return None

    def work_done(self) -> float | None:
        return None


class QuickExecutor:
    here = True

    async def start(self, task: Task, folder: Path, device: Device) -> QuickWorker:
        await asyncio.to_thread(write_whole, folder / "task.json", msgspec.json.encode(task))
        return QuickWorker(task)

    def end_orphan(self, mark: str) -> bool:
        return False


class MiniDaemon:
    """Everything under one root: spool, rejected, jobs, journal, engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs, self.incoming, self.rejected = root / "jobs", root / "incoming", root / "rejected"
        for folder in (self.jobs, self.incoming, self.rejected):
            folder.mkdir(exist_ok=True)
        self.engine = CarelessEngine(root / "engine")
        sync_folder(root)
        self.ledger = Ledger(root / "journal.sqlite3")
        self.dispatcher = Dispatcher(
            self.ledger,
            self.jobs,
            prepare=self.prepare,
            register=self.register,
            publish=lambda view, number: None,
            executor=QuickExecutor(),
        )

    async def prepare(self, job: Job, folder: Path) -> Task:
        for name in ("work", "out"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return Task(
            recipe=job.recipe,
            base=job.model,
            source="/nowhere",
            work=str(folder / "work"),
            output=str(folder / "out"),
            job=job.id,
        )

    async def register(self, job: Job, result: Result, out: Path) -> Result:
        product = out / result.product
        if hashlib.sha256(product.read_bytes()).hexdigest() != result.digest:
            raise AbliteratedError("the product is not what the worker made")
        try:
            await asyncio.to_thread(self.engine.create, job.target, product)
        except OSError as error:
            raise EngineDiskFull(str(error)) from error  # as an engine says it
        return result

    async def serve(self, seconds: float = 120) -> None:
        """Until nothing is left to do; a retry that waits is brought forward."""
        asyncio.get_running_loop().slow_callback_duration = 10
        desk = QueueDesk(
            self.ledger,
            self.dispatcher,
            self.jobs,
            roots=[],
            engine=_no_engine,
            proxy_address="",
            proxy_numbers=dict,
            tell=lambda job: None,
            rejected=self.rejected,
        )
        await desk.sweep()
        tray = Tray(self.incoming, self.rejected, desk.check, desk.accept, desk.gone)
        patience = itertools.count(0, PATIENCE + 1)  # what is bad is given its quiet seconds, on a clock that jumps
        running = asyncio.create_task(self.dispatcher.run())
        try:
            async with asyncio.timeout(seconds):
                while not running.done():
                    await asyncio.to_thread(tray.scan, lambda: float(next(patience)))
                    jobs = await self.ledger.do(Journal.jobs)
                    if not any(self.incoming.glob("*.toml")) and all(job.state in TERMINAL for job in jobs):
                        break
                    for job in jobs:
                        if job.state == "queued" and job.retry_at:
                            await self.ledger.do(Journal.note, job.id, retry_at=0.0)
                            self.dispatcher.wake()
                    await asyncio.sleep(0.002)
        finally:
            await self.dispatcher.stop()
            await asyncio.gather(running, return_exceptions=True)
            self.ledger.close()


async def _no_engine() -> EngineView:
    return EngineView(kind="ollama", url="")


def views(root: Path) -> list[JobView]:
    """What the journal says after the end."""
    journal = Journal(root / "journal.sqlite3")
    try:
        return [
            JobView(id=j.id, label=j.label, model=j.model, target=j.target, state=j.state, failure=j.failure)
            for j in journal.jobs()
        ]
    finally:
        journal.close()
