"""A job in `registering` while the engine is down, restarts, is slow, breaks or is full, at every step: it waits there
with a reason, the device is free, and exactly one correct model is the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web

from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView, Result, Task
from abliterate.contract.recipe import Recipe
from abliterated.handover import CERTIFICATIONS, Handover
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.ollama import admission
from abliterated.ollama.certification import CertificationUnfinished
from abliterated.ollama.certify import Certificate, certify
from abliterated.ollama.client import OllamaClient
from fake_ollama import FakeOllama, Fault, reset, says, status, tiny_gguf

TARGET = "base-abliterated:8b"
KEYS = {"general.architecture": "llama", "tokenizer.chat_template": "{% for %}"}


class House:
    """The real dispatcher and handover, a real journal, one job whose worker has ended, an engine that misbehaves."""

    def __init__(self, root: Path, fake: FakeOllama) -> None:
        self.root, self.fake = root, fake
        self.ledger = Ledger(root / "journal.sqlite3")
        self.handover = Handover(fake.url, lambda: False, root / "left.json")
        self.changed = asyncio.Event()
        self.dispatcher = Dispatcher(
            self.ledger,
            root / "jobs",
            prepare=self.prepare,
            register=self.handover.register,
            release=self.handover.release,
            abandon=self.handover.abandon,
            publish=lambda view, number: self.changed.set(),
        )

    async def prepare(self, job: Job, folder: Path) -> Task:
        raise AssertionError("nothing is to be run")

    async def finished_job(self) -> str:
        job_id = new_id()
        out = self.root / "jobs" / job_id / "out"
        out.mkdir(parents=True)
        file = tiny_gguf(out / "model.gguf", {**KEYS, "abliterated.content": "c0ffee"}, padding=2_500_000)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.blob = f"sha256:{digest}"
        result = Result(product="model.gguf", format="gguf", digest=digest, content="c0ffee")
        (out / "report.json").write_text(json.dumps({"coverage": 1.0}))
        await self.ledger.do(Journal.add, job_id, "night", Recipe(model="ollama:base:8b"))
        for state in ("starting", "running"):
            await self.ledger.do(Journal.move, job_id, state)
        await self.ledger.do(Journal.move, job_id, "registering", result=result)
        return job_id

    async def until(self, job_id: str, wanted: Callable[[JobView], bool]) -> JobView:
        async with asyncio.timeout(60):
            while True:
                self.changed.clear()
                view = self.dispatcher.view(await self.ledger.do(Journal.get, job_id))
                if wanted(view):
                    return view
                with_deadline = asyncio.wait_for(self.changed.wait(), 0.2)
                await asyncio.gather(with_deadline, return_exceptions=True)


@pytest.fixture(autouse=True)
def certified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same certification in this process; the process of its own has its tests in test_certify."""

    async def here(url: str, model: str, reference: str = "", *, product: Path, baked: bool) -> Certificate:
        async with OllamaClient(url) as client:
            return await certify(client, model, reference, baked=baked)

    monkeypatch.setattr(admission, "certify_apart", here)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("base:8b", tiny_gguf(tmp_path / "base.gguf", KEYS), template="{{ .Tools }}")
        yield engine


@pytest.fixture
async def house(tmp_path: Path, fake: FakeOllama) -> AsyncIterator[House]:
    made = House(tmp_path, fake)
    yield made
    await made.dispatcher.stop()
    made.ledger.close()


FULL = "write /models/blobs/sha256-1: no space left on device"
FAULTS: dict[str, tuple[str, list[Fault]]] = {
    "down before anything": ("GET /api/version", [reset] * 2),
    "broken at the base": ("POST /api/show", [status(500)]),
    "cut at the base": ("POST /api/show", [reset] * 2),
    "starting, its version is a 503": ("GET /api/version", [status(503)]),
    "full of requests at the blob": ("HEAD /api/blobs", [status(503)]),
    "down at the blob": ("HEAD /api/blobs", [reset] * 2),
    "broken at the creation": ("POST /api/create", [status(500)]),
    "cut within the creation": ("POST /api/create", [says({"status": "parsing"}, cut=True)]),
    "cut after the creation": ("POST /api/create", [says(cut=True, first_create=True)]),
    "out of disk in the creation": ("POST /api/create", [says({"error": FULL})]),
    "broken at the certification": ("POST /api/chat", [status(500, "requires more system memory")] * 60),
    "cut at the certification": ("POST /api/chat", [reset] * 2),
    "busy at the certification": ("POST /api/chat", [status(503, "server busy")] * 2),
    "broken at the naming": ("POST /api/copy", [status(500)]),
    "cut at the naming": ("POST /api/copy", [reset] * 2),
    "out of disk at the naming": ("POST /api/copy", [status(500, FULL)]),
    "broken at the clearing": ("DELETE /api/delete", [status(500)]),
    "cut at the clearing": ("DELETE /api/delete", [reset] * 2),
}


