"""doctor, repair, undo and models as people type them: through a daemon, and without one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from abliterate.caretext import diagnosis_text, models_table
from abliterate.contract.care import Diagnosis, Finding, ModelRow, Models
from abliterate.contract.ids import new_id
from abliterate.contract.messages import Result
from abliterate.contract.recipe import Recipe
from abliterated.jobs.journal import Journal
from e2e.daemons import BIN, House, house
from fake_ollama import FakeOllama, tiny_gguf

GO = "{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ .ToolCalls }}{{ end }}"
KEYS = {"general.architecture": "llama", "tokenizer.chat_template": "{% for t in tools %}{{ t }}{% endfor %}"}
OURS, THEIRS = "qwen3-abliterated:8b", "somebody/qwen3-uncensored:8b"


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("qwen3:8b", tiny_gguf(tmp_path / "base.gguf", KEYS), template=GO)
        engine.add(
            THEIRS, tiny_gguf(tmp_path / "theirs.gguf", {**KEYS, "x": "y"}), parameters={"stop": ["<tool_call>"]}
        )
        key = {"abliterated.content": "c0ffee", "abliterated.base.name": "ollama:qwen3:8b"}
        engine.add(OURS, tiny_gguf(tmp_path / "ours.gguf", {**KEYS, **key}), template=GO)
        engine.models["registry.ollama.ai/library/mine:1"] = {
            **engine.models[f"registry.ollama.ai/library/{OURS}"],
            "model": "mine:1",
        }
        yield engine


async def foreground(fake: FakeOllama, *arguments: str, code: int = 0) -> str:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "abliterated"), *arguments, "--url", fake.url],
            capture_output=True,
            text=True,
            timeout=150,
            env={**os.environ, "ABLITERATED_CONFIG": os.devnull},
        )

    told = await asyncio.to_thread(run)
    assert told.returncode == code, told.stdout + told.stderr
    return told.stdout + told.stderr


async def test_without_a_daemon(fake: FakeOllama) -> None:
    assert "stop strings cut tool calls" in await foreground(fake, "doctor", THEIRS, code=1)
    found = json.loads(await foreground(fake, "doctor", THEIRS, "--json", code=1))
    assert found["base"] == "qwen3:8b" and found["findings"][0]["level"] == "problem"
    assert "repaired from qwen3:8b" in await foreground(fake, "repair", THEIRS)
    assert "nothing that its manifest could mend" in await foreground(fake, "repair", THEIRS)
    await foreground(fake, "doctor", THEIRS)
    assert "as it was before" in await foreground(fake, "repair", THEIRS, "--back")
    assert "was not made by abliterated" in await foreground(fake, "undo", THEIRS, code=6)
    assert f"removed {OURS}; freed 0 B" in await foreground(fake, "undo", OURS)
    assert "no such model" in await foreground(fake, "doctor", "gone:1", code=7)
    assert f"{fake.url}: version 0.35.0" in await foreground(fake, "doctor")


async def test_a_base_of_another_kind_is_refused(fake: FakeOllama, tmp_path: Path) -> None:
    fake.add("gemma3:4b", tiny_gguf(tmp_path / "g.gguf", KEYS), template=GO)
    fake.models["registry.ollama.ai/library/gemma3:4b"]["show"] = {"model_info": {"general.architecture": "gemma3"}}
    before = dict(fake.models)
    assert "its template would not fit" in await foreground(fake, "repair", THEIRS, "--from", "gemma3:4b", code=6)
    assert fake.models == before


async def test_a_copy_is_never_written_over_other_weights(fake: FakeOllama, tmp_path: Path) -> None:
    fake.add("somebody/qwen3-uncensored-before-repair:8b", tiny_gguf(tmp_path / "g.gguf", {**KEYS, "z": "z"}))
    before = dict(fake.models)
    assert "holds other weights" in await foreground(fake, "repair", THEIRS, code=6)
    assert fake.models == before


@pytest.fixture
async def home(fake: FakeOllama) -> AsyncIterator[House]:
    """A daemon in front of the engine, whose journal knows one job that ended well."""
    with house() as made:
        made.upstream = urlsplit(fake.url).port or 0
        made.configure("ollama")
        made.state.mkdir()
        journal = Journal(made.state / "journal.sqlite3")
        job_id = new_id()
        journal.add(job_id, "night", Recipe(model="ollama:qwen3:8b"))
        for state in ("starting", "running", "registering", "succeeded"):
            journal.move(job_id, state, **({"result": CERTIFIED} if state == "succeeded" else {}))
        journal.close()
        await asyncio.to_thread(made.serve)
        yield made
        await asyncio.to_thread(made.stop)


CERTIFIED = Result(
    product="model.gguf",
    format="gguf",
    metrics={"refusal_before": 0.9, "refusal_after": 0.05},
    certification={
        "reference": "qwen3:8b",
        "compared": ["plain", "tools"],
        "answer": "seven",
        "differences": [{"what": "tools", "text": "differs", "diff": "-one\n+two", "failure": True}],
    },
)


async def ask(home: House, *arguments: str, code: int = 0) -> str:
    return await asyncio.to_thread(home.client, *arguments, code=code)


async def test_through_the_daemon(fake: FakeOllama, home: House) -> None:
    listed = await ask(home, "models")
    assert OURS in listed and "90% → 5%" in listed and "not measured" in listed and THEIRS not in listed
    assert json.loads(await ask(home, "models", "--json"))["others"] == 2
    assert "stop strings cut tool calls" in await ask(home, "doctor", THEIRS, code=1)
    assert "repaired from qwen3:8b" in await ask(home, "repair", THEIRS)
    assert "tools" in await ask(home, "doctor", THEIRS)
    assert "as it was before" in await ask(home, "repair", THEIRS, "--back")
    assert "abliterated" in await ask(home, "doctor", code=await code_of_the_disk(home))
    job = (await asyncio.to_thread(home.control.jobs))[0].id
    told = await ask(home, "status", job)
    assert "2 conversations as qwen3:8b" in told and "+two" in told


async def code_of_the_disk(home: House) -> int:
    import shutil

    return int(shutil.disk_usage(home.home).free < 2e9)


async def test_undo_through_the_daemon_knows_whose_name_it_is(fake: FakeOllama, home: House) -> None:
    await ask(home, "undo", THEIRS, code=6)
    await ask(home, "undo", "gone:1", code=7)
    await ask(home, "undo", "mine:1", code=6)
    assert "mine:1" in {model["model"] for model in fake.models.values()}
    assert "mine:1 hold them too" in await ask(home, "undo", OURS)
    assert "removed mine:1" in await ask(home, "undo", "mine:1", "--copy")
    assert {model["model"] for model in fake.models.values()} == {"qwen3:8b", THEIRS}


async def test_an_engine_that_is_away_is_said(fake: FakeOllama, home: House) -> None:
    await fake.__aexit__()
    assert "no engine answers" in await ask(home, "doctor", code=1)
    await ask(home, "doctor", THEIRS, code=75)
    await ask(home, "models", code=75)
    await fake.__aenter__()


def test_a_doctor_without_a_daemon_says_that(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "abliterate.cli", "--socket", str(tmp_path / "none.sock"), "doctor"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert told.returncode == 69 and "does not answer" in told.stdout


def test_what_a_terminal_would_obey_is_spelt_out() -> None:
    odd = Diagnosis(model="m\x1b[2J", findings=[Finding(key="x", level="note", text="a\x07b", remedy="c\x1bd")])
    table = models_table(Models(models=[ModelRow(name="n\x1b", base="b\x07", refusal_before=0.5)]))
    for text in (diagnosis_text(odd), table):
        assert text.replace("\n", "").isprintable()


async def test_a_job_on_a_gpu_asks_the_engine_for_room_and_leaves_it_as_it_was(
    fake: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU by name only: the worker fails soon after, and what had been loaded for ever is loaded again."""
    shims = tmp_path / "bin"
    shims.mkdir()
    shim = shims / "nvidia-smi"
    shim.write_text('#!/bin/sh\ncase "$*" in *uuid*) echo GPU-0000;; *) echo 300;; esac\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}{os.pathsep}{os.environ['PATH']}")
    fake.loaded = {"qwen3:8b": {"expires_at": "2318-01-01T00:00:00Z"}, OURS: {"expires_at": "2020-01-01T00:00:00Z"}}
    emptied = asyncio.Event()

    async def unload(request: web.Request) -> web.StreamResponse:
        answer = await fake.post_generate(request)
        if not fake.loaded:
            emptied.set()
        return answer

    fake.answers["/api/generate"] = unload
    with house() as made:
        made.upstream = urlsplit(fake.url).port or 0
        made.configure("ollama")
        await asyncio.to_thread(made.serve)
        job = await asyncio.to_thread(made.drop, b'model = "ollama:qwen3:8b"\nname = "new-abliterated"\n', "new")
        await asyncio.wait_for(emptied.wait(), 60)
        await asyncio.to_thread(made.ended, job)
        await asyncio.to_thread(made.until, lambda: set(fake.loaded) == {"qwen3:8b"}, "the pinned model")
        await asyncio.to_thread(made.stop)
    assert fake.loaded["qwen3:8b"] == {"keep_alive": -1}
