"""Whole nights on a clock that jumps: two hundred jobs with faults, an engine away for a day, drains and restarts."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import random
from collections import Counter
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from abliterate.contract.errors import EngineRefused, EngineUnavailable
from abliterate.contract.ids import encoded
from abliterate.contract.messages import JobView, Result, Task
from abliterate.contract.recipe import Recipe, Schedule
from abliterate.contract.states import TERMINAL, State
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.hang import IDLE_SECONDS
from abliterated.jobs.journal import Job
from abliterated.jobs.outcome import TRANSIENT
from abliterated.jobs.scheduler import Device, in_window
from jobs.virtual import Act, InlineLedger, PretendedExecutor, VirtualLoop, clock, run

BERLIN = ZoneInfo("Europe/Berlin")
# The night in which the clock is put forward.
EVENING = datetime.datetime(2027, 3, 27, 21, 0, tzinfo=BERLIN)
HOUR = 3600.0
RETRIES = 5


class Night:
    """A dispatcher on a virtual loop, with an engine that may be away."""

    def __init__(self, loop: VirtualLoop, root: Path, devices: int = 1) -> None:
        self.loop, self.root = loop, root
        self.clock = clock(loop, EVENING, BERLIN)
        self.ledger = InlineLedger(root / "journal.sqlite3", self.clock.wall)
        self.executor = PretendedExecutor(lambda job_id: self.ledger._journal.get(job_id).attempts)
        self.devices = tuple(Device(f"GPU-{n}", n) for n in range(devices))
        self.engine_away = False
        self.registered: Counter[str] = Counter()
        self.held_while_registering: list[str] = []
        self.refuses: set[str] = set()
        self.numbers = itertools.count(1)
        self.begin()

    def begin(self) -> None:
        self.dispatcher = Dispatcher(
            self.ledger,
            self.root / "jobs",
            prepare=self.prepare,
            register=self.register,
            publish=lambda view, number: None,
            executor=self.executor,
            devices=lambda: self.devices,
            clock=self.clock,
            retries=RETRIES,
        )
        self.task = self.loop.create_task(self.dispatcher.run())

    async def die(self) -> None:
        """As a kill does: nothing is written, the workers die too."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.executor.at_work.clear()
        self.executor.held.clear()

    async def prepare(self, job: Job, folder: Path) -> Task:
        if self.engine_away and job.model.startswith("ollama:"):
            raise EngineUnavailable("nobody answers")
        for name in ("work", "out"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        source = "" if job.model.startswith("hf:") else "/nowhere/m.gguf"
        return Task(
            recipe=job.recipe, base=job.model, source=source, work=str(folder / "work"), output=str(folder / "out"),
            job=job.id, lock="",
        )  # fmt: skip

    async def register(self, job: Job, result: Result, out: Path) -> Result:
        await asyncio.sleep(1)
        if self.engine_away:
            raise EngineUnavailable("nobody answers")
        if job.id in self.refuses:
            raise EngineRefused("no")
        assert (out / result.product).exists(), "the product is there until it is registered"
        self.registered[job.id] += 1
        return result

    def add(self, label: str, recipe: Recipe, acts: list[Act] | None = None) -> str:
        job_id = encoded(next(self.numbers) << 80)  # what differs by the id, its pauses, is the same every night
        (self.root / "jobs" / job_id).mkdir(parents=True)
        if acts:
            self.executor.acts[job_id] = acts
        self.ledger._journal.add(job_id, label, recipe)
        self.dispatcher.wake()
        return job_id

    def state(self, job_id: str) -> State:
        return self.ledger._journal.get(job_id).state

    def view(self, job_id: str) -> JobView:
        return self.dispatcher.view(self.ledger._journal.get(job_id))

    async def until(self, job_id: str, *states: str) -> None:
        while self.state(job_id) not in states:
            await asyncio.sleep(1)

    async def end(self) -> None:
        await self.dispatcher.stop()
        await self.task
        self.ledger.close()


def right_end(job: Job, acts: list[Act], refused: bool, cancelled: bool) -> str:
    """An oracle of its own: how a job with these acts must end."""
    if cancelled:
        return "cancelled"
    crashes = 0
    stage = ""
    for attempts, act in enumerate([*acts, *[acts[-1]] * 20], 1):
        kind = {"hang": "timeout", "no-start": "disk"}.get(act.kind, act.kind)
        if kind == "good":
            return "failed" if refused else "succeeded"
        if kind in ("crash", "killed", "silent"):
            crashes = crashes + 1 if stage == act.stage else 1
            stage = act.stage
            if crashes == 2:
                return "held"
        elif kind not in TRANSIENT:
            return "failed"
        else:
            stage = ""
            if attempts > RETRIES:
                return "held"
    raise AssertionError("it never ends")


def random_acts(luck: random.Random) -> list[Act]:
    faults = ["crash", "killed", "silent", "disk", "oom-gpu", "oom-host", "timeout", "no-start"] * 4 + ["hang"]
    acts = [
        Act(luck.choice(faults), luck.uniform(1, 60), luck.choice(["load", "direction", "edit"]))
        for _ in range(luck.choice([0, 0, 0, 1, 1, 2, 3, 6]))
    ]
    last = luck.choices(["good", "recipe", "model", "bug"], [20, 1, 1, 1])[0]
    return [*acts, Act(last, luck.uniform(20, 120))]


@pytest.mark.parametrize("seed", [1, 2])
def test_eight_hours_of_two_hundred_mixed_jobs_with_faults_end_rightly(tmp_path: Path, seed: int) -> None:
    luck = random.Random(seed)

    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path, devices=2)
        jobs: dict[str, list[Act]] = {}
        labels: dict[str, str] = {}
        cancelled: set[str] = set()
        for number in range(200):
            schedule = Schedule(
                priority=luck.choice([0, 0, 0, 5]),
                window=luck.choice([*[""] * 7, "01:00-04:00"]),
                not_before=luck.choice(["", "", "", "2027-03-27T22:30", "2027-03-28T02:15"]),
                when=luck.choice(["any", "any", "gpu-idle"]),
            )
            model = luck.choice(["ollama:m", "ollama:m", "hf:o/m"])
            acts = random_acts(luck)
            recipe = Recipe(model=model, name=f"m{number}", schedule=schedule)
            job_id = house.add(f"job-{number}", recipe, list(acts))
            jobs[job_id], labels[job_id] = acts, f"job-{number}"
            if luck.random() < 0.05:
                house.refuses.add(job_id)
        last_good = next(labels[j] for j, acts in jobs.items() if [a.kind for a in acts] == ["good"])
        jobs[after := house.add("after", Recipe(model="ollama:m", schedule=Schedule(after=[last_good])))] = [
            Act("good")
        ]
        labels[after] = "after"
        house.refuses -= {j for j, label in labels.items() if label == last_good}
        settled = frozenset({*TERMINAL, "held"})
        while any(house.state(job_id) not in settled for job_id in jobs):
            assert loop.now < 8 * HOUR, [house.view(j) for j in jobs if house.state(j) not in settled][:5]
            await asyncio.sleep(luck.uniform(60, 600))
            match luck.randrange(12):
                case 0:
                    await house.die()
                    house.begin()
                case 1:
                    house.engine_away = not house.engine_away
                case 2:
                    await house.dispatcher.drain()
                    assert not house.executor.at_work
                    await asyncio.sleep(luck.uniform(1, 300))
                    await house.dispatcher.pause(False)
                case 3:
                    alive = [j for j in jobs if house.state(j) not in settled and labels[j] != last_good and j != after]
                    alive = [j for j in alive if house.state(j) != "cancelling"]
                    if alive:
                        await house.dispatcher.cancel(chosen := luck.choice(alive), "test")
                        cancelled.add(chosen)
            if luck.random() < 0.3:
                house.engine_away = False
        for job_id, acts in jobs.items():
            job = house.ledger._journal.get(job_id)
            wanted = right_end(job, acts, job_id in house.refuses, False)
            if job_id in cancelled:
                # A registration that is nearly done may win.
                assert job.state in ("cancelled", wanted), (job, acts)
            else:
                assert job.state == wanted, (job.state, wanted, acts, house.ledger._journal.history(job_id))
            assert house.registered[job_id] == (1 if job.state == "succeeded" else house.registered[job_id])
            left = tmp_path / "jobs" / job_id / "out" / "model.gguf"
            assert not left.exists() or job.state == "failed", "a product that was handed over or cancelled is gone"
        assert Counter(house.registered.values()).keys() <= {1}, "no model twice"
        by_window = {j: house.ledger._journal.get(j).recipe.schedule.window for j in jobs}
        for job_id, at, _ in house.executor.started:
            if window := by_window[job_id]:
                local = datetime.datetime.fromtimestamp(EVENING.timestamp() + at, BERLIN)
                assert in_window(window, local.time()), (window, local)
        await house.end()

    run(night)


