"""A worker whose model is at a hub: it alone may go online, before it takes the device, and the token stays with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from abliterate.contract.messages import Failure, Progress, Result, Task
from abliterate.contract.recipe import Recipe, recipe_from_table
from abliterated.jobs.runner import follow, secrets, start_worker, stop_worker, worker_environment
from pipeline.folders import planted_folder, table
from pipeline.hub_server import COMMIT, LocalHub, begun
from strangers import crowding

TOKEN = "hf_thisIsASecretOfTheTests1234"
WEIGHTS = (8).to_bytes(8, "little") + b"{}      " + bytes(200_000)


def task_for(root: Path, model: str, source: str = "") -> Task:
    for name in ("work", "out"):
        (root / name).mkdir(exist_ok=True)
    return Task(
        recipe=Recipe(model=model),
        base=model,
        source=source,
        work=str(root / "work"),
        output=str(root / "out"),
        job="j1",
        lock=str(root / "device.lock"),
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with LocalHub(files).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield running


def test_only_a_worker_that_must_fetch_sees_the_token_and_the_network(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "HF_TOKEN": TOKEN, "HF_HOME": "/h", "HTTPS_PROXY": "http://p", "SECRET": "x"}
    environ |= {"CREDENTIALS_DIRECTORY": "/run/c", "NOTIFY_SOCKET": "/run/n"}
    told = worker_environment(environ, task_for(tmp_path, "hf:org/model"))
    assert "HF_TOKEN" not in told, "it goes through a pipe"
    assert secrets(environ, task_for(tmp_path, "hf:org/model")) == msgspec.json.encode({"HF_TOKEN": TOKEN})
    assert "HF_HUB_OFFLINE" not in told
    assert not {"SECRET", "NOTIFY_SOCKET"} & set(told)
    for task in (task_for(tmp_path, "ollama:m", "/m.gguf"), task_for(tmp_path, "hf:org/model", "/here")):
        told = worker_environment(environ, task)
        assert told["HF_HUB_OFFLINE"] == "1"
        assert TOKEN not in told.values()
        assert not {"HF_TOKEN", "CREDENTIALS_DIRECTORY", "HTTPS_PROXY"} & set(told)
    assert worker_environment(environ | {"HF_HUB_OFFLINE": "1"}, task_for(tmp_path, "hf:o/m"))["HF_HUB_OFFLINE"] == "1"


async def test_the_model_is_fetched_while_another_holds_the_device(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "hf_token").write_text(TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    hub.faults.token = TOKEN
    seen: list[Progress] = []
    waits = asyncio.Event()

    def tell(event: Progress) -> None:
        seen.append(event)
        if "waits for the device" in event.message:
            waits.set()

    with FileLock(tmp_path / "device.lock"):
        worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
        following = asyncio.create_task(follow(worker, tell))
        await asyncio.wait_for(waits.wait(), 150)
        await stop_worker(worker)
        assert await asyncio.wait_for(following, 150) == 86
    fetch = [event for event in seen if event.stage == "fetch"]
    assert (fetch[-1].unit, fetch[-1].message) == ("bytes", "fetching org/model")
    assert fetch[-1].done == fetch[-1].total == sum(map(len, hub.files.values()))
    folder = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / COMMIT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    for path in (tmp_path / "log.txt", tmp_path / "task.json"):
        assert TOKEN not in path.read_text()
    assert TOKEN not in json.dumps([event.message for event in seen])


async def test_the_token_of_the_environment_goes_through_a_pipe_and_never_into_proc(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.token = TOKEN
    waits = asyncio.Event()
    with FileLock(tmp_path / "device.lock"):
        worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
        following = asyncio.create_task(follow(worker, lambda event: waits.set() if "waits" in event.message else None))
        await asyncio.wait_for(waits.wait(), 150)
        process = Path(f"/proc/{worker.pid}")
        if process.exists():
            assert TOKEN.encode() not in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        await stop_worker(worker)
        await asyncio.wait_for(following, 150)
    assert TOKEN not in (tmp_path / "log.txt").read_text()


async def test_a_model_of_a_hub_is_measured_edited_and_says_where_it_came_from(tmp_path: Path, hub: LocalHub) -> None:
    planted = planted_folder(tmp_path)
    hub.files = {path.name: path.read_bytes() for path in planted.path.iterdir()} | {"training.bin": b"pickle"}
    task = task_for(tmp_path, "hf:org/model@main")
    asked = table(planted, export={"format": "safetensors"}) | {"model": "hf:org/model@main"}
    recipe = recipe_from_table(asked)
    worker = await start_worker(msgspec.structs.replace(task, recipe=recipe), tmp_path)
    assert await asyncio.wait_for(follow(worker, lambda _: None), 400) == 0
    result = worker.word
    assert isinstance(result, Result)
    assert (result.metrics["refusal_before"], result.metrics["refusal_after"]) == (1.0, 0.0)
    assert result.seconds["fetch"] > 0
    made = tmp_path / "out" / result.product
    told = json.loads((made / "abliterated.json").read_text())
    assert told["abliterated.base.name"] == f"hf:org/model@{COMMIT}"
    assert told["abliterated.base.digest"] == f"git:{COMMIT}"
    assert (made / "LICENSE").read_bytes() == hub.files["LICENSE"]
    assert not hub.gets("training.bin")


def test_behind_the_fetch_the_process_is_offline_and_has_no_token() -> None:
    code = """
