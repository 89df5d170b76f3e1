"""Requests no client of ours makes: each gets a clear refusal, over the socket and over TCP, and the daemon lives."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from abliterate.contract.errors import NotFound, RecipeError
from abliterate.contract.messages import Cleaned, EngineView, JobView, Submit, Submitted
from abliterate.contract.recipe import parse_recipe
from abliterated.app import control_listener
from abliterated.control.events import Events
from abliterated.control.guard import listen_address, token
from abliterated.control.server import Control
from abliterated.control.tcp import serve_tcp
from engines import free_port

HUGE = b"x" * (300 * 1024)


class Nobody:
    """A desk without jobs."""

    paused = draining = False

    async def jobs(self) -> list[JobView]:
        return []

    async def job(self, part: str) -> JobView:
        raise NotFound(f"no job {part!r}", remedy="look")

    async def act(self, verb: str, job_id: str, actor: str) -> JobView:
        raise NotFound("no", remedy="look")

    async def pause(self, paused: bool) -> None: ...

    async def drain(self) -> None: ...

    async def clean(self, days: float | None) -> Cleaned:
        return Cleaned(jobs=0, bytes=0)

    async def submit(self, wanted: Submit, actor: str) -> Submitted:
        if wanted.id:
            raise RecipeError("no job id", remedy="leave it out")
        parse_recipe(wanted.recipe.encode("utf-8", "surrogatepass"))
        return Submitted(id="x")

    async def replay(self, after: int) -> list[tuple[int, JobView]]:
        return []

    async def engine(self) -> EngineView:
        return EngineView(kind="ollama", url="")

    def log_file(self, job_id: str) -> Path:
        return Path("/nowhere")

    def report_file(self, job_id: str, name: str) -> Path:
        return Path("/nowhere")

    def proxy_address(self) -> str:
        return ""

    def proxy_numbers(self) -> dict[str, float]:
        return {}

    def proxy_text(self) -> str:
        return ""


def http(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    told = {"Host": "localhost", "Connection": "close", **{k.replace("_", "-"): v for k, v in headers.items()}}
    if body and "Transfer-Encoding" not in told:
        told.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def submit(**fields: object) -> bytes:
    return http("POST", "/v1/jobs", json.dumps(fields).encode(), Content_Type="application/json")


HOSTILE: dict[str, bytes] = {
    "no JSON": http("POST", "/v1/jobs", b"{"),
    "a list": http("POST", "/v1/jobs", b"[]"),
    "a number": http("POST", "/v1/jobs", b"1e999"),
    "no body": http("POST", "/v1/jobs"),
    "recipe no string": submit(recipe=1),
    "recipe no recipe": submit(recipe="rm -rf"),
    "recipe too long": submit(recipe="#" * 70_000),
    "recipe of keys": submit(recipe="a." * 30_000 + "b=1"),
    "recipe of brackets": submit(recipe="a=" + "[" * 60_000),
    "recipe with a zero": submit(recipe='model="a\0b"'),
    "id a path": submit(recipe='model="ollama:m"', id="../../etc/passwd"),
    "id upper case": submit(recipe='model="ollama:m"', id="A" * 26),
    "body too large": http("POST", "/v1/jobs", HUGE),
    "deep JSON": http("POST", "/v1/jobs", b'{"recipe":' + b"[" * 100_000),
    "lone surrogate": http("POST", "/v1/jobs", b'{"recipe": "\\ud800"}'),
    "job a path": http("GET", "/v1/jobs/..%2f..%2fetc%2fpasswd"),
    "job with dots": http("GET", "/v1/jobs/../../etc/passwd"),
    "job a wildcard": http("GET", "/v1/jobs/%25%25%25%25"),
    "job of escapes": http("GET", "/v1/jobs/%1b%5b2J%0d%0aX:y"),
    "job very long": http("GET", "/v1/jobs/" + "a" * 7000),
    "no such verb": http("POST", "/v1/jobs/abcd/delete"),
    "no such path": http("GET", "/v2/status"),
    "log of none": http("GET", "/v1/jobs/abcd/log?offset=-1"),
    "wrong method": http("DELETE", "/v1/jobs"),
    "post to status": http("POST", "/v1/status", b"{}"),
    "queue verb": http("POST", "/v1/queue/shutdown"),
    "clean for ever": http("POST", "/v1/clean", b'{"days": -1}'),
    "clean of text": http("POST", "/v1/clean", b'{"days": "all"}'),
    "trace": http("TRACE", "/v1/status"),
    "connect": http("CONNECT", "example.org:443"),
    "header too long": http("GET", "/v1/status", X="y" * 20_000),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "two lengths": b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": http("POST", "/v1/jobs", b"0\r\n\r\n", Content_Length="5", Transfer_Encoding="chunked"),
    "negative length": http("POST", "/v1/jobs", Content_Length="-1"),
}


async def ask(where: str | tuple[str, int], request: bytes) -> int:
    """The status of the answer."""
    if isinstance(where, str):
        reader, writer = await asyncio.open_unix_connection(where)
    else:
        reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(request)
        async with asyncio.timeout(60):
            line = await reader.readline()
    finally:
        writer.close()
    return int(line.split()[1])


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[str]:
    made = Control(Nobody(), Events())
    runner = web.AppRunner(made.application(), access_log=None)
    await runner.setup()
    path = tmp_path / "c.sock"
    await web.SockSite(runner, control_listener(path)).start()
    yield str(path)
    await runner.cleanup()


async def test_hostile_requests_are_refused_and_the_next_one_is_answered(control: str) -> None:
    assert len(HOSTILE) >= 30
    told = {name: await ask(control, request) for name, request in HOSTILE.items()}
    assert {name: code for name, code in told.items() if not 400 <= code < 500} == {}
    assert await ask(control, http("GET", "/v1/status")) == 200


async def test_the_socket_is_not_for_strangers(control: str) -> None:
    assert stat.S_IMODE(Path(control).stat().st_mode) == 0o660
    if os.geteuid() == 0:
        code = f"import os,socket; os.setgid(65534); os.setuid(65534); socket.socket(1).connect({control!r})"
        for folder in Path(control).parents:
            if str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "PermissionError" in told.stderr


@pytest.fixture
async def tcp(tmp_path: Path) -> AsyncIterator[tuple[int, str]]:
    port = free_port()
    runner = await serve_tcp(Control(Nobody(), Events()), f"127.0.0.1:{port}", tmp_path / "token")
    yield port, (tmp_path / "token").read_text()
    await runner.cleanup()


async def test_tcp_answers_to_its_token_alone_and_to_no_web_page(tcp: tuple[int, str]) -> None:
    port, secret = tcp
    host = f"127.0.0.1:{port}"
    good = {"Host": host, "Authorization": f"Bearer {secret}"}

    async def code(method: str = "GET", path: str = "/v1/status", body: bytes = b"", **headers: str) -> int:
        return await ask(("127.0.0.1", port), http(method, path, body, **headers))

    assert await code(**good) == 200
    assert await code(**good | {"Host": f"localhost:{port}"}) == 200
    assert await code(Host=host) == 401
    for wrong in ("", "Bearer", "Bearer x", f"Basic {secret}", f"Bearer {secret}x", f"Bearer {secret[:-1]}"):
        assert await code(**good | {"Authorization": wrong}) == 401, wrong
    for name in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1.evil.example:{port}",
        f"0.0.0.0:{port}",
    ):
        assert await code(**good | {"Host": name}) == 403, name
    for origin in ("https://evil.example", f"http://{host}", "null"):
        assert await code(**good, Origin=origin) == 403
    assert await code(**good, Sec_Fetch_Site="cross-site") == 403
    body = b'{"recipe": "model = \\"ollama:m\\""}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert await code("POST", "/v1/jobs", body, **good, Content_Type=kind) == 415
    assert await code("POST", "/v1/jobs", body, **good, Content_Type="application/json") == 201
    assert await code("OPTIONS", "/v1/jobs", **good, Access_Control_Request_Method="POST") in (405, 415)
    for name, request in HOSTILE.items():
        told = await ask(("127.0.0.1", port), request)
        assert 400 <= told < 500, name


def test_the_token_is_readable_by_us_alone_from_the_first_moment_and_is_kept(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = token(tmp_path / "t")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600
    assert len(first) >= 43
    assert token(tmp_path / "t") == first
    (tmp_path / "t").chmod(0o640)
    with pytest.raises(RecipeError, match="others may read it"):
        token(tmp_path / "t")


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "192.168.1.1:9", "example.org:80", "127.0.0.1:11434", ":x", "127.0.0.1:0"]
)
def test_control_listens_on_loopback_and_never_on_ollama_s_port(listen: str) -> None:
    with pytest.raises(RecipeError):
        listen_address(listen)
    assert listen_address("[::1]:7000") == ("::1", 7000)
