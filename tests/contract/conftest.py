"""One engine after the other, each started once, with the scripted models every test may read.

Tests that change something make and delete models of their own; nobody deletes these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import openai
import pytest

from contract.cases import LICENSE, PARAMETERS, SYSTEM, Blob, Create
from contract.differences import Expected, expected
from contract.scripted_model import (
    CHAT_TEMPLATE,
    GO_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    PLAIN_GO_TEMPLATE,
    write_scripted_model,
)
from engines import Engine, RunningEngine, engine_parameters, require


@pytest.fixture(scope="session", params=engine_parameters())
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    engine: Engine = require(request.param)
    folder = tmp_path_factory.mktemp(engine.id)
    with engine.start(folder / "models", log=folder / "engine.log") as started:
        yield started


@pytest.fixture(scope="session")
def expect(running: RunningEngine) -> Expected:
    return expected(running.engine)


@pytest.fixture(scope="session")
def http(running: RunningEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.base_url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def ollama_client(running: RunningEngine) -> Iterator[ollama.Client]:
    client = ollama.Client(host=running.base_url, trust_env=False, timeout=60)
    yield client
    client._client.close()


@pytest.fixture(scope="session")
def openai_client(running: RunningEngine) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as transport,
        openai.OpenAI(base_url=f"{running.base_url}/v1", api_key="-", http_client=transport, max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blob]:
    """`plain`: chat template without tools. `tools`: with. `bare`: no template. `unseen`: uploaded by no fixture.

    Different files, for on Ollama ≥ 0.30 two tags of one blob share a runner, and its way of chatting.
    """
    folder = tmp_path_factory.mktemp("gguf")
    templates = {"plain": PLAIN_CHAT_TEMPLATE, "tools": CHAT_TEMPLATE, "bare": "", "unseen": ""}
    blobs = {}
    for name, template in templates.items():
        path = write_scripted_model(folder / f"{name}.gguf", chat_template=template, name=name)
        blobs[name] = Blob(path, "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest())
    return blobs


@pytest.fixture(scope="session")
def uploaded(http: httpx.Client, files: dict[str, Blob]) -> dict[str, Blob]:
    """Each with a model of its own that stays: deleting the last model of a blob deletes the blob."""
    for name in ("plain", "tools", "bare"):
        blob = files[name]
        answer = http.post(f"/api/blobs/{blob.digest}", content=blob.path.read_bytes())
        assert answer.status_code in (200, 201), answer.text
        body = {"model": f"keeper:{name}", "files": {"model.gguf": blob.digest}, "stream": False}
        assert http.post("/api/create", json=body).json() == {"status": "success"}
    return files


@pytest.fixture(scope="session")
def create(http: httpx.Client) -> Create:
    """POST /api/create as a stream; the progress lines, the last of which must be `success`."""

    def make(model: str, **fields: Any) -> list[dict[str, Any]]:
        answer = http.post("/api/create", json={"model": model, **fields})
        assert answer.status_code == 200, answer.text
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines[-1] == {"status": "success"}, lines
        return lines

    return make


@pytest.fixture(scope="session")
def lamp(create: Create, uploaded: dict[str, Blob]) -> str:
    """Created with all that a registration copies; cannot do tools."""
    create(
        "lamp",
        files={"model.gguf": uploaded["plain"].digest},
        template=PLAIN_GO_TEMPLATE,
        parameters=PARAMETERS,
        system=SYSTEM,
        license=[LICENSE],
    )
    return "lamp"


@pytest.fixture(scope="session")
def jinja_lamp(create: Create, uploaded: dict[str, Blob]) -> str:
    """Created from a GGUF alone, whose own Jinja can do tools."""
    create("jinja-lamp", files={"model.gguf": uploaded["tools"].digest}, parameters=PARAMETERS)
    return "jinja-lamp"


@pytest.fixture(scope="session")
def tools_lamp(create: Create, uploaded: dict[str, Blob], expect: Expected) -> str:
    """Can do tools, by what this engine renders: the TEMPLATE layer of a GGUF without one, or the GGUF's own."""
    name = "bare" if expect.renders_go_template else "tools"
    files = {"model.gguf": uploaded[name].digest}
    create("tools-lamp", files=files, template=GO_TEMPLATE, parameters=PARAMETERS)
    return "tools-lamp"


@pytest.fixture
def scratch(http: httpx.Client) -> Iterator[str]:
    """A name free at the start, and given back at the end."""
    name = "scratch:test"
    yield name
    http.request("DELETE", "/api/delete", json={"model": name})