async def check_the_end(house: House, job_id: str) -> None:
    view = await house.until(job_id, lambda view: view.state in ("succeeded", "failed"))
    assert view.state == "succeeded", view
    short = sorted(name.removeprefix("registry.ollama.ai/library/") for name in house.fake.models)
    assert short == [TARGET, "base:8b"]
    made = house.fake.models[f"registry.ollama.ai/library/{TARGET}"]
    assert made["files"]["model.gguf"] == house.blob and made["template"] == "{{ .Tools }}"
    report = json.loads((house.root / "jobs" / job_id / "out" / "report.json").read_text())
    assert report["coverage"] == 1.0 and len(report["certification"]["compared"]) == 4
    assert view.result is not None and view.result.certification == report["certification"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_job_waits_with_a_reason_and_ends_with_one_model(house: House, fault: str) -> None:
    route, script = FAULTS[fault]
    job_id = await house.finished_job()
    house.fake.faults[route] = list(script) * 20  # until it is mended: it tries again by itself, too
    loop = asyncio.create_task(house.dispatcher.run())
    view = await house.until(job_id, lambda view: bool(view.explanation))
    assert view.state == "registering" and view.reason == ("disk" if "disk" in fault else "ollama-down")
    assert not house.dispatcher._running, "the device is free meanwhile"
    house.fake.faults.clear()
    await house.dispatcher.engine_answers()
    await check_the_end(house, job_id)
    await house.dispatcher.stop()
    await loop


async def test_an_engine_that_is_away_for_long_is_waited_for(house: House) -> None:
    job_id = await house.finished_job()
    await house.fake.__aexit__()
    loop = asyncio.create_task(house.dispatcher.run())
    view = await house.until(job_id, lambda view: bool(view.explanation))
    assert view.state == "registering" and "no engine answers" in view.explanation
    await house.fake.__aenter__()
    await house.dispatcher.engine_answers()
    await check_the_end(house, job_id)
    await house.dispatcher.stop()
    await loop


async def test_a_slow_engine_is_waited_for_without_a_word(house: House) -> None:
    job_id = await house.finished_job()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request, fake: FakeOllama) -> None:
        reached.set()
        await go_on.wait()

    house.fake.faults["POST /api/create"] = [slow]
    loop = asyncio.create_task(house.dispatcher.run())
    await reached.wait()
    view = house.dispatcher.view(await house.ledger.do(Journal.get, job_id))
    assert (view.state, view.explanation) == ("registering", "")
    go_on.set()
    await check_the_end(house, job_id)
    await house.dispatcher.stop()
    await loop


async def test_the_daemon_dies_within_a_registration_and_the_next_one_ends_it(house: House, tmp_path: Path) -> None:
    job_id = await house.finished_job()
    reached = asyncio.Event()

    async def dies_here(request: web.Request, fake: FakeOllama) -> None:
        reached.set()

    house.fake.faults["POST /api/copy"] = [dies_here]
    loop = asyncio.create_task(house.dispatcher.run())
    await reached.wait()
    await house.dispatcher.stop()
    await loop
    second = House(tmp_path, house.fake)
    loop = asyncio.create_task(second.dispatcher.run())
    second.blob = house.blob
    await check_the_end(second, job_id)
    await second.dispatcher.stop()
    await loop
    second.ledger.close()


