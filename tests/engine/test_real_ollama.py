"""One folder, two servers: what we wrote a real Ollama opens, and what it wrote we serve."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from engine.running import Engine, blobs, digest, engine, until
from engines import engine_parameters, free_port, require

pytestmark = pytest.mark.real_ollama

GIVEN: dict[str, Any] = {
    "template": '{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ .Prompt }} "x"',
    "system": "Be brief.\nAnd kind.",
    "parameters": {"temperature": 0, "stop": ["<|im_end|>", "<|im_start|>"], "num_ctx": 2048},
    "license": "A licence\nof two lines",
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
}


@pytest.fixture(params=[given for given in engine_parameters() if not given.values[0].embedded])
def binary(request: pytest.FixtureRequest) -> Path:
    """Each real Ollama that can be had; the test skips with the reason where one can't."""
    found = require(request.param).binary
    assert found is not None
    return found


@contextmanager
def real_ollama(binary: Path, models: Path) -> Iterator[ollama.Client]:
    port = free_port()
    environment = {
        **os.environ,
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(models),
        "HOME": str(models.parent),
    }
    process = subprocess.Popen(
        [str(binary), "serve"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    client = ollama.Client(host=f"http://127.0.0.1:{port}")

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "Ollama is running"
        except httpx.TransportError:
            return False

    try:
        until(answers, 120)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def told(client: ollama.Client, name: str) -> dict[str, Any]:
    shown = client.show(name)
    commands = sorted(line for line in (shown.modelfile or "").splitlines() if not line.startswith("#"))
    return {
        "template": shown.template,
        "license": shown.license,
        "parameters": sorted((shown.parameters or "").splitlines()),
        "modelfile": commands,
        "family": shown.details.family if shown.details else "",
        "size": shown.details.parameter_size if shown.details else "",
        "architecture": (shown.modelinfo or {}).get("general.architecture"),
        "parameter_count": (shown.modelinfo or {}).get("general.parameter_count"),
        "digests": [(model.model, model.digest, model.size) for model in client.list().models],
    }


def test_a_real_ollama_tells_of_our_models_what_we_tell(binary: Path, tmp_path: Path, ggufs: dict[str, Path]) -> None:
    models = tmp_path / "models"
    with engine(models) as ours:
        ours.create("foo:1b", ggufs["plain"], **GIVEN)
        here = told(ours.ollama, "foo:1b")
    with real_ollama(binary, models) as client:
        there = told(client, "foo:1b")
    assert there == here


def test_what_a_real_ollama_created_we_tell_and_serve(binary: Path, tmp_path: Path, ggufs: dict[str, Path]) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with real_ollama(binary, models) as client:
        client.create_blob(str(ggufs["plain"]))
        files = {"model.gguf": digest(ggufs["plain"])}
        *_, last = client.create(model="foo:1b", files=files, stream=True, **GIVEN)  # type: ignore[call-overload]
        assert last.status == "success"
        there = told(client, "foo:1b")
    manifest = json.loads((models / "manifests/registry.ollama.ai/library/foo/1b").read_bytes())
    needed = {layer["digest"].replace(":", "-") for layer in [manifest["config"], *manifest["layers"]]}
    with engine(models) as ours:
        assert told(ours.ollama, "foo:1b") == there
        answer = ours.ollama.chat("foo:1b", [{"role": "user", "content": "hi"}])
        assert answer.message.content == "a plain answer, nothing more"
        ours.ollama.delete("foo:1b")
    assert needed and not needed & blobs(models)  # a newer Ollama leaves blobs no manifest knows: not ours to judge yet


def test_wrong_requests_get_the_same_status(binary: Path, shared: Engine, tmp_path: Path) -> None:
    """Where both answer without a model: the statuses of refusals, and the words a client may look for."""
    (tmp_path / "models").mkdir()
    requests: list[tuple[str, str, Any]] = [
        ("POST", "/api/show", {"model": "nothing"}),
        ("POST", "/api/chat", {"model": "nothing"}),
        ("POST", "/api/generate", {"model": "nothing"}),
        ("DELETE", "/api/delete", {"model": "nothing"}),
        ("POST", "/api/copy", {"source": "nothing", "destination": "x"}),
        ("POST", "/api/create", {"model": "a b", "from": "x"}),
        ("HEAD", "/api/blobs/sha256:" + "0" * 64, None),
        ("HEAD", "/api/blobs/nonsense", None),
        ("POST", "/api/blobs/sha256:" + "0" * 64, "some bytes"),
        ("POST", "/v1/chat/completions", {"model": "nothing", "messages": [{"role": "user", "content": "x"}]}),
        ("POST", "/v1/chat/completions", {"model": "plain", "messages": []}),
        ("GET", "/v1/models/nothing", None),
        ("GET", "/nowhere", None),
        ("GET", "/api/chat", None),
        ("HEAD", "/api/ps", None),
        ("POST", "/api/chat", b"{nonsense"),
        ("POST", "/api/chat", b""),
    ]
    different = []
    with real_ollama(binary, tmp_path / "models") as client:
        real = httpx.Client(base_url=str(client._client.base_url), timeout=60)
        with real:
            for method, path, body in requests:
                content: dict[str, Any] = {"json": body} if isinstance(body, dict) else {"content": body}
                here, there = (http.request(method, path, **content) for http in (shared.http, real))
                if (here.status_code, _shape(here)) != (there.status_code, _shape(there)):
                    different.append((method, path, body, here.status_code, there.status_code, here.text, there.text))
    assert not different, "\n".join(map(str, different))


def _shape(response: httpx.Response) -> Any:
    """The kind of an answer: the keys of a JSON object, or the text."""
    try:
        answer = response.json()
    except ValueError:
        return response.text
    error = answer.get("error")
    return sorted(answer), sorted(error) if isinstance(error, dict) else type(error).__name__
