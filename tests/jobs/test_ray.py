"""Jobs on a Ray cluster: a real local one where Ray is installed beside (`make ray`), and always a stand-in."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from abliterate.contract.config import parse_config
from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import JobView, Task
from abliterate.contract.recipe import Direction, Recipe, Run
from abliterate.contract.states import TERMINAL
from abliterated.jobs.cluster import Cluster, token
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.remote import RayExecutor, environment
from abliterated.pipeline.direction_files import write_direction
from abliterated.pipeline.directions import direction
from engines import free_port
from jobs.stand_in_ray import StandInRay
from jobs.test_dispatcher import RECIPE, House
from pipeline.folders import planted_folder
from pipeline.planted import HIDDEN, REFUSAL
from strangers import within

SLOW = """#!/bin/sh
exec {python} -c 'import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(86))
print("begun", flush=True)
time.sleep(300)'
"""


def ray_binary() -> str:
    beside = Path.home() / ".cache" / "abliterated" / "ray" / "bin" / "ray"
    return os.environ.get("RAY_BIN") or (str(beside) if beside.exists() else shutil.which("ray") or "")


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    """The address of a local Ray, started for these tests and ended by its own processes' ids."""
    binary = ray_binary()
    if not binary:
        pytest.skip("no Ray here: `make ray` installs one beside")
    ports = [free_port() for _ in range(4)]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        argv = [binary, "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
        argv += ["--num-cpus=1", "--num-gpus=0", "--disable-usage-stats", "--include-dashboard=true"]
        argv += [
            f"--ray-client-server-port={ports[2]}",
            f"--dashboard-agent-listen-port={ports[3]}",
            f"--temp-dir={home}",
        ]
        argv += ["--min-worker-port=0", "--max-worker-port=0"]
        with (Path(home) / "start.log").open("wb") as log:
            head = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            deadline = time.monotonic() + 150
            while not answers(address):
                assert head.poll() is None, (Path(home) / "start.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "Ray did not start"
                time.sleep(0.5)
            yield address
        finally:
            family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.terminate()
            head.wait(timeout=60)
            _, alive = psutil.wait_procs(family, timeout=20)
            for process in alive:
                process.kill()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class RemoteHouse(House):
    """A dispatcher whose workers run on a cluster."""

    def __init__(self, root: Path, address: str, python: str = sys.executable, gpus: float = 0) -> None:
        self.executor = RayExecutor(Cluster(address), python=python, gpus=gpus, look_seconds=0.1)
        super().__init__(root)

    def make(self) -> Dispatcher:
        return Dispatcher(
            self.ledger,
            self.root / "jobs",
            prepare=self.prepare,
            register=self.register,
            publish=self.publish,
            executor=self.executor,
            devices=self.executor.devices,
        )

    async def prepare(self, job: Job, folder: Path) -> Task:
        return msgspec.structs.replace(await super().prepare(job, folder), lock="")

    async def submissions(self, job_id: str) -> list[str]:
        return await self.executor.cluster.at_work(f"abliterated-{job_id}-")

    def text(self, job_id: str) -> str:
        log = self.root / "jobs" / job_id / "log.txt"
        return log.read_text() if log.exists() else ""


@pytest.fixture
async def stand_in() -> AsyncIterator[StandInRay]:
    made = StandInRay(free_port())
    await made.start()
    yield made
    await made.close()


@pytest.fixture(params=["stand-in", "ray"])
async def address(request: pytest.FixtureRequest, stand_in: StandInRay) -> str:
    return str(request.getfixturevalue("ray")) if request.param == "ray" else stand_in.address


@pytest.fixture
async def house(tmp_path: Path, address: str) -> AsyncIterator[RemoteHouse]:
    made = RemoteHouse(tmp_path, address)
    yield made
    await made.stop()
    made.ledger.close()


def slow(house: RemoteHouse) -> None:
    script = house.root / "slow-python"
    script.write_text(SLOW.format(python=sys.executable))
    script.chmod(0o755)
    house.executor.python = str(script)


async def begun(house: RemoteHouse, job_id: str) -> None:
    async with asyncio.timeout(150):
        while "begun" not in house.text(job_id):
            await asyncio.sleep(0.05)


async def test_a_model_is_made_on_the_cluster_and_its_progress_log_and_product_come_back(house: RemoteHouse) -> None:
    model = planted_folder(house.root)
    house.source = model.path
    vector = np.zeros(HIDDEN)
    vector[REFUSAL] = 1.0
    write_direction(house.root / "given.safetensors", direction(vector, origin={}), {})
    found = Direction(method="file", file=str(house.root / "given.safetensors"))
    house.start()
    job_id = await house.add(recipe=msgspec.structs.replace(RECIPE, direction=found))
    view = await house.until(job_id, lambda one: one.state in TERMINAL, seconds=300)
    assert view.state == "succeeded", (view.failure, house.text(job_id))
    assert view.result is not None
    folder = house.root / "jobs" / job_id
    assert (folder / "out" / view.result.product / "config.json").is_file()
    assert {"load", "edit"} <= {event.stage for event in house.events}
    assert f"job {job_id}" in house.text(job_id)
    assert not list(folder.glob("abliterated-*")), "what was between the machines is gone"


async def test_a_recipe_s_error_fails_there_as_it_does_here(house: RemoteHouse) -> None:
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.state in TERMINAL, seconds=300)
    assert (view.state, view.attempts) == ("failed", 1)
    assert view.failure is not None
    assert view.failure.remedy


async def test_a_cancelled_job_ends_on_the_cluster_within_thirty_seconds(house: RemoteHouse) -> None:
    slow(house)
    house.start()
    job_id = await house.add()
    await begun(house, job_id)
    with within(30):
        await house.dispatcher.cancel(job_id, "test")
        await house.until(job_id, lambda one: one.state == "cancelled", seconds=150)
    assert await house.submissions(job_id) == []


async def test_what_a_dead_daemon_had_submitted_is_stopped_and_the_job_goes_on_at_once(house: RemoteHouse) -> None:
    slow(house)
    house.start()
    job_id = await house.add()
    await begun(house, job_id)
    assert house.task is not None
    house.task.cancel()
    for task in list(house.dispatcher._tasks.values()):
        task.cancel()
    (before,) = await house.submissions(job_id)
    (house.root / "jobs" / job_id / "log.txt").write_text("")
    house.dispatcher = house.make()
    house.start()
    await begun(house, job_id)
    (after,) = await house.submissions(job_id)
    assert before != after
    job = await house.ledger.do(Journal.get, job_id)
    assert (job.attempts, job.crashes) == (0, 0)
    await house.dispatcher.cancel(job_id, "test")
    await house.until(job_id, lambda one: one.state == "cancelled")


async def test_a_killed_worker_is_a_crash_there_too(house: RemoteHouse) -> None:
    script = house.root / "dies"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    house.executor.python = str(script)
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.attempts == 1, seconds=150)
    assert (view.state, view.reason) == ("queued", "interrupted")
    assert "signal 9" in view.explanation