async def test_a_failed_certification_ends_the_job_and_its_diff_is_kept(house: House) -> None:
    job_id = await house.finished_job()
    real = house.fake.post_chat

    async def otherwise(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "abliterated" in body["model"] and body.get("_debug_render_only"):
            return web.json_response({"_debug_info": {"rendered_template": "nothing of it"}})
        return await real(request)

    house.fake.answers["/api/chat"] = otherwise
    loop = asyncio.create_task(house.dispatcher.run())
    view = await house.until(job_id, lambda view: view.state in ("succeeded", "failed"))
    assert view.state == "failed" and view.failure is not None and "not given its name" in view.failure.message
    assert view.result is not None
    assert "+nothing of it" in view.result.certification["differences"][0]["diff"]
    out = house.root / "jobs" / job_id / "out"
    assert json.loads((out / "report.json").read_text())["certification"] == view.result.certification
    assert (out / "model.gguf").exists(), "the GGUF is kept"
    assert list(house.fake.models) == ["registry.ollama.ai/library/base:8b"]
    await house.dispatcher.stop()
    await loop


async def test_a_job_cancelled_while_it_waits_leaves_nothing_in_the_engine(house: House) -> None:
    job_id = await house.finished_job()
    house.fake.faults["POST /api/copy"] = [reset] * 60
    loop = asyncio.create_task(house.dispatcher.run())
    await house.until(job_id, lambda view: bool(view.explanation))
    assert any("uncertified" in name for name in house.fake.models)
    await house.dispatcher.cancel(job_id, "uid 0")
    await house.until(job_id, lambda view: view.state == "cancelled")
    assert list(house.fake.models) == ["registry.ollama.ai/library/base:8b"]
    await house.dispatcher.stop()
    await loop


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_a_job_cancelled_while_the_engine_was_away_had_to_leave_goes_at_the_next_contact(
    house: House, restarted: bool
) -> None:
    job_id = await house.finished_job()
    house.fake.faults["POST /api/copy"] = [reset] * 60
    loop = asyncio.create_task(house.dispatcher.run())
    await house.until(job_id, lambda view: bool(view.explanation))
    await house.fake.__aexit__()
    await house.dispatcher.cancel(job_id, "uid 0")
    await house.until(job_id, lambda view: view.state == "cancelled")
    assert any("uncertified" in name for name in house.fake.models), "nobody was there to take it away"
    await house.fake.__aenter__()
    # Another job, with another name, asks the engine of its base.
    handover = Handover(house.fake.url, lambda: False, house.root / "left.json") if restarted else house.handover
    await handover.base(Recipe(model="ollama:base:8b"), "another:8b", house.root / "other")
    assert list(house.fake.models) == ["registry.ollama.ai/library/base:8b"]
    assert json.loads((house.root / "left.json").read_text()) == []
    await house.dispatcher.stop()
    await loop


async def test_a_certification_that_comes_to_no_end_is_tried_so_often_and_no_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, tries = await house.finished_job(), 0

    async def never(url: str, model: str, reference: str = "", *, product: Path, baked: bool) -> Certificate:
        nonlocal tries
        tries += 1
        raise CertificationUnfinished(f"{model}: its certification did not end in 1800 s", remedy="It is tried again")

    monkeypatch.setattr(admission, "certify_apart", never)
    loop = asyncio.create_task(house.dispatcher.run())
    for tried in range(1, CERTIFICATIONS):
        await house.until(job_id, lambda view, tried=tried: tries >= tried and bool(view.explanation))  # type: ignore[misc]
        await house.dispatcher.engine_answers()
    view = await house.until(job_id, lambda view: view.state not in ("registering", "cancelling"))
    assert (view.state, tries) == ("failed", CERTIFICATIONS), view
    assert view.failure is not None and "did not end in 1800 s, 3 times" in view.failure.message
    assert "abliterate retry" in view.failure.remedy
    assert list(house.fake.models) == ["registry.ollama.ai/library/base:8b"]
    assert (house.root / "jobs" / job_id / "out" / "model.gguf").exists(), "the GGUF is kept"
    await house.dispatcher.stop()
    await loop


async def test_a_base_that_is_gone_meanwhile_is_remembered(house: House) -> None:
    job_id = await house.finished_job()
    recipe = Recipe(model="ollama:base:8b")
    source, digest = await house.handover.base(recipe, TARGET, house.root / "jobs" / job_id)
    assert Path(source).exists() and digest.startswith("sha256:")
    del house.fake.models["registry.ollama.ai/library/base:8b"]
    loop = asyncio.create_task(house.dispatcher.run())
    view = await house.until(job_id, lambda view: view.state in ("succeeded", "failed"))
    assert view.state == "succeeded" and view.result is not None
    assert any("is gone from the engine" in note for note in view.result.notes)
    assert house.fake.models[f"registry.ollama.ai/library/{TARGET}"]["template"] == "{{ .Tools }}"
    await house.dispatcher.stop()
    await loop
