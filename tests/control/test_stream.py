"""Events and logs as a client reads them: nothing missed across a break or told twice, an end with the job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientSession, UnixConnector, web

from abliterate.contract.errors import DiskError
from abliterate.contract.messages import ErrorBody, JobView, Submit
from abliterated.app import control_listener
from abliterated.control.events import Events
from abliterated.control.server import Control
from abliterated.jobs.journal import Journal
from daemon.test_desk import Office

GOOD = 'model = "ollama:m"\n'


@dataclass
class Served:
    office: Office
    control: Control
    client: ClientSession

    async def events(self, after: str, count: int) -> list[tuple[int, str, str]]:
        """(number, job, state) of the next `count` events."""
        found: list[tuple[int, str, str]] = []
        async with self.client.get("http://x/v1/events", headers={"Last-Event-ID": after}) as answer:
            assert answer.content_type == "text/event-stream"
            number = 0
            async with asyncio.timeout(60):
                async for line in answer.content:
                    name, _, value = line.decode().strip().partition(": ")
                    if name == "id":
                        number = int(value)
                    if name == "data":
                        view = msgspec.json.decode(value, type=JobView)
                        found.append((number, view.id, view.state))
                        if len(found) == count:
                            break
        return found


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    office, events = Office(tmp_path), Events()
    office.dispatcher._moves._publish = events.publish
    control = Control(office.desk, events)
    runner = web.AppRunner(control.application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, control_listener(tmp_path / "c.sock")).start()
    async with ClientSession(connector=UnixConnector(str(tmp_path / "c.sock"))) as client:
        yield Served(office, control, client)
    control.stop()
    await runner.cleanup()
    office.ledger.close()


async def submitted(served: Served) -> str:
    return (await served.office.desk.submit(Submit(recipe=GOOD), "test")).id


async def test_what_was_missed_is_told_in_order_and_then_what_comes(served: Served) -> None:
    job = await submitted(served)
    for verb in ("hold", "release"):
        await served.office.desk.act(verb, job, "test")
    first = await served.events("0", 3)
    assert [number for number, _, _ in first] == sorted({number for number, _, _ in first})
    listening = asyncio.create_task(served.events(str(first[1][0]), 2))
    async with asyncio.timeout(60):
        while not served.control._events._listeners:
            await asyncio.sleep(0.01)
    await served.office.desk.act("cancel", job, "test")
    again = await listening
    assert again[0][0] == first[2][0], "the one after the last it had seen"
    assert again[1] == (first[2][0] + 1, job, "cancelled")


async def test_who_asked_is_in_the_journal(served: Served) -> None:
    job = await submitted(served)
    async with served.client.post(f"http://x/v1/jobs/{job}/cancel") as answer:
        assert answer.status == 200
    *_, (_, new, _, _, who) = await served.office.ledger.do(Journal.history, job)
    assert (new, who) == ("cancelled", f"uid {os.geteuid()} pid {os.getpid()}")


async def test_a_followed_log_ends_when_its_job_does_and_has_every_byte(served: Served) -> None:
    job = await submitted(served)
    log = served.office.desk.log_file(job)
    log.write_text("begun\n")
    async with served.client.get(f"http://x/v1/jobs/{job}/log?follow=1&offset=2") as answer:
        assert await answer.content.readline() == b"gun\n"
        with log.open("a") as file:
            file.write("a fault\n")
        assert await asyncio.wait_for(answer.content.readline(), 60) == b"a fault\n"
        with log.open("a") as file:
            file.write("the end\n")
        await served.office.desk.act("cancel", job, "test")
        assert await asyncio.wait_for(answer.content.read(), 60) == b"the end\n"


async def test_a_disk_without_room_is_told_as_that(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise DiskError("the journal can't be written", remedy="Free some disk space")

    monkeypatch.setattr(Journal, "add_all", full)
    async with served.client.post("http://x/v1/jobs", data=msgspec.json.encode(Submit(recipe=GOOD))) as answer:
        assert answer.status == 507
        assert msgspec.json.decode(await answer.read(), type=ErrorBody).remedy
