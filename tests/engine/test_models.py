"""Blobs, create, show, copy, delete: the store as the official client sees it, and as it lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ollama
import pytest

from engine.running import Engine, blobs, digest, engine
from engine.scripted_gguf import Model, write

TEMPLATE = '{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ .Prompt }} "quoted"'


@pytest.fixture
def fresh(tmp_path: Path) -> Engine:  # type: ignore[misc]
    with engine(tmp_path / "models") as running:
        yield running


def steps(running: Engine, **body: Any) -> list[dict[str, Any]]:
    response = running.http.post("/api/create", json=body)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_root_and_version_answer_as_a_heartbeat(fresh: Engine) -> None:
    assert fresh.http.get("/").text == "Ollama is running"
    assert fresh.http.head("/").status_code == fresh.http.head("/api/version").status_code == 200
    assert fresh.http.head("/api/tags").status_code == 200
    version = fresh.http.get("/api/version").json()["version"]
    numbers = tuple(int(part) for part in version.partition("-")[0].split("."))
    assert numbers >= (0, 30, 0) and "abliterated" in version
    assert fresh.ollama.list().models == [] and fresh.ollama.ps().models == []


def test_everything_given_at_creation_comes_back_verbatim(fresh: Engine, ggufs: dict[str, Path]) -> None:
    given: dict[str, Any] = {
        "template": TEMPLATE,
        "system": "Be brief.\nAnd kind.",
        "parameters": {"temperature": 0, "stop": ["<|im_end|>", 'say "no"'], "top_p": 0.5},
        "license": ["First licence", "Second\nlicence"],
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    }
    fresh.create("Foo:1B", ggufs["thoughtful"], **given)
    shown = fresh.http.post("/api/show", json={"model": "foo:1b"}).json()
    assert shown["template"] == TEMPLATE and shown["system"] == given["system"]
    assert shown["license"] == "First licence\nSecond\nlicence" and shown["messages"] == given["messages"]
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["details"]["family"] == "llama" and shown["details"]["format"] == "gguf"
    assert shown["parameters"].splitlines() == [
        'stop                           "<|im_end|>"',
        'stop                           "say \\"no\\""',
        "temperature                    0",
        "top_p                          0.5",
    ]
    modelfile = shown["modelfile"]
    [path] = [Path(line[5:]) for line in modelfile.splitlines() if line.startswith("FROM ")]
    assert path.read_bytes() == ggufs["thoughtful"].read_bytes() and path.is_absolute()
    assert f'TEMPLATE """{TEMPLATE}"""' in modelfile and 'SYSTEM "Be brief.\nAnd kind."' in modelfile
    assert "PARAMETER stop <|im_end|>\n" in modelfile and "MESSAGE assistant hello" in modelfile
    assert shown["model_info"]["general.architecture"] == "llama" and shown["model_info"]["llama.block_count"] == 1
    assert shown["model_info"]["tokenizer.ggml.tokens"] is None
    assert "tokenizer.chat_template" not in shown["model_info"] and "general.name" not in shown["model_info"]
    assert {"name": "output_norm.weight", "type": "F32", "shape": [512]} in shown["tensors"]
    verbose = fresh.http.post("/api/show", json={"name": "foo:1b", "verbose": True}).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) > 256
    assert [model.model for model in fresh.ollama.list().models] == ["Foo:1B"]  # stored as first spelled


def test_creation_tells_its_steps_and_a_copy_of_a_model_inherits(fresh: Engine, ggufs: dict[str, Path]) -> None:
    fresh.ollama.create_blob(str(ggufs["thoughtful"]))
    files = {"model.gguf": digest(ggufs["thoughtful"])}
    config = {"renderer": "qwen3.5", "parser": "qwen3", "requires": "0.14.0", "info": {"capabilities": ["vision"]}}
    told = [
        step["status"] for step in steps(fresh, model="base", files=files, system="S", parameters={"seed": 1}, **config)
    ]
    assert told[:2] == ["parsing GGUF", "validating GGUF model"] and told[-2:] == ["writing manifest", "success"]
    assert any(step.startswith("creating new layer sha256:") for step in told)
    before = blobs(fresh.models)
    steps(fresh, model="heir", **{"from": "base"}, template="{{ .Prompt }}", parameters={"top_k": 3})
    assert len(blobs(fresh.models) - before) == 3  # template, merged parameters, config: no second copy of the weights
    shown = fresh.ollama.show("heir")
    assert shown.template == "{{ .Prompt }}" and shown.parameters.split() == ["seed", "1", "top_k", "3"]
    for line in ("SYSTEM S", "RENDERER qwen3.5", "PARSER qwen3", "REQUIRES 0.14.0"):
        assert line in (shown.modelfile or "").splitlines()
    assert shown.capabilities == ["completion", "tools", "thinking", "vision"]
    done = fresh.http.post("/api/create", json={"model": "third", "from": "heir", "stream": False})
    assert (done.status_code, done.json()) == (200, {"status": "success"})


def test_the_folder_is_ollamas_own_layout(fresh: Engine, ggufs: dict[str, Path]) -> None:
    fresh.create("foo", ggufs["plain"], system="S", license="L")
    manifest = json.loads((fresh.models / "manifests/registry.ollama.ai/library/foo/latest").read_bytes())
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    kinds = {layer["mediaType"].removeprefix("application/vnd.ollama.image."): layer for layer in manifest["layers"]}
    assert set(kinds) == {"model", "system", "license"}
    for layer in [manifest["config"], *manifest["layers"]]:
        path = fresh.models / "blobs" / layer["digest"].replace(":", "-")
        assert path.stat().st_size == layer["size"] and digest(path) == layer["digest"]
        assert path.stat().st_mode & 0o777 == 0o644
    config = json.loads((fresh.models / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_bytes())
    assert config["model_format"] == "gguf" and config["model_family"] == "llama" and config["file_type"] == "F32"
    assert blobs(fresh.models) == {
        layer["digest"].replace(":", "-") for layer in [manifest["config"], *manifest["layers"]]
    }
    [listed] = fresh.ollama.list().models
    assert listed.digest == digest(fresh.models / "manifests/registry.ollama.ai/library/foo/latest").removeprefix(
        "sha256:"
    )


def test_a_blob_is_taken_only_under_its_own_digest(fresh: Engine, tmp_path: Path) -> None:
    http = fresh.http
    content = b"some bytes" * 100_000
    file = tmp_path / "blob"
    file.write_bytes(content)
    right = digest(file)
    assert http.head(f"/api/blobs/{right}").status_code == 404
    wrong = http.post(f"/api/blobs/sha256:{'0' * 64}", content=content)
    assert wrong.status_code == 400 and "digest mismatch" in wrong.json()["error"]
    assert blobs(fresh.models) == set()
    assert http.post(f"/api/blobs/{right}", content=iter([content[:7], content[7:]])).status_code == 201
    assert http.post(f"/api/blobs/{right}", content=content).status_code == 200
    assert http.head(f"/api/blobs/{right.replace(':', '-')}").status_code == 200
    for digest_text in ("sha256:short", "md5:" + "0" * 64, "sha256:" + "Z" * 64):
        assert http.post(f"/api/blobs/{digest_text}", content=b"").status_code == 400
        assert http.head(f"/api/blobs/{digest_text}").status_code == 400


def test_a_gguf_that_is_no_model_is_refused_inside_the_stream(
    fresh: Engine, ggufs: dict[str, Path], tmp_path: Path
) -> None:
    whole = ggufs["plain"].read_bytes()
    bad = {
        "truncated": whole[: len(whole) - 5000],
        "ends inside its header": whole[:3000],
        "wrong magic": b"nope" + whole[4:],
        "unknown model architecture: 'zebra'": write(tmp_path / "zebra", Model(architecture="zebra")).read_bytes(),
        "not a language model": write(tmp_path / "lora", Model(extra={"general.type": "adapter"})).read_bytes(),
        "GGML_ASSERT": write(tmp_path / "doubled", Model(doubled_token=True)).read_bytes(),  # the C++ process aborts
        "version 77": whole[:4] + b"\x4d" + whole[5:],
    }
    for reason, content in bad.items():
        file = tmp_path / "bad.gguf"
        file.write_bytes(content)
        fresh.ollama.create_blob(str(file))
        *_, last = steps(fresh, model="bad", files={"bad.gguf": digest(file)})
        assert reason in last.get("error", ""), (reason, last)
        assert ". " in last["error"], "what to do next"
    whole_answer = fresh.http.post("/api/create", json={"model": "bad", "files": {"x": digest(file)}, "stream": False})
    assert whole_answer.status_code == 400 and "version 77" in whole_answer.json()["error"]
    assert fresh.ollama.list().models == []


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"model": "a b", "from": "x"}, 400, "invalid model name"),
        ({"from": "x"}, 400, "model is required"),
        ({"model": "x"}, 400, "neither 'from' or 'files' was specified"),
        ({"model": "x", "from": "y", "quantize": "q4_K_M"}, 400, "quantization is not supported"),
        ({"model": "x", "from": "y", "adapters": {"a": "sha256:" + "0" * 64}}, 400, "adapters are not supported"),
        ({"model": "x", "from": "y", "template": "{{ if .System }}"}, 400, "template error"),
        ({"model": "x", "from": "y", "template": "{{ .Prompt"}, 400, "template error"),
        ({"model": "x", "files": {"a": "sha256:12"}}, 400, "invalid digest"),
        ({"model": "x", "from": "y", "stream": False}, 404, "model 'y' not found"),
        ({"model": "x", "files": {"a": "sha256:" + "0" * 64}, "stream": False}, 400, "is not in the store"),
    ],
)
def test_a_bad_creation_is_refused(shared: Engine, body: dict[str, Any], status: int, reason: str) -> None:
    response = shared.http.post("/api/create", json=body)
    assert response.status_code == status and reason in response.json()["error"]


def test_deleting_frees_what_nothing_else_needs(fresh: Engine, ggufs: dict[str, Path]) -> None:
    client = fresh.ollama
    fresh.create("one", ggufs["plain"], system="only one has this")
    client.copy("one", "Two:tag")
    fresh.create("other", ggufs["json"])
    client.chat("one", [{"role": "user", "content": "hi"}])
    before = blobs(fresh.models)
    client.delete("one")
    assert blobs(fresh.models) == before  # Two holds them
    assert {model.model for model in client.list().models} == {"Two:tag", "other:latest"}
    client.delete("two:TAG")
    assert len(before - blobs(fresh.models)) == 3
    assert not (fresh.models / "manifests/registry.ollama.ai/library/Two").exists()
    assert client.ps().models == []  # weights that are gone are not kept loaded
    with pytest.raises(ollama.ResponseError, match="model 'one' not found") as no:
        client.delete("one")
    assert no.value.status_code == 404
    client.delete("other")
    assert blobs(fresh.models) == set()


def test_creating_a_name_again_replaces_it(fresh: Engine, ggufs: dict[str, Path]) -> None:
    fresh.create("foo", ggufs["plain"])
    first = blobs(fresh.models)
    fresh.create("FOO", ggufs["json"])
    assert [model.model for model in fresh.ollama.list().models] == ["foo:latest"]
    assert not first & blobs(fresh.models)
    assert fresh.ollama.chat("foo", [{"role": "user", "content": "hi"}]).message.content == '{"city": "Paris"}'


@pytest.mark.parametrize(
    "spelling",
    ["plain", "plain:latest", "PLAIN", "library/plain", "registry.ollama.ai/library/plain:latest", "plain:local"],
)
def test_one_model_has_many_spellings(shared: Engine, spelling: str) -> None:
    assert shared.ollama.show(spelling).capabilities == ["completion"]


def test_names_that_are_none_and_models_that_are_not_there(shared: Engine) -> None:
    http = shared.http
    for route, key in (("show", "model"), ("chat", "model"), ("generate", "model"), ("embed", "model")):
        missing = http.post(f"/api/{route}", json={key: "nothing"})
        assert (missing.status_code, missing.json()) == (404, {"error": "model 'nothing' not found"}), route
        assert http.post(f"/api/{route}", json={key: "bad name"}).status_code == 400
        assert http.post(f"/api/{route}", json={}).status_code == 400
    assert http.post("/api/copy", json={"source": "nothing", "destination": "x"}).status_code == 404
    assert http.post("/api/copy", json={"source": "plain", "destination": "../x"}).status_code == 400


def test_what_is_no_request_gets_what_ollama_answers(shared: Engine) -> None:
    http = shared.http
    assert http.post("/api/chat", content=b"{nonsense").status_code == 400
    assert http.post("/api/chat", content=b"").json() == {"error": "missing request body"}
    assert http.post("/api/chat", json={"model": 5}).status_code == 400
    nothing = http.get("/nowhere")
    assert (nothing.status_code, nothing.text) == (404, "404 page not found")
    assert http.get("/api/chat").status_code == 405 and http.post("/api/tags").status_code == 405
    for route in ("pull", "push"):
        refused = http.post(f"/api/{route}", json={"model": "plain"})
        assert refused.status_code == 400 and "no registry" in refused.json()["error"]
    # curl -d sends another content type, and only the first value of the body counts
    odd = http.post("/api/show", content=b'{"model": "plain"} trailing', headers={"Content-Type": "text/plain"})
    assert odd.status_code == 200


def test_a_web_page_from_elsewhere_is_kept_out(shared: Engine) -> None:
    http = shared.http
    assert http.get("/api/tags", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/api/tags", headers={"Origin": "https://evil.example"}).status_code == 403
    local = http.get("/api/tags", headers={"Origin": "http://localhost:3000"})
    assert (local.status_code, local.headers["Access-Control-Allow-Origin"]) == (200, "http://localhost:3000")
    asked = http.options("/api/chat", headers={"Origin": "app://obsidian", "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 204 and "POST" in asked.headers["Access-Control-Allow-Methods"]


def test_a_manifest_that_cannot_be_read_stops_all_cleaning(fresh: Engine, ggufs: dict[str, Path]) -> None:
    fresh.create("foo", ggufs["plain"])
    broken = fresh.models / "manifests/registry.ollama.ai/library/broken/latest"
    broken.parent.mkdir()
    broken.write_text("{")
    before = blobs(fresh.models)
    fresh.ollama.delete("foo")
    assert blobs(fresh.models) == before
    assert fresh.ollama.list().models == []
