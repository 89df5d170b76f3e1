"""When the proxy's help is armed: not before there is an abliterated model, and from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from abliterate.contract.config import Config, ProxySettings
from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView, Result
from abliterate.contract.names import parse_name
from abliterate.contract.recipe import Recipe
from abliterated.assisting import Assisting
from abliterated.front import Front
from abliterated.jobs.journal import Journal
from abliterated.proxy.server import Proxy, Steering
from e2e.daemons import house
from proxy.tools import double
from proxy.tools.double import MODEL

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def engine(*names: str) -> TestServer:
    async def tags(request: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": name} for name in names]})

    async def chat(request: web.Request) -> web.Response:
        return web.json_response({"error": f"model {(await request.json())['model']!r} not found"}, status=404)

    application = web.Application()
    application.router.add_get("/api/tags", tags)
    application.router.add_post("/api/chat", chat)
    return TestServer(application)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def assisting(server: TestServer, help: Any = "needed") -> tuple[Proxy, Assisting]:
    proxy = Proxy("127.0.0.1:0", str(server.make_url("")).rstrip("/"), steering=Steering())
    made = Assisting(proxy, str(server.make_url("")).rstrip("/"), help)
    await proxy.start()
    made.begin()
    return proxy, made


@pytest.mark.parametrize(("names", "armed"), [(("qwen3:8b",), False), (("qwen3:8b", "qwen3-abliterated:8b"), True)])
async def test_at_the_start_the_engine_is_asked_what_it_has(names: tuple[str, ...], armed: bool) -> None:
    async with engine(*names) as server:
        proxy, made = await assisting(server)
        try:
            await until(lambda: made._looking is not None and made._looking.done())
            assert proxy.view.assist is armed
        finally:
            await made.close()
            await proxy.close(0)


async def test_the_first_request_that_names_such_a_model_arms_and_an_ordinary_one_does_not() -> None:
    async with engine() as server, ClientSession() as http:
        proxy, made = await assisting(server)
        try:
            url = f"http://{proxy.addresses[0]}/api/chat"
            for name, armed in (("qwen3:8b", False), ("qwen3-abliterated:8b", True)):
                async with http.post(url, json={"model": name, "messages": []}) as answer:
                    assert answer.status == 404
                assert proxy.view.assist is armed
        finally:
            await made.close()
            await proxy.close(0)


async def test_turned_off_it_never_arms() -> None:
    async with engine("qwen3-abliterated:8b") as server:
        proxy, made = await assisting(server, "off")
        made.made("qwen3-abliterated:8b", {})
        assert proxy.assistant is None and not proxy.view.assist
        await made.close()
        await proxy.close(0)


async def test_an_engine_that_is_away_is_waited_for_and_closing_does_not_wait() -> None:
    proxy = Proxy("127.0.0.1:0", "http://127.0.0.1:1", steering=Steering())
    made = Assisting(proxy, "http://127.0.0.1:1", "needed")
    made.begin()
    await asyncio.sleep(0)
    await made.close()
    assert not proxy.view.assist


@pytest.mark.parametrize("lost", [False, True])
def test_a_finished_job_arms_and_its_certificate_says_whether_tools_survived(lost: bool) -> None:
    front = Front(Config(proxy=ProxySettings(listen="127.0.0.1:0", upstream="http://127.0.0.1:1")))
    proxy = front.make([])
    assert proxy is not None and front.assisting is not None and front.assisting.assist is not None
    differences = [{"what": "tool round trip", "text": "lost", "failure": True}] if lost else []
    result = Result(product="x.gguf", format="gguf", certification={"differences": differences})
    front.job_changed(
        JobView(id="01", label="x", model="ollama:qwen3:8b", target="qwen3-abliterated:8b", state="succeeded",
                result=result)
    )  # fmt: skip
    assert proxy.view.assist
    assert bool(front.assisting.assist._distrusted) is lost


LOST = {"differences": [{"what": "tool round trip", "text": "lost", "failure": True}]}


@pytest.mark.parametrize("newer", [False, True])
async def test_what_earlier_jobs_proved_is_recalled_and_what_a_new_one_says_counts_more(newer: bool) -> None:
    asked, may_tell = asyncio.Event(), asyncio.Event()

    async def recall() -> dict[str, dict[str, Any]]:
        asked.set()
        await may_tell.wait()
        return {"mine:1b": LOST, "sound:1b": {}}

    async with engine("mine:1b") as server:
        url = str(server.make_url("")).rstrip("/")
        proxy = Proxy("127.0.0.1:0", url, steering=Steering())
        made = Assisting(proxy, url, "needed")
        await proxy.start()
        made.begin(recall)
        try:
            await asyncio.wait_for(asked.wait(), 60)
            if newer:
                made.made("mine:1b", {})
            may_tell.set()
            await until(lambda: made._looking is not None and made._looking.done())
            assert proxy.view.assist, "the engine has a model of ours, though its name does not say so"
            assert made.assist is not None
            assert made.assist._distrusted == (set() if newer else {parse_name("mine:1b").key()})
        finally:
            await made.close()
            await proxy.close(0)


def test_a_daemon_started_anew_knows_what_its_jobs_have_proved(tmp_path: Path) -> None:
    """The engine says that its model can call tools; the last job that made it has found that it can't."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": False, "tools": [TOOL]}
    with double.engine(tmp_path, capabilities=["completion", "tools"]) as fake, house() as home:
        home.upstream = fake.port
        home.configure("ollama")
        home.state.mkdir()
        journal = Journal(home.state / "journal.sqlite3")
        for certification in ({}, LOST):
            result = Result(product="model.gguf", format="gguf", certification=certification)
            job_id = new_id()
            journal.add(job_id, "night", Recipe(model="ollama:lamp:1b", name=MODEL))
            for state in ("starting", "running", "registering"):
                journal.move(job_id, state)
            journal.move(job_id, "succeeded", result=result)
        journal.close()
        home.serve()
        try:
            home.until(lambda: answer(home.url, body) == "Hello there", "help with tools")
        finally:
            home.stop()
    assert fake.bodies("/api/generate"), "asked in another way"


def answer(url: str, body: dict[str, Any]) -> str:
    told = httpx.post(f"{url}/api/chat", json=body, timeout=60).raise_for_status().json()
    return str(told.get("message", {}).get("content", told))
