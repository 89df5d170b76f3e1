"""What docs/how-to/clients.md says of whole programs: their conversations with the port, through the proxy.

Open WebUI's are spoken here as version 0.12.4 speaks them (an aiohttp pool without limits, JSON announced on GETs too,
tool calls with numbers and ids of its own). Continue's command line is started where $CONTINUE_CLI names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from abliterated.proxy.server import Steering
from engine.running import Engine, engine
from engine.scripted_gguf import Model, Script, write
from proxy.script import Running, proxy

NAME = "reader-abliterated:1b"
CONTINUE = os.environ.get("CONTINUE_CLI", "")
# What it says is decided by the last of these words that was said to it, by whomever.
READER = Model(
    scripts=(
        Script(["<think>", "hm", "</think>", "Nothing", " to read."]),
        Script('<tool_call>\n{"name": "Read", "arguments": {"filepath": "notes.txt"}}\n</tool_call>', when="lampfile"),
        Script("It says glimmer.", when="glimmer"),
    ),
    words=("lampfile", "glimmer"),
    context_length=65536,
)
READ = {
    "type": "function",
    "function": {
        "name": "Read",
        "description": "Read a file",
        "parameters": {"type": "object", "properties": {"filepath": {"type": "string"}}, "required": ["filepath"]},
    },
}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("reader")
    with engine(folder / "models") as running:
        path = write(folder / "reader.gguf", READER)
        running.create(NAME, path, parameters={"temperature": 0, "num_ctx": READER.context_length})
        yield running


@pytest.fixture(scope="module")
def front(behind: Engine) -> Iterator[Running]:
    with proxy(behind.url, steering=Steering(observe=True)) as running:
        yield running


@contextlib.asynccontextmanager
async def webui(front: Running) -> Any:
    """Its pool: no limit, nothing accepted in particular, JSON announced whatever is sent."""
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=300)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        f"http://{front.address}", connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=60)
    ) as session:
        yield session


async def test_open_webui_lists_what_is_there_and_what_is_loaded(front: Running) -> None:
    async with webui(front) as session:
        async with session.get("/api/version") as answer:
            assert (await answer.json())["version"]
        async with session.get("/api/tags") as answer:
            (listed,) = (await answer.json())["models"]
        assert listed["model"] == listed["name"] == NAME
        async with session.post("/api/show", data=json.dumps({"name": NAME, "model": NAME})) as answer:
            shown = await answer.json()
        assert {"completion", "tools", "thinking"} <= set(shown["capabilities"])
        body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "stream": False, "options": {}}
        async with session.post("/api/chat", data=json.dumps(body)) as answer:
            assert (await answer.json())["message"]["content"] == "Nothing to read."
        async with session.get("/api/ps") as answer:
            (loaded,) = (await answer.json())["models"]
        assert loaded["model"] == NAME
        # It shows until when a model stays, and reads the time with Python's own hand.
        assert datetime.datetime.fromisoformat(loaded["expires_at"]).timestamp() > 0
        unload = json.dumps({"model": NAME, "keep_alive": 0, "prompt": ""})
        async with session.post("/api/generate", data=unload) as answer:
            assert (await answer.json())["done"]
        async with asyncio.timeout(60):
            while loaded:
                async with session.get("/api/ps") as answer:
                    loaded = (await answer.json())["models"]


async def spoken(session: aiohttp.ClientSession, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One streamed turn, read as it reads them: line by line; the pieces put together."""
    body = {"model": NAME, "messages": messages, "stream": True, "options": {"num_predict": 64}, **more}
    whole: dict[str, Any] = {"content": "", "thinking": "", "tool_calls": []}
    async with session.post("/api/chat", data=json.dumps(body)) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "application/x-ndjson"
        async for line in answer.content:
            piece = json.loads(line)
            message = piece["message"]
            whole["content"] += message.get("content") or ""
            whole["thinking"] += message.get("thinking") or ""
            whole["tool_calls"] += message.get("tool_calls") or []
            whole["done"] = piece["done"]
    assert whole.pop("done")
    return whole


async def test_open_webui_streams_thinks_and_calls_a_tool(front: Running) -> None:
    async with webui(front) as session:
        said = await spoken(session, [{"role": "user", "content": "hello"}], think=True, keep_alive="5m")
        assert (said["thinking"].strip(), said["content"].strip()) == ("hm", "Nothing to read.")

        asked = {"role": "user", "content": "what is in the lampfile"}
        said = await spoken(session, [asked], tools=[READ])
        (call,) = said["tool_calls"]
        assert call["function"] == {**call["function"], "name": "Read", "arguments": {"filepath": "notes.txt"}}
        # Its history: the call with a number and an id of its own, the result without the tool's name.
        again = {"index": 0, "id": "call_1", "function": {"name": "Read", "arguments": {"filepath": "notes.txt"}}}
        history = [
            asked,
            {"role": "assistant", "thinking": "hm", "content": "", "tool_calls": [again]},
            {"role": "tool", "content": "all that glimmer", "tool_call_id": "call_1"},
        ]
        assert (await spoken(session, history, tools=[READ]))["content"] == "It says glimmer."


async def test_open_webui_is_told_in_one_line_what_is_not_there(front: Running) -> None:
    body = {"model": "qwen3-abliterated:8b", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    async with webui(front) as session, session.post("/api/chat", data=json.dumps(body)) as answer:
        assert answer.status == 404
        assert "abliterate submit qwen3:8b" in (await answer.json())["error"]


@pytest.mark.skipif(not CONTINUE, reason="no Continue here: npm install @continuedev/cli, then CONTINUE_CLI=…/.bin/cn")
def test_continue_reads_a_file_with_its_own_tool_and_answers(front: Running, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("all that glimmer\n")
    settings = {
        "name": "here",
        "version": "1.0.0",
        "schema": "v1",
        "models": [
            {
                "name": "reader",
                "provider": "ollama",
                "model": NAME,
                "apiBase": f"http://{front.address}",
                "roles": ["chat"],
                "capabilities": ["tool_use"],
            }
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    done = subprocess.run(
        [CONTINUE, "--config", "config.yaml", "-p", "what is in the lampfile"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "CONTINUE_TELEMETRY_ENABLED": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "It says glimmer.", done.stderr
    assert f'model="{NAME}",status="200"}} 2' in front.proxy.tally.text(), "two turns: the call, and what came of it"
