"""Before a job takes the device: those who are answered are waited for, what is loaded goes, and comes back where it
was to stay; an engine on another host keeps what it has, and none of our files is looked at there."""

from __future__ import annotations

import asyncio
import datetime
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from abliterated.handover import Handover
from abliterated.ollama.admission import admit
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import describe_base
from abliterated.ollama.place import on_this_machine
from abliterated.ollama.politeness import Evicted, make_room, restore, used_megabytes
from fake_ollama import FakeOllama, reset, tiny_gguf

SOON = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)).isoformat()
FOR_EVER = "2318-10-30T10:27:57.29+02:00"
KEYS = {"general.architecture": "llama", "tokenizer.chat_template": "{% for %}"}


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("base:8b", tiny_gguf(tmp_path / "base.gguf", KEYS), template="{{ .Tools }}")
        engine.loaded = {"base:8b": {"expires_at": SOON}, "pinned:1": {"expires_at": FOR_EVER}}
        yield engine


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(fake.url) as opened:
        yield opened


async def test_everything_loaded_goes_and_only_the_pinned_comes_back(fake: FakeOllama, client: OllamaClient) -> None:
    evicted = await make_room(client, used=lambda: None)
    assert sorted(evicted, key=lambda one: one.name) == [Evicted("base:8b"), Evicted("pinned:1", pinned=True)]
    assert fake.loaded == {}
    await restore(client, evicted)
    assert fake.loaded == {"pinned:1": {"keep_alive": -1}}


async def test_requests_under_way_are_waited_for_but_not_for_ever(fake: FakeOllama, client: OllamaClient) -> None:
    answering = [True, True, False]
    await make_room(client, busy=lambda: answering.pop(0), used=lambda: None)
    assert answering == [] and fake.loaded == {}
    fake.loaded = {"base:8b": {"expires_at": SOON}}
    await asyncio.wait_for(make_room(client, busy=lambda: True, used=lambda: None, patience=0.3), 60)
    assert fake.loaded == {}


async def test_it_goes_on_when_the_memory_has_stopped_falling(client: OllamaClient) -> None:
    readings = [9000, 7000, 400, 400, 400]
    await asyncio.wait_for(make_room(client, used=lambda: readings.pop(0)), 60)
    assert readings == []


async def test_an_engine_that_is_away_is_no_obstacle(fake: FakeOllama, client: OllamaClient) -> None:
    fake.faults["GET /api/ps"] = [reset] * 4
    assert await make_room(client) == []
    await restore(client, [Evicted("gone:1", pinned=True)])
    await fake.__aexit__()
    assert await make_room(client) == []
    await fake.__aenter__()


def test_the_memory_in_use_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert used_megabytes() is None
    shim = tmp_path / "nvidia-smi"
    shim.write_text("#!/bin/sh\necho 1200\necho 300\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert used_megabytes() == 1500


async def test_a_job_asks_for_room_and_gives_it_back(fake: FakeOllama) -> None:
    handover = Handover(fake.url, lambda: False)
    job: Any = SimpleNamespace(id="1")
    await handover.make_room("1")
    assert fake.loaded == {}
    await handover.release(job)
    await handover.release(job)
    assert fake.loaded == {"pinned:1": {"keep_alive": -1}}


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:11434", True),
        ("localhost:11434", True),
        ("http://[::1]:11434", True),
        ("http://0.0.0.0:11434", True),
        ("http://203.0.113.7:11434", False),
        ("http://gpu-box.lan:11434", False),
        ("https://ollama.com", False),
    ],
)
def test_whose_machine_an_address_is(url: str, here: bool) -> None:
    assert on_this_machine(url) is here


def test_every_address_of_this_machine_is_here() -> None:
    own = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family.name == "AF_INET"
    ]
    assert own and all(on_this_machine(f"http://{address}:1") for address in own)


async def test_an_engine_on_another_host_is_served_over_http_alone(fake: FakeOllama, tmp_path: Path) -> None:
    """The engine listens on an address of its own; its store is not readable here, and is not looked for."""
    out = tmp_path / "out"
    out.mkdir()
    product = tiny_gguf(out / "model.gguf", {**KEYS, "abliterated.content": "c0ffee"}, padding=100_000)
    fake.port = 0
    await fake.__aexit__()
    fake.host = "127.0.0.2"
    await fake.__aenter__()
    fake.elsewhere = "/somewhere/else/models/blobs"
    async with OllamaClient(fake.url, local=False) as client:
        base = await describe_base(client, "base:8b")
        assert not base.blob_path.exists()
        done = await admit(client, product, "base-abliterated:8b", base, reference="base:8b")
    assert not done.registration.linked and fake.requests.count("POST /api/blobs") == 1
    assert done.certificate.compared and product.stat().st_nlink == 1
    assert sorted(fake.models) == [
        "registry.ollama.ai/library/base-abliterated:8b",
        "registry.ollama.ai/library/base:8b",
    ]


async def test_a_store_here_of_another_engine_gets_no_blob(fake: FakeOllama, tmp_path: Path) -> None:
    """A container behind a loopback port: its path happens to exist here, but it is another folder."""
    out = tmp_path / "out"
    out.mkdir()
    product = tiny_gguf(out / "model.gguf", {**KEYS, "abliterated.content": "c0ffee"}, padding=100_000)
    twin = tmp_path / "twin" / "blobs"
    twin.mkdir(parents=True)
    for blob in fake.blobs.iterdir():
        (twin / blob.name).write_bytes(blob.read_bytes())
    before = {path.name for path in twin.iterdir()}
    fake.elsewhere = str(twin)
    async with OllamaClient(fake.url) as client:
        done = await admit(client, product, "base-abliterated:8b", await describe_base(client, "base:8b"))
    assert not done.registration.linked and {path.name for path in twin.iterdir()} == before


async def test_a_remote_engines_loaded_models_are_left_alone(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterated.ollama.client.on_this_machine", lambda url: False)
    await Handover(fake.url, lambda: False).make_room("1")
    assert set(fake.loaded) == {"base:8b", "pinned:1"}
