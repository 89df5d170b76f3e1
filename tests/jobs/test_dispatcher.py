"""The queue at work with real worker processes, held at the device lock where a test needs them to stand still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock

from abliterate.contract.errors import AbliteratedError, ConflictError, EngineRefused, EngineUnavailable, ModelError
from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView, Result, Task
from abliterate.contract.recipe import Direction, Evaluate, Recipe, Search
from abliterate.contract.states import TERMINAL
from abliterated.jobs import registrations
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.runner import Worker
from abliterated.pipeline.direction_files import write_direction
from abliterated.pipeline.directions import direction
from pipeline.folders import planted_folder
from pipeline.planted import HIDDEN, REFUSAL
from strangers import gone

# Needs neither tokenizer nor forward pass; the file is missing, so the run fails as a recipe's error does.
RECIPE = Recipe(
    model="ollama:m",
    direction=Direction(method="file", file="/nowhere/direction.pt"),
    search=Search(trials=0),
    evaluate=Evaluate(prompts=0),
)


class House:
    """A dispatcher on a real journal, with its engine's two answers under the test's control."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = Ledger(root / "journal.sqlite3")
        self.lock = FileLock(root / "device.lock", preserve_lock_file=True)
        self.events: list[JobView] = []
        self.changed = asyncio.Event()
        self.prepare_error: Exception | None = None
        self.source = root / "missing.gguf"
        self.registered: list[str] = []
        self.dispatcher = self.make()
        self.task: asyncio.Task[None] | None = None

    def make(self) -> Dispatcher:
        return Dispatcher(
            self.ledger, self.root / "jobs", prepare=self.prepare, register=self.register, publish=self.publish
        )

    async def prepare(self, job: Job, folder: Path) -> Task:
        if self.prepare_error:
            raise self.prepare_error
        for name in ("work", "out"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return Task(
            recipe=job.recipe,
            base=job.model,
            source=str(self.source),
            work=str(folder / "work"),
            output=str(folder / "out"),
            job=job.id,
            lock=str(self.root / "device.lock"),
        )

    async def register(self, job: Job, result: Result, out: Path) -> Result:
        self.registered.append(job.id)
        return msgspec.structs.replace(result, notes=[*result.notes, "registered"])

    def publish(self, view: JobView, number: int) -> None:
        self.events.append(view)
        self.changed.set()

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self.dispatcher.run())

    async def stop(self) -> None:
        if self.task:
            await self.dispatcher.stop()
            await asyncio.wait_for(self.task, 150)

    async def add(self, label: str = "night", recipe: Recipe = RECIPE) -> str:
        job_id = new_id()
        (self.root / "jobs" / job_id).mkdir(parents=True)
        await self.ledger.do(Journal.add, job_id, label, recipe)
        self.dispatcher.wake()
        return job_id

    async def until(self, job_id: str, wanted: Callable[[JobView], bool], seconds: float = 150) -> JobView:
        """The first state of the job, from now on, that is as wanted."""
        async with asyncio.timeout(seconds):
            while True:
                self.changed.clear()
                view = self.dispatcher.view(await self.ledger.do(Journal.get, job_id))
                if wanted(view):
                    return view
                try:
                    await asyncio.wait_for(self.changed.wait(), 0.2)
                except TimeoutError:
                    continue

    async def pid(self, job_id: str) -> int:
        job = await self.ledger.do(Journal.get, job_id)
        return int(job.worker.partition(":")[0])


def at_the_lock(view: JobView) -> bool:
    return view.state == "running" and "waits for the device" in view.message


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path)
    yield made
    await made.stop()
    if made.lock.is_locked:
        made.lock.release()
    made.ledger.close()


async def test_a_failing_job_ends_with_its_reason_and_the_next_one_runs(house: House) -> None:
    house.start()
    first, second = await house.add("first"), await house.add("second")
    for job_id in (first, second):
        view = await house.until(job_id, lambda one: one.state in TERMINAL)
        assert view.state == "failed"
        assert view.failure is not None
        assert view.failure.message
        assert view.failure.remedy
    assert (house.root / "jobs" / first / "log.txt").read_text().startswith("job ")


