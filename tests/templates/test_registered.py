"""Through registration, tools survive: what the base does the new model does, and one without a base does them too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import resolve_base
from abliterated.ollama.register import register
from abliterated.templates.go import go_template_for
from engine.scripted_gguf import write
from engines import Engine, engine_parameters, require
from templates.families import own_families, scripted
from templates.matrix import YES, ask_all, cells, create

HERMES = next(family for family in own_families() if family.name == "hermes-json")
CONTENT = "abliterated.content"


def product(folder: Path) -> Path:
    """The base's twin, with the key that says whose it is."""
    model = replace(scripted(HERMES), extra={CONTENT: "f" * 64})
    return write(folder / "product.gguf", model)


@pytest.mark.parametrize("engine", engine_parameters())
async def test_the_new_model_does_what_its_base_does(engine: Engine, tmp_path: Path) -> None:
    with (
        require(engine).start() as running,
        httpx.Client(base_url=running.base_url, trust_env=False, timeout=150) as http,
    ):
        old = engine.version is not None and engine.version < (0, 30, 0)
        fields: dict[str, Any] = {"template": go_template_for(HERMES.jinja)} if old else {}
        create(http, "base:1b", write(tmp_path / "base.gguf", scripted(HERMES)), **fields)
        async with OllamaClient(running.base_url) as client:
            base = await resolve_base(client, "base:1b")
            done = await register(client, product(tmp_path), "base-abliterated:1b", base)
        assert "tools" in done.capabilities
        dialects = ("/api/chat", "/v1/chat/completions")
        before, after = (cells(ask_all(http, name, dialects)) for name in ("base:1b", "base-abliterated:1b"))
        assert after == before
        assert before["two results rendered"]["cell"] == YES


@pytest.mark.parametrize("engine", engine_parameters())
async def test_a_model_without_a_base_brings_its_own_template(engine: Engine, tmp_path: Path) -> None:
    """As from Hugging Face: the GGUF alone; before 0.30 with the Go template that says what its Jinja says."""
    with (
        require(engine).start() as running,
        httpx.Client(base_url=running.base_url, trust_env=False, timeout=150) as http,
    ):
        async with OllamaClient(running.base_url) as client:
            done = await register(client, product(tmp_path), "hermes-abliterated")
        assert "tools" in done.capabilities, done.notes
        # The same again but for one thread, for two that spin cost more than they bring on a busy machine.
        quiet = {"num_thread": 1, "num_ctx": 4096, "temperature": 0, "num_predict": 200}
        body = {"model": "quiet", "from": "hermes-abliterated", "parameters": quiet, "stream": False}
        assert http.post("/api/create", json=body).json() == {"status": "success"}
        found = cells(ask_all(http, "quiet", ("/api/chat",), skipped={"thinking split"}))
        assert {cell["cell"] for cell in found.values()} == {YES}, found
