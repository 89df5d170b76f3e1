"""What the queue says of a cluster that makes no sense, of folders nothing can be written in, and of verbs too late."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from abliterate.contract.errors import AbliteratedError, ConflictError, DiskError
from abliterate.contract.messages import Task
from abliterated.jobs import remote
from abliterated.jobs.cluster import Cluster, ClusterAway
from abliterated.jobs.remote import RayExecutor
from abliterated.jobs.scheduler import Device
from engines import free_port
from jobs.stand_in_ray import StandInRay
from jobs.test_dispatcher import RECIPE, House

DEVICE = Device("ray-0", 0)


def remedied(error: AbliteratedError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert error.remedy and error.remedy in str(error)


class Deaf(StandInRay):
    """A cluster that says yes to a stop and goes on."""

    async def _stop(self, request: web.Request) -> web.Response:
        return web.json_response({"stopped": True})


@pytest.fixture
async def ray() -> AsyncIterator[Deaf]:
    made = Deaf(free_port())
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path)
    yield made
    await made.stop()
    made.ledger.close()


def task(folder: Path) -> Task:
    work = str(folder / "work")
    return Task(recipe=RECIPE, base="m", base_digest="", source="", work=work, output=work, job="01job")


async def test_a_cluster_that_refuses(ray: Deaf) -> None:
    cluster = Cluster(ray.address)
    await cluster.submit("true", "abliterated-01job-aa", {}, 0, 0)
    with pytest.raises(ClusterAway) as caught:
        await cluster.submit("true", "abliterated-01job-aa", {}, 0, 0)
    remedied(caught.value, f"the Ray cluster at {ray.address} refused: ValueError", "already exists", "its dashboard")


async def test_an_address_where_no_ray_is() -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>a router's own page</html>")

    app = web.Application()
    app.router.add_get("/{any:.*}", page)
    runner, port = web.AppRunner(app), free_port()
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        with pytest.raises(ClusterAway) as caught:
            await Cluster(f"http://127.0.0.1:{port}").look("any")
    finally:
        await runner.cleanup()
    remedied(caught.value, "no Ray cluster's answer", "[ray] address")


async def test_a_shared_folder_that_can_not_be_written(ray: Deaf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError) as caught:
        await RayExecutor(Cluster(ray.address)).start(task(tmp_path), tmp_path / "file" / "below", DEVICE)
    remedied(caught.value, "below: can't be written (Not a directory)", "Free some space")
    assert ray.jobs == {}


async def test_an_earlier_submission_that_does_not_end(
    ray: Deaf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STOP_SECONDS", 0.05)
    executor = RayExecutor(Cluster(ray.address), look_seconds=0.02)
    await executor.cluster.submit("exec sleep 60", "abliterated-01job-aa", {}, 0, 0)
    with pytest.raises(ClusterAway) as caught:
        await executor.start(task(tmp_path), tmp_path, DEVICE)
    remedied(caught.value, "abliterated-01job-aa does not end on the cluster", "Ray's dashboard")
    assert list(ray.jobs) == ["abliterated-01job-aa"]


async def test_only_a_queued_job_is_held(house: House) -> None:
    job_id = await house.add()
    await house.dispatcher.hold(job_id, "test")
    with pytest.raises(ConflictError) as caught:
        await house.dispatcher.hold(job_id, "test")
    remedied(caught.value, f"job {job_id} is held", "Only a queued job can be held")


async def test_a_job_whose_folder_is_none_says_so_where_it_is_looked_for(house: House) -> None:
    job_id = await house.add()
    folder = house.root / "jobs" / job_id
    shutil.rmtree(folder)
    folder.write_text("somebody's file")
    house.start()
    view = await house.until(job_id, lambda one: one.reason == "disk" or one.state in ("failed", "held"))
    assert view.reason == "disk"
    assert f"{folder}: no job can work there (Not a directory)" in view.explanation
    assert view.failure is not None and "Check that disk" in view.failure.remedy
