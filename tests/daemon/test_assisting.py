"""When the proxy's help is armed: not before there is an abliterated model, and from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from abliterate.contract.config import Config, ProxySettings
from abliterate.contract.messages import JobView, Result
from abliterated.assisting import Assisting
from abliterated.front import Front
from abliterated.proxy.server import Proxy, Steering


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
    async with asyncio.timeout(10):
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