import os
from abliterated.pipeline.hub import go_offline
from abliterated.pipeline.hub_access import find_token
import huggingface_hub
go_offline()
assert not {"HF_TOKEN", "CREDENTIALS_DIRECTORY"} & set(os.environ) and not find_token(os.environ)
try:
    huggingface_hub.model_info("org/model", timeout=1)
except huggingface_hub.errors.OfflineModeIsEnabled:
    print("offline")
"""
    environ = {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": "/nowhere", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environ.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert (done.stdout, done.returncode) == ("offline\n", 0), done.stderr


async def test_a_refusal_is_of_the_class_auth_and_a_dead_hub_passes(tmp_path: Path, hub: LocalHub) -> None:
    async def word() -> Failure:
        worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
        await asyncio.wait_for(follow(worker, lambda _: None), 400)
        assert isinstance(worker.word, Failure)
        return worker.word

    hub.faults.gated = True
    told = await word()
    assert (told.failure, "gated" in told.message, "HF_TOKEN" in told.remedy) == ("auth", True, True)
    hub.stop()
    told = await word()
    assert (told.failure, "does not answer" in told.message) == ("timeout", True)


async def test_a_fetch_is_cancelled_in_the_middle(tmp_path: Path, hub: LocalHub) -> None:
    hub.faults.hold = threading.Event()
    worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
    following = asyncio.create_task(follow(worker, lambda _: None))
    assert await asyncio.to_thread(hub.streaming.wait, 150)
    await stop_worker(worker, patience=min(18, 8 * crowding()))  # the connection is open and silent
    assert await asyncio.wait_for(following, 150) == 86


async def test_a_killed_worker_s_bytes_are_not_fetched_again(tmp_path: Path, hub: LocalHub) -> None:
    hub.faults.hold = threading.Event()
    worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
    following = asyncio.create_task(follow(worker, lambda _: None))
    assert await asyncio.to_thread(hub.streaming.wait, 150)
    cache = tmp_path / "home" / "hub"
    deadline = time.monotonic() + 60
    while not (parts := begun(cache, 1000)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    assert await asyncio.wait_for(following, 150) == -9
    (kept,) = {path.stat().st_size for path in parts}
    hub.faults.hold.set()
    hub.faults.hold = None
    with FileLock(tmp_path / "device.lock"):
        waits = asyncio.Event()
        worker = await start_worker(task_for(tmp_path, "hf:org/model"), tmp_path)
        following = asyncio.create_task(follow(worker, lambda event: waits.set() if "waits" in event.message else None))
        await asyncio.wait_for(waits.wait(), 150)
        await stop_worker(worker)
        await asyncio.wait_for(following, 150)
    last = hub.gets("model.safetensors")[-1]
    assert (last.range, last.sent) == (f"bytes={kept}-", len(WEIGHTS) - kept)