async def test_two_jobs_run_one_after_the_other_and_the_second_is_told_why(house: House) -> None:
    house.lock.acquire()
    house.start()
    first, second = await house.add("first"), await house.add("second")
    await house.until(first, at_the_lock)
    waiting = await house.until(second, lambda one: one.reason == "gpu-busy")
    assert waiting.state == "queued"
    house.lock.release()
    await house.until(second, lambda one: one.state in TERMINAL)
    order = [view.id for view in house.events if view.state == "starting"]
    assert order == [first, second]


async def test_a_killed_worker_is_tried_again_and_the_second_time_held(house: House) -> None:
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    os.kill(await house.pid(job_id), signal.SIGKILL)
    view = await house.until(job_id, lambda one: one.state == "queued")
    assert (view.reason, view.attempts) == ("interrupted", 1)
    assert "signal 9" in view.explanation
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    await house.until(job_id, at_the_lock)
    os.kill(await house.pid(job_id), signal.SIGKILL)
    view = await house.until(job_id, lambda one: one.state == "held")
    assert view.reason == "crash-loop"


async def test_a_running_job_can_be_cancelled_and_its_worker_is_gone(house: House) -> None:
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    pid = await house.pid(job_id)
    view = house.dispatcher.view(await house.dispatcher.cancel(job_id, "test"))
    assert view.state == "cancelling"
    await house.until(job_id, lambda one: one.state == "cancelled")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ConflictError):
        await house.dispatcher.cancel(job_id, "test")


async def test_a_queued_job_is_held_released_cancelled_and_retried(house: House) -> None:
    job_id = await house.add()
    assert (await house.dispatcher.hold(job_id, "test")).state == "held"
    assert (await house.dispatcher.release(job_id, "test")).state == "queued"
    assert (await house.dispatcher.cancel(job_id, "test")).state == "cancelled"
    assert (await house.dispatcher.retry(job_id, "test")).state == "queued"
    with pytest.raises(ConflictError):
        await house.dispatcher.release(job_id, "test")


async def test_a_stopped_daemon_puts_its_job_back_and_the_next_goes_on(house: House) -> None:
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    await house.stop()
    job = await house.ledger.do(Journal.get, job_id)
    assert (job.state, job.reason, job.attempts) == ("queued", "interrupted", 0)
    house.lock.release()
    house.dispatcher = house.make()
    house.start()
    assert (await house.until(job_id, lambda one: one.state in TERMINAL)).state == "failed"


async def test_a_daemon_that_died_left_a_worker_and_the_next_ends_it(house: House) -> None:
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    pid = await house.pid(job_id)
    worker = house.dispatcher._running[job_id].worker
    assert isinstance(worker, Worker)
    alive = os.dup(worker.alive)  # or the worker would go with its daemon
    assert house.task is not None
    died = [house.task, *house.dispatcher._tasks.values()]
    for task in died:
        task.cancel()
    await asyncio.wait(died)  # a dead daemon hears of nothing
    house.task = None
    assert not gone(pid)
    await house.make()._recover()
    os.close(alive)
    view = await house.until(job_id, lambda one: one.state == "queued" and one.reason == "interrupted")
    assert view.attempts == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await asyncio.wait_for(worker.process.wait(), 60)


async def test_an_engine_that_is_away_keeps_the_job_queued_and_costs_no_attempt(house: House) -> None:
    house.prepare_error = EngineUnavailable("nobody answers", remedy="Start Ollama")
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.reason == "ollama-down")
    assert (view.state, view.attempts) == ("queued", 0)
    assert "nobody answers" in view.explanation
    house.prepare_error = ModelError("gone", remedy="Pull it")
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    assert (await house.until(job_id, lambda one: one.state in TERMINAL)).state == "failed"


@pytest.mark.parametrize("error", [ConflictError("the name is taken"), EngineRefused("too old to register with")])
async def test_an_engine_that_says_no_ends_the_job(house: House, error: AbliteratedError) -> None:
    house.prepare_error = error
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.state in TERMINAL)
    assert view.state == "failed"
    assert view.failure is not None
    assert view.failure.message == str(error)


