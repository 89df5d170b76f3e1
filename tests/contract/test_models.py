"""Models by name: created from a GGUF, shown, listed, copied, deleted; and a real layout on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from contract.cases import LICENSE, SYSTEM, Blob, Create
from contract.differences import Expected
from contract.scripted_model import CHAT_TEMPLATE, GO_TEMPLATE, PLAIN_GO_TEMPLATE
from engines import RunningEngine


def modelfile_lines(shown: dict[str, Any], keyword: str) -> list[str]:
    lines = shown["modelfile"].splitlines()
    return [line.removeprefix(f"{keyword} ") for line in lines if line.startswith(f"{keyword} ")]


def test_creation_reports_its_progress(create: Create, uploaded: dict[str, Blob], scratch: str) -> None:
    lines = create(scratch, files={"model.gguf": uploaded["plain"].digest}, template=PLAIN_GO_TEMPLATE)
    statuses = [line["status"] for line in lines]
    assert statuses[0] == "parsing GGUF"
    assert f"using existing layer {uploaded['plain'].digest}" in statuses
    assert statuses[-2:] == ["writing manifest", "success"]


def test_creation_without_a_stream_is_one_object(http: httpx.Client, uploaded: dict[str, Blob], scratch: str) -> None:
    body = {"model": scratch, "files": {"model.gguf": uploaded["plain"].digest}, "stream": False}
    answer = http.post("/api/create", json=body)
    assert (answer.status_code, answer.json()) == (200, {"status": "success"})


def test_show_gives_back_what_was_created(http: httpx.Client, lamp: str, files: dict[str, Blob]) -> None:
    shown = http.post("/api/show", json={"model": lamp}).json()
    assert shown["template"] == PLAIN_GO_TEMPLATE
    assert shown["system"] == SYSTEM
    assert shown["license"] == LICENSE
    assert shown["capabilities"] == ["completion"]
    assert sorted(shown["parameters"].splitlines()) == sorted(
        [
            "num_ctx                        512",
            "num_thread                     1",
            'stop                           "<|end|>"',
            'stop                           "two words"',
            "temperature                    0",
        ]
    )
    details = shown["details"]
    assert (details["format"], details["family"], details["families"]) == ("gguf", "llama", ["llama"])
    assert (details["parameter_size"], details["quantization_level"]) == ("964K", "F16")
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["llama.embedding_length"] == 512
    assert "tokenizer.chat_template" not in shown["model_info"]
    assert shown["modified_at"]


def test_the_modelfile_begins_with_the_path_of_the_gguf(
    http: httpx.Client, lamp: str, files: dict[str, Blob], running: RunningEngine
) -> None:
    """The pipeline finds the weights through it: the one place where Ollama tells a path."""
    shown = http.post("/api/show", json={"model": lamp}).json()
    (path,) = modelfile_lines(shown, "FROM")
    assert Path(path) == running.models / "blobs" / files["plain"].digest.replace(":", "-")
    assert Path(path).read_bytes() == files["plain"].path.read_bytes()
    assert modelfile_lines(shown, "TEMPLATE") == [PLAIN_GO_TEMPLATE]
    assert modelfile_lines(shown, "SYSTEM") == [SYSTEM]
    assert sorted(modelfile_lines(shown, "PARAMETER")) == sorted(
        ["num_ctx 512", "num_thread 1", "stop <|end|>", "stop two words", "temperature 0"]
    )
    assert f'LICENSE "{LICENSE}"' in shown["modelfile"]


def test_verbose_show_lists_the_tensors(http: httpx.Client, lamp: str, expect: Expected) -> None:
    shown = http.post("/api/show", json={"model": lamp, "verbose": True}).json()
    tensors = {tensor["name"]: tensor for tensor in shown["tensors"]}
    assert len(tensors) == 12
    assert tensors["token_embd.weight"]["type"] == "F16"
    assert tensors["token_embd.weight"]["shape"][0] == 512
    assert len(shown["model_info"]["tokenizer.ggml.tokens"]) == shown["model_info"]["llama.vocab_size"]
    unasked = http.post("/api/show", json={"model": lamp}).json()
    assert ("tensors" in unasked) is expect.tensors_unasked


def test_tools_are_a_capability_of_a_template_that_speaks_of_them(http: httpx.Client, tools_lamp: str) -> None:
    shown = http.post("/api/show", json={"model": tools_lamp}).json()
    assert sorted(shown["capabilities"]) == ["completion", "tools"]
    assert modelfile_lines(shown, "TEMPLATE") == [GO_TEMPLATE], "verbatim, whoever renders it"


def test_a_gguf_alone_brings_its_own_template_where_the_engine_reads_jinja(
    http: httpx.Client, jinja_lamp: str, expect: Expected
) -> None:
    shown = http.post("/api/show", json={"model": jinja_lamp}).json()
    if expect.reads_jinja:
        assert shown["template"] == CHAT_TEMPLATE
        assert sorted(shown["capabilities"]) == ["completion", "tools"]
    else:
        assert shown["template"] == "{{ .Prompt }}"
        assert shown["capabilities"] == ["completion"]


def test_a_model_from_another_keeps_all_it_does_not_replace(
    http: httpx.Client, create: Create, lamp: str, files: dict[str, Blob], scratch: str
) -> None:
    create(scratch, **{"from": lamp}, system="You are a door.", parameters={"temperature": 1, "top_k": 5})
    shown = http.post("/api/show", json={"model": scratch}).json()
    assert shown["system"] == "You are a door."
    assert (shown["template"], shown["license"]) == (PLAIN_GO_TEMPLATE, LICENSE)
    parameters = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in shown["parameters"].splitlines()}
    assert (parameters["temperature"], parameters["top_k"], parameters["num_ctx"]) == ("1", "5", "512")
    assert files["plain"].digest.replace(":", "-") in modelfile_lines(shown, "FROM")[0]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"template": "{{ .Nope"}, 400, "template error: "),
        ({"files": None}, 400, "neither 'from' or 'files' was specified"),
        ({"model": "bad/////name"}, 400, "invalid model name"),
    ],
)
def test_what_cannot_be_created_says_why(
    http: httpx.Client, uploaded: dict[str, Blob], fields: dict[str, Any], status: int, message: str
) -> None:
    body = {"model": "never", "files": {"model.gguf": uploaded["plain"].digest}, "stream": False} | fields
    answer = http.post("/api/create", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert http.post("/api/show", json={"model": "never"}).status_code == 404


def test_a_gguf_that_was_not_uploaded_is_missed(http: httpx.Client, expect: Expected) -> None:
    body = {"model": "never", "files": {"model.gguf": "sha256:" + "0" * 64}, "stream": False}
    answer = http.post("/api/create", json=body)
    assert answer.status_code == expect.missing_blob_status
    assert "0" * 64 in answer.json()["error"]


def test_a_failure_within_a_stream_is_its_last_line(
    http: httpx.Client, uploaded: dict[str, Blob], expect: Expected
) -> None:
    body = {"model": "never", "files": {"model.gguf": uploaded["plain"].digest}, "template": "{{ .Nope"}
    answer = http.post("/api/create", json=body)
    if expect.creates_checked:
        assert answer.status_code == 400
    else:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
    assert "template error" in json.loads(answer.text.splitlines()[-1])["error"]


def test_the_list_names_each_model_once_with_size_and_digest(
    http: httpx.Client, lamp: str, files: dict[str, Blob], expect: Expected, running: RunningEngine
) -> None:
    models = {model["name"]: model for model in http.get("/api/tags").json()["models"]}
    entry = models["lamp:latest"]
    assert entry["model"] == "lamp:latest"
    assert entry["size"] > files["plain"].path.stat().st_size
    assert len(bytes.fromhex(entry["digest"])) == 32
    assert entry["details"]["family"] == "llama"
    assert ("capabilities" in entry) is expect.tags_capabilities


def test_manifest_and_blobs_stand_in_ollamas_own_layout(
    lamp: str, files: dict[str, Blob], running: RunningEngine
) -> None:
    manifest = running.models / "manifests" / "registry.ollama.ai" / "library" / lamp / "latest"
    layers = json.loads(manifest.read_bytes())["layers"]
    kinds = {layer["mediaType"].removeprefix("application/vnd.ollama.image."): layer for layer in layers}
    assert set(kinds) == {"model", "template", "system", "params", "license"}
    assert kinds["model"]["digest"] == files["plain"].digest
    for layer in layers:
        blob = running.models / "blobs" / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"]
    template = running.models / "blobs" / kinds["template"]["digest"].replace(":", "-")
    assert template.read_text() == PLAIN_GO_TEMPLATE, "stored verbatim"


def test_a_copy_is_a_model_of_its_own(ollama_client: ollama.Client, lamp: str) -> None:
    ollama_client.copy(lamp, "scratch:copy")
    assert ollama_client.show("scratch:copy").template == PLAIN_GO_TEMPLATE
    assert ollama_client.delete("scratch:copy").status == "success"
    with pytest.raises(ollama.ResponseError) as gone:
        ollama_client.show("scratch:copy")
    assert gone.value.status_code == 404
    assert SYSTEM in (ollama_client.show(lamp).modelfile or ""), "its layers are still the first one's"


def test_names_are_found_whatever_their_case_and_with_their_defaults(http: httpx.Client, lamp: str) -> None:
    for name in ("LAMP", "lamp:latest", "library/lamp", "registry.ollama.ai/library/lamp:latest"):
        assert http.post("/api/show", json={"model": name}).status_code == 200, name


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/show", {"model": "missing"}),
        ("DELETE", "/api/delete", {"model": "missing"}),
        ("POST", "/api/copy", {"source": "missing", "destination": "other"}),
        ("POST", "/api/chat", {"model": "missing", "messages": [{"role": "user", "content": "hi"}]}),
        ("POST", "/api/generate", {"model": "missing", "prompt": "hi"}),
    ],
)
def test_an_unknown_model_is_404(http: httpx.Client, method: str, path: str, body: dict[str, Any]) -> None:
    answer = http.request(method, path, json=body)
    assert answer.status_code == 404
    message = answer.json()["error"]
    assert "missing" in message
    assert "not found" in message


def test_the_name_that_is_missing_is_told(http: httpx.Client, expect: Expected) -> None:
    name = "missing:latest" if expect.shows_full_name_missing else "missing"
    assert http.post("/api/show", json={"model": "missing"}).json() == {"error": f"model '{name}' not found"}


@pytest.mark.parametrize("name", ["../model.gguf", "/model.gguf", "a//b.gguf"])
def test_a_file_is_named_below_the_folder(
    http: httpx.Client, uploaded: dict[str, Blob], scratch: str, name: str
) -> None:
    body = {"model": scratch, "files": {name: uploaded["plain"].digest}, "stream": False}
    answer = http.post("/api/create", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("file path must be relative")
