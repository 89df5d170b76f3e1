"""The route that gives a job's report, over a real socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector, web

from abliterate.contract.errors import NotFound
from abliterate.contract.messages import JobView
from abliterated.control.events import Events
from abliterated.control.server import Control


class Desk:
    """Knows one job, and where its reports lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def job(self, part: str) -> JobView:
        if part != "abcd":
            raise NotFound(f"no job {part}", remedy="`abliterate status` lists them")
        return JobView(id="abcd", label="l", model="m", target="t", state="running")

    def report_file(self, job_id: str, name: str) -> Path:
        return self.folder / name


async def ask(folder: Path, path: str) -> tuple[int, str, bytes, dict[str, Any]]:
    desk: Any = Desk(folder)
    runner = web.AppRunner(Control(desk, Events()).application())
    await runner.setup()
    try:
        await web.UnixSite(runner, str(folder / "s")).start()
        async with (
            ClientSession(connector=UnixConnector(str(folder / "s"))) as session,
            session.get(f"http://daemon{path}") as answer,
        ):
            return answer.status, answer.content_type, await answer.read(), dict(answer.headers)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("query", "kind", "body"),
    [
        ("", "application/json", b'{"version": 2}'),
        ("?format=json", "application/json", b'{"version": 2}'),
        ("?format=html", "text/html", b"<!doctype html>"),
    ],
)
async def test_a_report_comes_as_json_or_as_a_page(tmp_path: Path, query: str, kind: str, body: bytes) -> None:
    (tmp_path / "report.json").write_bytes(b'{"version": 2}')
    (tmp_path / "report.html").write_bytes(b"<!doctype html>")
    status, told, content, headers = await ask(tmp_path, f"/v1/jobs/abcd/report{query}")
    assert (status, told, content) == (200, kind, body)
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v1/jobs/abcd/report", 404, b"has no report: it is running"),
        ("/v1/jobs/zzzz/report", 404, b"no job zzzz"),
        ("/v1/jobs/abcd/report?format=../../recipe.toml", 400, b"is no format of a report"),
    ],
)
async def test_what_can_not_be_given_is_said(tmp_path: Path, path: str, status: int, said: bytes) -> None:
    found = await ask(tmp_path, path)
    assert found[0] == status
    assert said in found[2]
    assert b"remedy" in found[2]