@pytest.mark.parametrize("error", [EngineUnavailable("nobody answers"), ModelError("gone")])
@pytest.mark.parametrize("verb", ["cancel", "hold"])
async def test_what_is_cancelled_or_held_while_it_is_prepared_stays_so(
    house: House, verb: str, error: Exception
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slow(job: Job, folder: Path) -> Task:
        asked.set()
        await answered.wait()
        raise error

    house.dispatcher._attempts.prepare = slow
    house.start()
    job_id = await house.add()
    await asyncio.wait_for(asked.wait(), 60)
    moved = await (house.dispatcher.cancel if verb == "cancel" else house.dispatcher.hold)(job_id, "test")
    answered.set()
    await house.until(job_id, lambda one: not house.dispatcher._running)
    assert (await house.ledger.do(Journal.get, job_id)).state == moved.state


async def test_an_engine_that_answers_again_is_used_at_once(house: House) -> None:
    house.prepare_error = EngineUnavailable("nobody answers")
    house.start()
    first, second = await house.add("first"), await house.add("second")
    for job_id in (first, second):
        await house.until(job_id, lambda one: one.reason == "ollama-down")
    await house.ledger.do(Journal.note, first, retry_at=time.time() + 3000)
    await house.ledger.do(Journal.note, second, retry_at=time.time() + 3000)
    house.prepare_error = None
    await house.dispatcher.engine_answers()
    for job_id in (first, second):
        await house.until(job_id, lambda one: one.state in TERMINAL)
    assert [view.id for view in house.events if view.state == "starting"] == [first, second]


async def test_a_paused_queue_waits_and_remembers_it(house: House) -> None:
    house.start()
    await house.dispatcher.pause(True)
    job_id = await house.add()
    assert (await house.until(job_id, lambda one: one.reason == "paused")).state == "queued"
    assert await house.ledger.do(Journal.setting, "paused") == "yes"
    await house.dispatcher.pause(False)
    await house.until(job_id, lambda one: one.state in TERMINAL)


async def registering(house: House) -> tuple[str, Path]:
    """A job whose product an earlier daemon left to be registered; and that product."""
    job_id = await house.add()
    product = house.root / "jobs" / job_id / "out" / "m.gguf"
    product.parent.mkdir()
    product.write_bytes(b"GGUF")
    for state in ("starting", "running"):
        await house.ledger.do(Journal.move, job_id, state)
    await house.ledger.do(Journal.move, job_id, "registering", result=Result(product="m.gguf", format="gguf"))
    return job_id, product


async def test_a_product_is_registered_at_the_engine_s_first_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENGINE_FIRST", "ENGINE_LONGEST"):
        monkeypatch.setattr(registrations, name, 3000.0)  # by its turn alone it would not come to it
    away = [EngineUnavailable("nobody answers")]

    async def register(job: Job, result: Result, out: Path) -> Result:
        if away:
            raise away[0]
        return await house.register(job, result, out)

    house.dispatcher._registrations.register = register
    job_id, _ = await registering(house)
    house.start()
    await house.until(job_id, lambda one: one.reason == "ollama-down")
    away.clear()
    async with asyncio.timeout(60):
        while house.registered != [job_id]:  # it may not have lain down to wait yet
            await house.dispatcher.engine_answers()
            await asyncio.sleep(0.01)
    assert (await house.until(job_id, lambda one: one.state in TERMINAL)).state == "succeeded"


async def test_what_was_being_registered_is_registered_by_the_next_daemon(house: House) -> None:
    job_id, product = await registering(house)
    house.start()
    view = await house.until(job_id, lambda one: one.state in TERMINAL)
    assert (view.state, house.registered) == ("succeeded", [job_id])
    assert view.result is not None
    assert view.result.notes == ["registered"]
    await house.dispatcher.stop()  # it waits for what a registration does after its job's end
    assert not product.exists(), "the engine has it now"


async def test_a_folder_that_became_no_gguf_is_kept_and_not_registered(house: House) -> None:
    model = planted_folder(house.root)
    house.source = model.path
    vector = np.zeros(HIDDEN)
    vector[REFUSAL] = 1.0
    write_direction(house.root / "given.safetensors", direction(vector, origin={}), {})
    found = Direction(method="file", file=str(house.root / "given.safetensors"))
    house.start()
    job_id = await house.add(recipe=msgspec.structs.replace(RECIPE, direction=found))
    view = await house.until(job_id, lambda one: one.state in TERMINAL)
    assert view.state == "succeeded", view.failure
    assert house.registered == []
    assert view.result is not None
    assert view.result.format == "safetensors"
    assert any("converter" in note for note in view.result.notes)
    assert (house.root / "jobs" / job_id / "out" / view.result.product / "config.json").is_file()
