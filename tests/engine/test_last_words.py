"""What the engine says when it can't: each refusal provoked as a user or an accident would, each with the next step."""

from __future__ import annotations

import hashlib
import json
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import ModelError
from abliterated.engine.header import read_header
from engine.running import Engine, digest, until, whole_answer
from engine.scripted_gguf import PLAIN_TEMPLATE, Model, Script, write

HI = [{"role": "user", "content": "hi"}]
PIXEL = "iVBORw0KGgo="


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "plain", "messages": [{"role": "user", "content": content}], **more}


def call(arguments: str) -> list[dict[str, Any]]:
    return [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


def blocks(*given: Any, **more: Any) -> dict[str, Any]:
    return {"model": "plain", "max_tokens": 9, "messages": [{"role": "user", "content": list(given)}], **more}


CHAT, COMPLETIONS, MESSAGES = "/api/chat", "/v1/chat/completions", "/v1/messages"
# route, body, and what the answer says: Ollama's own words, or ours and what to do
REFUSALS: list[tuple[str, Any, str]] = [
    (CHAT, {"model": "plain", "messages": [{**HI[0], "images": [PIXEL]}]},
     "'plain:latest' does not support images. Ask a model that lists vision in `show`"),
    (CHAT, {"model": "thoughtful", "messages": HI, "think": "deeply"},
     'invalid think value: "deeply" (must be "high", "medium", "low", "max", true, or false)'),
    (CHAT, chat("hi", options={"num_ctx": "big"}), 'option "num_ctx" must be a number'),
    (CHAT, b'{"model": "plain", "messages": [], "options": {"num_ctx": 1e999}}', 'option "num_ctx" must be a number'),
    (CHAT, b'{"model": "plain", "messages": [], "options": {"top_p": NaN}}', 'option "top_p" must be a number'),
    (CHAT, chat("hi", options={"stop": [1]}), 'option "stop" must be a string or a list of strings'),
    ("/api/generate", {"model": "plain", "prompt": "hi", "context": [1, 2]},
     "context is not supported by the embedded engine. Use /api/chat with the whole conversation"),
    ("/api/generate", {"model": "plain", "prompt": "hi", "template": "Q: {{ .Prompt }}"},
     "a template in the request is not supported by the embedded engine. Use raw: true"),
    ("/v1/completions", {"model": "plain", "prompt": ["one", "two"]},
     "give one prompt, a string. Send a request for each of several"),
    ("/v1/embeddings", {"model": "plain", "input": []}, "invalid input"),
    (COMPLETIONS, chat([{"type": "image_url", "image_url": "https://example.org/cat.png"}]),
     "invalid image input: only data: URLs are read. Send the image's bytes in one"),
    (COMPLETIONS, chat([{"type": "smell"}]), "invalid message format"),
    (COMPLETIONS, chat(["hi"]), "invalid message format"),
    (COMPLETIONS, chat(5), "invalid message content type: int"),
    (COMPLETIONS, {"model": "plain", "messages": call("{half")}, "invalid tool call arguments"),
    (MESSAGES, {"max_tokens": 9, "messages": HI}, "model is required"),
    (MESSAGES, blocks({"type": "smell"}), "unsupported content block: 'smell'. Send text, images and tools only"),
    (MESSAGES, blocks("hi"), "invalid message content: give a string or a list of blocks"),
    (MESSAGES, blocks({"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}}),
     "invalid image source: only base64 is read. Send the image's bytes, not its address"),
    (MESSAGES, blocks({"type": "tool_use", "id": "a", "name": "f", "input": "x"}),
     "tool_use block needs an object as 'input'"),
    ("/api/create", {"model": "x", "from": "plain", "adapters": {"a": f"sha256:{'0' * 64}"}},
     "adapters are not supported by the embedded engine. Merge the adapter into its model before importing it"),
    ("/api/create", {"model": "x", "files": {"../m.gguf": f"sha256:{'0' * 64}"}},
     "file path must be relative: ../m.gguf"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "words"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_request_that_cannot_be_is_refused_with_what_to_do(shared: Engine, route: str, body: Any, words: str) -> None:
    answer = shared.http.post(route, content=body if isinstance(body, bytes) else json.dumps(body))
    told = answer.json()["error"]
    assert (answer.status_code, told if isinstance(told, str) else told["message"]) == (400, words)


def test_a_body_that_is_no_text_and_one_that_is_too_large(shared: Engine) -> None:
    garbled = shared.http.post(CHAT, content=b'{"model": "\xff"}')
    assert garbled.status_code == 400
    assert garbled.json()["error"].startswith("invalid JSON: 'utf-8' codec can't decode byte 0xff in position 11")
    # Told from the length alone: nobody has to send half a gigabyte first.
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {1 << 30}\r\n\r\n"
        connection.sendall(head.encode())
        answer = whole_answer(connection)
    assert b" 413 " in answer.splitlines()[0]
    assert b"http: request body too large. Send fewer images at once: 512 MiB are read" in answer


# --- files that are no model ------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def word(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def gguf(*values: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    """A GGUF by hand, for what no writer would write."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join((*values, *tensors))
    return head + bytes(-len(head) % 32)


def array(kind: int, count: int) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count)


AGAIN = "The file is damaged: download, copy or convert it again"
LLAMA, TOKENS = word("general.architecture", "llama"), word("tokenizer.ggml.model", "gpt2")
DAMAGED = {
    "the GGUF announces an array of 4294967296 values": gguf(array(4, 1 << 32)),
    "the GGUF holds an array of the unknown type 77": gguf(array(77, 65), bytes(2000)),
    "tensor 't' has 9 dimensions": gguf(LLAMA, tensors=(text("t") + struct.pack("<I", 9),)),
    "the GGUF's alignment is 0": gguf(number("general.alignment", 0)),
}


@pytest.mark.parametrize("words", DAMAGED)
def test_a_damaged_header_says_what_is_wrong_and_what_to_do(tmp_path: Path, words: str) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(DAMAGED[words])
    with pytest.raises(ModelError) as refused:
        read_header(file)
    assert (refused.value.message, refused.value.remedy) == (words, AGAIN)


def test_what_cannot_be_made_a_model_is_refused(shared: Engine, ggufs: dict[str, Path], tmp_path: Path) -> None:
    made = {
        "damaged.gguf": DAMAGED["the GGUF's alignment is 0"],
        "projector.gguf": gguf(word("general.type", "mmproj")),
        "no_tokens.gguf": gguf(LLAMA),
        "no_architecture.gguf": gguf(TOKENS),
        "lora.gguf": gguf(LLAMA, TOKENS, word("general.type", "adapter")),
        "part.gguf": gguf(LLAMA, TOKENS, number("split.count", 2)),
    }
    files = {name: tmp_path / name for name in made} | {"plain.gguf": ggufs["plain"]}
    for name, content in made.items():
        files[name].write_bytes(content)
        shared.ollama.create_blob(str(files[name]))
    no_language = "is not a language model: it has no architecture or no tokenizer. Convert the model again"
    for names, words in (
        (["damaged.gguf"], f"invalid file 'damaged.gguf': the GGUF's alignment is 0. {AGAIN}"),
        (["projector.gguf"], "no language model in 'files'. Give the model's GGUF beside its projector"),
        (["no_tokens.gguf"], f"'no_tokens.gguf' {no_language}"),
        (["no_architecture.gguf"], f"'no_architecture.gguf' {no_language}"),
        (["lora.gguf"], "'lora.gguf' is not a language model but a GGUF of type 'adapter'. Give the model's own GGUF"),
        (["part.gguf"], "'part.gguf' is one part of a split GGUF. Merge the parts first"),
        (["plain.gguf", "part.gguf"], "more than one model in 'files'. Merge a split GGUF first"),
    ):
        body = {"model": "x", "stream": False, "files": {name: digest(files[name]) for name in names}}
        answer = shared.http.post("/api/create", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(words), words
    for name in made:  # others look into this store
        (shared.models / "blobs" / digest(files[name]).replace(":", "-")).unlink()


# --- a store that is damaged, full or not there -----------------------------------------------------------------------


def damaged(hurt: Engine, name: str, **more: Any) -> dict[str, Any]:
    """A model of that name, to be damaged; returns its manifest's layers by kind, and its config."""
    made = hurt.http.post("/api/create", json={"model": name, "from": "base", "stream": False, **more})
    assert made.status_code == 200, made.text
    manifest = json.loads(manifest_of(hurt, name).read_bytes())
    return {layer["mediaType"].rpartition(".")[2]: layer for layer in manifest["layers"]} | {
        "config": manifest["config"]
    }


def manifest_of(hurt: Engine, name: str) -> Path:
    return hurt.models / "manifests/registry.ollama.ai/library" / name / "latest"


def blob(hurt: Engine, layer: dict[str, Any]) -> Path:
    return hurt.models / "blobs" / layer["digest"].replace(":", "-")


def refusal(hurt: Engine, route: str, **body: Any) -> tuple[int, str]:
    answer = hurt.http.post(route, json=body)
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_parameters_that_cannot_be_read(hurt: Engine, content: str) -> None:
    layers = damaged(hurt, "odd", parameters={"seed": len(content)})
    blob(hurt, layers["params"]).write_text(content)
    status, words = refusal(hurt, "/api/show", model="odd")
    assert status == 500 and words.startswith("can't open model 'odd:latest': its params layer can't be read: ")
    assert words.endswith(". Create the model again")
    hurt.ollama.delete("odd")


def test_a_config_that_is_no_config(hurt: Engine) -> None:
    blob(hurt, damaged(hurt, "unread", system="a")["config"]).write_text("not json")
    status, words = refusal(hurt, CHAT, model="unread", messages=HI)
    assert status == 500 and words.startswith("can't read the config of 'unread:latest': ")
    assert words.endswith(". Create the model again")
    assert "unread:latest" in {model.model for model in hurt.ollama.list().models}, "so that it can be deleted"


def test_a_model_of_another_format(hurt: Engine) -> None:
    damaged(hurt, "hollow", system="b")
    manifest = json.loads(manifest_of(hurt, "hollow").read_bytes())
    manifest["layers"] = [layer for layer in manifest["layers"] if not layer["mediaType"].endswith(".model")]
    manifest_of(hurt, "hollow").write_text(json.dumps(manifest))
    words = "model 'hollow:latest' holds no GGUF. Create it again from a GGUF"
    assert refusal(hurt, CHAT, model="hollow", messages=HI) == (500, words)


def test_a_blob_that_went_missing(hurt: Engine) -> None:
    lost = damaged(hurt, "lossy", system="Only lossy says this")["system"]
    blob(hurt, lost).unlink()
    gone = f"blob {lost['digest']} can't be read: No such file or directory. Create its model again"
    assert refusal(hurt, "/api/show", model="lossy") == (500, gone)
    kept = f"blob {lost['digest']} is not in the store. Upload it, or create its model again"
    assert refusal(hurt, "/api/copy", source="lossy", destination="copied") == (400, kept)


def test_weights_that_were_damaged_after_they_were_known(hurt: Engine, tmp_path: Path) -> None:
    file = write(tmp_path / "short.gguf", Model(scripts=[Script("short")], chat_template=PLAIN_TEMPLATE))
    hurt.create("short", file)
    with (hurt.models / "blobs" / digest(file).replace(":", "-")).open("r+b") as stored:
        stored.truncate(1000)
    assert refusal(hurt, "/api/show", model="short", verbose=True) == (
        500, "the GGUF ends inside its header. Copy the file again, whole",
    )  # fmt: skip


def test_a_folder_of_manifests_that_is_none(hurt: Engine) -> None:
    (hurt.models / "manifests/elsewhere.example").write_text("a file where a folder should be")
    words = f"can't write to the store {hurt.models}: Not a directory. Free some room there, and see that it may be"
    status, told = refusal(hurt, "/api/create", model="elsewhere.example/a/b", **{"from": "base"}, stream=False)
    assert status == 500 and told.startswith(words)
    status, told = refusal(hurt, "/api/copy", source="base", destination="elsewhere.example/a/b")
    assert (status, told) == (
        500, "the engine's disk failed: Not a directory. Free some room where its models are; its log names the file",
    )  # fmt: skip
    until(lambda: "elsewhere.example" in "".join(hurt.log))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
@pytest.mark.parametrize("size", [20_000_000, 5_000])
def test_a_disk_that_takes_no_more(hurt: Engine, size: int) -> None:
    """At once, or only when what was buffered must go out."""
    content = b"z" * size
    usual = resource.prlimit(hurt.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(hurt.process.pid, resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        answer = hurt.http.post(f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}", content=content)
    finally:
        resource.prlimit(hurt.process.pid, resource.RLIMIT_FSIZE, usual)
    words = f"can't write the blob: File too large. Free some room where {hurt.models} is"
    assert (answer.status_code, answer.json()) == (500, {"error": words})
    assert not [path for path in (hurt.models / "blobs").iterdir() if path.name.startswith(".upload-")]


def test_a_model_that_only_embeds(hurt: Engine, tmp_path: Path) -> None:
    hurt.create("embedder", write(tmp_path / "embedder.gguf", Model(extra={"llama.pooling_type": 1})))
    assert refusal(hurt, CHAT, model="embedder", messages=HI) == (400, '"embedder" does not support chat')


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    arguments = ["--listen", "192.0.2.1:0", "--models", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "abliterated.engine", *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("can't listen on 192.0.2.1:0: ")
    assert ended.stderr.endswith(". Give an address of this machine, as 127.0.0.1\n")