# --- what only a stand-in can be made to do ---------------------------------------------------------------------------


async def made(tmp_path: Path, stand_in: StandInRay, gpus: float = 0) -> RemoteHouse:
    house = RemoteHouse(tmp_path, stand_in.address, gpus=gpus)
    slow(house)
    house.start()
    return house


async def ended(house: RemoteHouse) -> None:
    await house.stop()
    house.ledger.close()


async def test_a_cluster_that_is_away_costs_no_attempt_and_says_so(tmp_path: Path) -> None:
    stand_in = StandInRay(free_port())
    house = await made(tmp_path, stand_in)
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.reason == "cluster-down")
    assert (view.state, view.attempts) == ("queued", 0)
    assert stand_in.address in view.explanation
    await stand_in.start()
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    await begun(house, job_id)
    await ended(house)
    await stand_in.close()


async def test_a_full_cluster_is_waited_for_and_a_lost_node_is_no_crash(tmp_path: Path, stand_in: StandInRay) -> None:
    stand_in.full = True
    house = await made(tmp_path, stand_in, gpus=2)
    job_id = await house.add()
    await house.until(job_id, lambda one: "waits for the device" in one.message)
    (submission,) = await house.submissions(job_id)
    asked = stand_in.jobs[submission].asked
    assert (asked["entrypoint_num_gpus"], asked["entrypoint_num_cpus"]) == (2, 1)
    stand_in.full = False
    await begun(house, job_id)
    stand_in.lose(submission)
    view = await house.until(job_id, lambda one: one.attempts == 1)
    assert (view.state, view.reason) == ("queued", "backoff")
    assert (await house.ledger.do(Journal.get, job_id)).crashes == 0
    await ended(house)


async def test_a_cluster_with_a_token_is_asked_with_it(tmp_path: Path, stand_in: StandInRay) -> None:
    stand_in.token = "secret"
    house = await made(tmp_path, stand_in)
    job_id = await house.add()
    view: JobView = await house.until(job_id, lambda one: one.reason == "cluster-down")
    assert "RAY_AUTH_TOKEN" in view.explanation
    house.executor.cluster = Cluster(stand_in.address, token({"RAY_AUTH_TOKEN": "secret"}))
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    await begun(house, job_id)
    await ended(house)


def test_what_is_submitted_holds_no_secret_and_keeps_the_worker_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecretOfTheTests1234")
    task = Task(recipe=Recipe(model="ollama:m", run=Run(device="cuda:3")), base="", source="/m", work="", output="")
    assert environment(task)["HF_HUB_OFFLINE"] == "1"
    fetching = msgspec.structs.replace(task, recipe=Recipe(model="hf:o/m"), source="")
    assert "HF_HUB_OFFLINE" not in environment(fetching)
    assert not [value for value in environment(fetching).values() if "hf_" in value]


def test_the_token_is_in_the_environment_a_file_or_a_credential(tmp_path: Path) -> None:
    (tmp_path / "ray_token").write_text("t\n")
    assert token({}) == ""
    assert token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "ray_token")}) == "t"
    assert token({"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "t"


def test_an_address_with_a_password_or_a_path_is_refused() -> None:
    parse_config(b'[jobs]\nexecutor = "ray"\n[ray]\naddress = "http://head:8265"\ngpus = 0.5\n')
    for address in ("http://u:p@head:8265", "head:8265", "ray://head:10001"):
        with pytest.raises(RecipeError):
            parse_config(f'[ray]\naddress = "{address}"\n'.encode())
