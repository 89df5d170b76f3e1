"""What the proxy says of places it can't listen or write at, and of engines and helpers that fall in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from abliterate.contract.errors import AbliteratedError, DiskError, RecipeError
from abliterated.proxy.listen import parse_upstream
from abliterated.proxy.server import Proxy, Steering
from abliterated.proxy.tools import upstream
from abliterated.proxy.tools.helper import Render
from abliterated.proxy.tools.renderer import CannotRender, Renderer
from strangers import as_nobody

UPSTREAM = "http://127.0.0.1:1"


def remedied(error: AbliteratedError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert error.remedy and error.remedy in str(error)


# -- where it listens ----------------------------------------------------------------------------------------------


def test_nowhere_to_listen() -> None:
    with pytest.raises(RecipeError) as caught:
        Proxy([], UPSTREAM)
    remedied(caught.value, "no address to listen on", "127.0.0.1:11434")


@pytest.mark.parametrize(
    ("listen", "words", "remedy"),
    [
        ("192.0.2.1:0", "no interface of this machine has the address 192.0.2.1:0", "choose another"),
        ("no-such-host.invalid:0", "'no-such-host.invalid' can't be resolved", "IP address"),
        ("an..empty.label:0", "'an..empty.label' can't be resolved", "IP address"),
        ("unix:{folder}/none/front", "can't listen on unix:", "choose another"),
        ("unix:{folder}/file/front", "Not a directory", "choose another"),
        ("unix:{folder}/file", "what lies there is no socket", "move it away"),
    ],
)
async def test_where_it_can_not_listen(listen: str, words: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RecipeError) as caught:
        await Proxy(listen.format(folder=tmp_path), UPSTREAM, allow_remote=True).start()
    remedied(caught.value, words, remedy)
    assert (tmp_path / "file").read_text() == "kept"


async def test_where_this_user_may_not_listen(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    for folder in (open_to_all, tmp_path):
        folder.chmod(0 if folder == tmp_path else 0o777)
    try:
        with as_nobody(), pytest.raises(RecipeError) as caught:
            await Proxy(f"unix:{open_to_all}/front", UPSTREAM).start()
    finally:
        tmp_path.chmod(0o700)
    remedied(caught.value, "this user may not listen on unix:", "a folder you own")


@pytest.mark.parametrize("host", ["an..empty.label", "x" * 64 + ".lan"])
def test_an_upstream_that_can_be_no_name_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_upstream(f"http://{host}:11435")
    remedied(caught.value, host, "http://127.0.0.1:11435")


async def test_an_access_log_that_can_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        await Proxy("127.0.0.1:0", UPSTREAM, steering=Steering(access_log=str(tmp_path))).start()
    remedied(caught.value, f"{tmp_path}: the access log can't be opened (Is a directory)", "proxy.access_log")


# -- who falls -----------------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"


@contextlib.asynccontextmanager
async def says(data: bytes, *, reset: bool = False) -> AsyncIterator[str]:
    """The address of an engine that answers with this, and goes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("data", "reset", "words"),
    [
        (HEAD + b"{}\n", False, "broke off"),
        (HEAD + b"{}\n", True, "broke off: "),
        (b"SSH-2.0-OpenSSH_9.9\r\n", False, "broke off: "),
        (HEAD + b"x" * (upstream.LONGEST_LINE + 100_000), False, "says a line without end"),
    ],
    ids=["gone", "reset", "no HTTP", "endless line"],
)
async def test_an_engine_that_falls_in_the_middle_of_an_answer(data: bytes, reset: bool, words: str) -> None:
    async with says(data, reset=reset) as address:
        with pytest.raises(upstream.Broken) as caught:
            async with upstream.post(address, "/api/chat", {}, {}) as answer:
                async for _ in answer.lines():
                    pass
    remedied(caught.value, f"{address} {words}", "See the engine's log")


async def test_a_rendering_process_that_is_killed_and_the_next_question() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    renderer = Renderer(seconds=30)
    try:
        assert await renderer.render(Render("fine", [], [], {})) == "fine"
        assert renderer._process is not None
        question = asyncio.create_task(renderer.render(Render(endless, [], [], {})))
        await asyncio.sleep(0)
        os.kill(renderer._process.pid, 9)
        with pytest.raises(CannotRender) as caught:
            await question
        remedied(caught.value, "the rendering process failed", "Ask again")
        assert await renderer.render(Render("fine", [], [], {})) == "fine"
    finally:
        await renderer.close()