def test_an_engine_away_for_a_day_costs_no_device_and_one_model_is_made(tmp_path: Path) -> None:
    async def day(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        first = house.add("first", Recipe(model="ollama:m", name="one"), [Act("good", 600)])
        await house.until(first, "running")
        house.engine_away = True
        await house.until(first, "registering")
        other = house.add("other", Recipe(model="hf:o/m", name="two"), [Act("good", 60)])
        third = house.add("third", Recipe(model="ollama:m2", name="three"))
        await house.until(other, "registering")
        for _ in range(24):
            await asyncio.sleep(HOUR)
            assert house.state(first) == "registering"
            assert house.view(first).reason == "ollama-down"
            assert (house.state(third), house.view(third).reason) == ("queued", "ollama-down")
            assert not house.executor.held, "the device is free"
            assert house.ledger._journal.get(third).attempts == 0
        await house.die()
        house.begin()
        await asyncio.sleep(HOUR)
        house.engine_away = False
        before = loop.now
        await house.dispatcher.engine_answers()
        await house.until(first, "succeeded")
        await house.until(other, "succeeded")
        await house.until(third, "succeeded")
        assert loop.now - before < 120
        assert house.registered == {first: 1, other: 1, third: 1}
        await house.end()

    run(day)


def test_a_hung_worker_is_ended_and_the_job_tried_again(tmp_path: Path) -> None:
    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        job_id = house.add("hangs", Recipe(model="ollama:m"), [Act("hang"), Act("good", 60)])
        await house.until(job_id, "running")
        begun = loop.now
        while house.view(job_id).reason != "backoff":
            await asyncio.sleep(1)
        assert IDLE_SECONDS <= loop.now - begun <= IDLE_SECONDS + 60
        assert "did nothing for 15 minutes" in house.view(job_id).explanation
        await house.until(job_id, "succeeded")
        await house.end()

    run(night)


def test_a_worker_that_waits_for_its_device_or_works_in_silence_is_not_hung(tmp_path: Path) -> None:
    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        house.executor.held["GPU-0"] = "a stranger"
        waits = house.add("waits", Recipe(model="ollama:m"), [Act("good", 3 * HOUR)])
        await house.until(waits, "running")
        await asyncio.sleep(2 * HOUR)
        assert house.state(waits) == "running"
        del house.executor.held["GPU-0"]
        await house.until(waits, "succeeded")
        assert len(house.executor.started) == 1
        await house.end()

    run(night)


def test_a_crash_at_another_stage_is_no_loop_and_the_second_at_one_is(tmp_path: Path) -> None:
    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        further = house.add(
            "further", Recipe(model="ollama:m"), [Act("crash", stage="load"), Act("killed", stage="edit"), Act("good")]
        )
        loops = house.add("loops", Recipe(model="ollama:m2"), [Act("crash", stage="edit")])
        await house.until(further, "succeeded")
        await house.until(loops, "held")
        assert (house.view(loops).reason, house.view(loops).attempts) == ("crash-loop", 2)
        await house.end()

    run(night)


def test_the_same_work_is_done_once_unless_forced(tmp_path: Path) -> None:
    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        inner = house.prepare

        async def prepare(job: Job, folder: Path) -> Task:
            import msgspec

            return msgspec.structs.replace(await inner(job, folder), base_digest="sha256:b")

        house.dispatcher._attempts.prepare = prepare

        async def present(job: Job, out: Path) -> bool:
            return True

        house.dispatcher._attempts.present = present
        first = house.add("first", Recipe(model="ollama:m"))
        await house.until(first, "succeeded")
        again = house.add("again", Recipe(model="ollama:m", schedule=Schedule(priority=3)))
        forced = house.add("forced", Recipe(model="ollama:m", force=True))
        await house.until(again, "succeeded")
        await house.until(forced, "succeeded")
        assert (house.view(again).reason, first in house.view(again).explanation) == ("duplicate", True)
        assert house.view(again).result == house.view(first).result
        assert [job_id for job_id, _, _ in house.executor.started] == [first, forced]
        await house.end()

    run(night)


def test_a_drained_queue_goes_on_where_it_was_also_after_a_restart(tmp_path: Path) -> None:
    async def night(loop: VirtualLoop) -> None:
        house = Night(loop, tmp_path)
        job_id = house.add("long", Recipe(model="ollama:m"), [Act("good", HOUR)])
        await house.until(job_id, "running")
        await house.dispatcher.drain()
        assert (house.state(job_id), house.view(job_id).attempts) == ("queued", 0)
        await house.die()
        house.begin()
        await asyncio.sleep(HOUR)
        assert (house.view(job_id).reason, house.dispatcher.draining) == ("drain", True)
        await house.dispatcher.pause(False)
        await house.until(job_id, "succeeded")
        await house.end()

    run(night)
