"""Errors of the daemon's rooms that hardly anybody meets: each is provoked, and each names the next step."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from abliterate.contract.errors import (
    AbliteratedError,
    AlreadyRunning,
    DiskError,
    EngineRefused,
    EngineUnavailable,
    ModelError,
    NotFound,
    RecipeError,
)
from abliterate.contract.messages import Failure, JobView, Task
from abliterate.contract.recipe import Recipe
from abliterated import app, engine_process, refuser
from abliterated.control import tcp
from abliterated.control.care import routes as care_routes
from abliterated.control.events import Events
from abliterated.control.guard import token
from abliterated.control.server import Control
from abliterated.daemon_lock import refuse_if_taken
from abliterated.demo import asking, loading, places, story
from abliterated.engine_process import EngineProcess
from abliterated.install import facts, machine, plan
from abliterated.jobs.journal import Journal
from abliterated.jobs.registrations import _told
from abliterated.jobs.runner import start_worker
from abliterated.report.redraw import redraw
from client.fake_daemon import FakeDaemon
from report.samples import least


def remedied(error: AbliteratedError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert error.remedy


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file where a folder is wanted."""
    path = tmp_path / "file"
    path.write_text("")
    return path


def test_a_home_that_can_not_be_locked_and_one_that_is(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        app.take_daemon_lock(file / "daemon.lock")
    remedied(caught.value, "can't be locked")
    lock = app.take_daemon_lock(tmp_path / "daemon.lock")
    try:
        with pytest.raises(AlreadyRunning) as taken:
            refuse_if_taken(tmp_path / "daemon.lock")
        remedied(taken.value, "serves this home already", "paths.state")
    finally:
        lock.release()


def test_a_socket_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        app.control_listener(tmp_path / ("long" * 40) / "control.sock")
    remedied(caught.value, "shorter path")


async def test_a_port_and_a_token_that_can_not_be_had(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        token(file / "control.token")
    remedied(caught.value, "no token can be kept")
    nobody: Any = None
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(AlreadyRunning) as taken:
        await tcp.serve_tcp(
            Control(nobody, Events(), []), f"127.0.0.1:{other.getsockname()[1]}", tmp_path / "control.token"
        )
    remedied(taken.value, "another port")


def test_a_journal_that_knows_no_such_job(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite3")
    try:
        with pytest.raises(NotFound) as caught:
            journal.get("01j8zq3v5k7m9n1p3r5t7v9x00")
        remedied(caught.value, "abliterate status")
    finally:
        journal.close()


def test_a_disk_that_takes_no_registration(tmp_path: Path) -> None:
    remedied(_told(OSError(errno.ENOSPC, "No space left on device"), tmp_path), "No space left", "Free some space")
    with pytest.raises(PermissionError):
        _told(PermissionError(errno.EACCES, "denied"), tmp_path)


async def test_a_worker_without_a_folder_or_a_python(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(recipe=Recipe(model="m.gguf"), base="m.gguf", base_digest="", source="", work="", output="")
    with pytest.raises(DiskError) as caught:
        await start_worker(task, file / "job")
    remedied(caught.value, "can't be written")
    monkeypatch.setattr("abliterated.jobs.runner.sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(DiskError) as none:
        await start_worker(task, tmp_path)
    remedied(none.value, "no worker could be started")


def test_a_report_that_can_not_be_drawn_anew(tmp_path: Path) -> None:
    import msgspec

    (tmp_path / "report.json").write_bytes(msgspec.json.encode(least()))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DiskError) as caught:
        redraw(tmp_path)
    remedied(caught.value, "report.html")


def test_an_installation_that_lacks_its_files_or_its_rights(file: Path) -> None:
    with pytest.raises(NotFound) as caught:
        facts.shared("nothing-we-ship")
    remedied(caught.value, "Install abliterated anew")
    steps = [plan.Write(file / "unit", "text", "unit")]
    with pytest.raises(machine.InstallError) as failed:
        machine.carry_out(steps, machine.ThisMachine(), lambda _: None)
    remedied(failed.value, "Are you root?")


def test_a_demo_whose_model_or_folder_is_gone(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        refuser.read_questions(tmp_path / "none.jsonl")
    remedied(caught.value, "Install abliterated again")

    async def brought(url: str) -> str:
        return url

    monkeypatch.setattr(loading, "bring", brought)
    monkeypatch.setattr(loading, "engine", lambda config: "http://127.0.0.1:9")
    with pytest.raises(DiskError) as kept:
        loading.load_demo(file / "refuser.toml", None)
    remedied(kept.value, "another folder")


def test_a_demo_whose_engine_is_silent_or_says_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "START_SECONDS", 0.05)
    with pytest.raises(EngineUnavailable) as silent:
        places._wait_for("http://127.0.0.1:9/", tmp_path)
    remedied(silent.value, "nothing answers")
    with pytest.raises(EngineRefused) as refused:
        asking.ask("http://127.0.0.1:9", "m", refuser.held_out()[:1], lambda _: None)
    remedied(refused.value, "engine's log")


def test_a_demo_whose_job_never_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from abliterated.demo.telling import Teller

    here = places.Place(tmp_path, tmp_path, tmp_path / "none.sock", tmp_path, "http://127.0.0.1:9", "", "embedded")
    monkeypatch.setattr(story, "JOB_SECONDS", 0.05)
    with pytest.raises(ModelError) as caught:
        story.follow(here, "01j8zq3v5k7m9n1p3r5t7v9x00", Teller())
    remedied(caught.value, "quieter machine")


def test_a_demo_whose_job_fails_shows_its_log_and_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterated.demo.telling import Teller

    job_id = "01j8zq3v5k7m9n1p3r5t7v9x00"
    monkeypatch.setattr(story, "new_id", lambda: job_id)
    (tmp_path / "incoming").mkdir()
    log = tmp_path / "state" / "jobs" / job_id / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("what the worker said\n")
    daemon = FakeDaemon(tmp_path / "control.sock").start()
    failure = Failure(failure="oom-host", message="no memory was left", remedy="Close something")
    daemon.put(JobView(id=job_id, label="refuser", model="m", target="m-abliterated", state="failed", failure=failure))
    here = places.Place(tmp_path, tmp_path, daemon.path, tmp_path / "incoming", "http://127.0.0.1:9", "", "embedded")
    try:
        with pytest.raises(ModelError) as caught:
            story._run_job(here, refuser.files(), story.Clock(), Teller())
    finally:
        daemon.stop()
    remedied(caught.value, "the job ended failed: no memory was left", "Close something")
    assert "what the worker said" in capsys.readouterr().err


async def test_a_request_about_a_model_that_is_not_understood() -> None:
    nobody: Any = None
    care: Any = SimpleNamespace(doctor=None)  # is never asked
    async with TestClient(TestServer(Control(nobody, Events(), care_routes(care)).application())) as client:
        for body in (b"{", b'{"model": 7}', b"[]"):
            answer = await client.post("/v1/doctor", data=body, headers={"Content-Type": "application/json"})
            told = await answer.json()
            assert answer.status == 400, told
            assert told["error"].startswith("not understood: ") and told["remedy"] == 'Send {"model": "NAME"}'


async def test_an_embedded_engine_whose_port_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "PORT_PATIENCE", 0.0)

    async def ready() -> None: ...

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        engine = EngineProcess(f"http://127.0.0.1:{port}", tmp_path / "models", tmp_path / "engine.log", ready)
        with pytest.raises(AlreadyRunning) as caught:
            await asyncio.wait_for(engine.run(), 60)
    remedied(caught.value, f"127.0.0.1:{port}: taken by another program", "proxy.upstream", 'engine.kind = "ollama"')
