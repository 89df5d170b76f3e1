"""Registration keeps everything, overwrites nothing foreign, and survives every fault we could script."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import (
    ConflictError,
    EngineRefused,
    EngineUnavailable,
    ModelError,
    NotFound,
    RecipeError,
)
from abliterated.ollama.client import EngineDiskFull, OllamaClient
from abliterated.ollama.locate import Base, describe_base, resolve_base
from abliterated.ollama.modelfile import Modelfile
from abliterated.ollama.register import Registration, register
from abliterated.ollama.request import Digests, create_request
from fake_ollama import FakeOllama, reset, says, status, tiny_gguf

TARGET = "base-abliterated:8b"
GO = '{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}"{{ .Content }}"\n{{ end }}'
FIELDS: dict[str, Any] = {
    "template": GO,
    "system": 'You say "yes"\nand """no"""',
    "parser": "qwen3",
    "renderer": "qwen3-coder",
    "requires": "0.14.0",
    "parameters": {"stop": ['"', "<|im_end|>", "<tool_call>"], "temperature": 0.7, "num_ctx": 4096},
    "license": ["Licence of the base\nline two"],
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 'a\n"quoted"\nanswer '}],
}


@pytest.fixture
async def fake(tmp_path: Path):
    async with FakeOllama(tmp_path / "store") as engine:
        projector = tiny_gguf(tmp_path / "mmproj.gguf", {"general.architecture": "clip"})
        file = tiny_gguf(tmp_path / "base.gguf", {"general.architecture": "llama"})
        vision = engine.add("projector", projector)
        engine.add("base:8b", file, **FIELDS)
        engine.models["registry.ollama.ai/library/base:8b"]["files"]["mmproj.gguf"] = vision
        del engine.models["registry.ollama.ai/library/projector:latest"]
        yield engine


@pytest.fixture
async def client(fake: FakeOllama):
    async with OllamaClient(fake.url) as opened:
        yield opened


def product_of(folder: Path, content: str = "c0ffee") -> Path:
    keys = {"general.architecture": "llama", "abliterated.content": content, "tokenizer.chat_template": "{% for %}"}
    folder.mkdir(exist_ok=True)
    return tiny_gguf(folder / "model.gguf", keys, padding=2_500_000)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    return product_of(tmp_path / "out")


def remote(base: Base) -> Base:
    """The same base in an engine whose files are elsewhere: no link is possible."""
    return Base(**{**base.__dict__, "blob_path": Path("/elsewhere/blobs") / base.blob_path.name})


def check_one_correct_model(fake: FakeOllama, product: Path) -> None:
    made = {name: model for name, model in fake.models.items() if "abliterated" in name}
    assert list(made) == [f"registry.ollama.ai/library/{TARGET}"]
    (model,) = made.values()
    digest = f"sha256:{hashlib.sha256(product.read_bytes()).hexdigest()}"
    assert model["files"]["model.gguf"] == digest
    assert fake.blob(digest).read_bytes() == product.read_bytes()
    assert not [path.name for path in fake.blobs.iterdir() if len(path.name) != len("sha256-") + 64]


async def test_everything_the_base_says_is_kept(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    base = await resolve_base(client, "base:8b")
    done = await register(client, product, TARGET, base)
    sent = fake.models[f"registry.ollama.ai/library/{TARGET}"]
    kept = {**FIELDS, "parameters": {**FIELDS["parameters"], "stop": ['"', "<|im_end|>"]}}
    assert {key: sent[key] for key in kept} == kept
    assert sent["files"]["mmproj.gguf"] == fake.models["registry.ollama.ai/library/base:8b"]["files"]["mmproj.gguf"]
    assert done.notes == ("stop strings that would cut tool calls or thoughts off were left out: <tool_call>",)
    assert (done.content, done.layer, done.existing) == ("c0ffee", done.digest, False)
    assert {"tools", "vision"} <= set(done.capabilities)
    check_one_correct_model(fake, product)


async def test_a_store_on_the_same_disk_gets_a_link_and_no_copy(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    done = await register(client, product, TARGET, await resolve_base(client, "base:8b"))
    assert done.linked and "POST /api/blobs" not in fake.requests
    assert fake.blob(done.digest).samefile(product)
    assert fake.blob(done.digest).stat().st_mode & 0o777 == 0o644


async def test_an_engine_elsewhere_gets_everything_over_http(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    done = await register(client, product, TARGET, remote(await describe_base(client, "base:8b")))
    assert not done.linked and fake.requests.count("POST /api/blobs") == 1
    assert not fake.blob(done.digest).samefile(product)
    check_one_correct_model(fake, product)


async def test_the_same_again_changes_nothing(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    base = await resolve_base(client, "base:8b")
    first = await register(client, product, TARGET, base)
    fake.requests.clear()
    second = await register(client, product, TARGET, base)
    assert second.existing and second.layer == first.layer and second.capabilities == first.capabilities
    assert "POST /api/create" not in fake.requests


async def test_an_engine_that_writes_the_gguf_anew_is_known_by_the_content_key(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    fake.version = "0.33.3"
    base = await resolve_base(client, "base:8b")
    first = await register(client, product, TARGET, base)
    assert first.layer != first.digest and first.content == "c0ffee"
    assert not [note for note in first.notes if "anew" in note], "what that generation always does is no surprise"
    assert (await register(client, product, TARGET, base)).existing


async def test_our_own_model_of_another_content_is_replaced(
    fake: FakeOllama, client: OllamaClient, product: Path, tmp_path: Path
) -> None:
    base = await resolve_base(client, "base:8b")
    await register(client, product_of(tmp_path / "older", "0ld"), TARGET, base)
    done = await register(client, product, TARGET, base)
    assert not done.existing and done.content == "c0ffee"
    check_one_correct_model(fake, product)


async def test_a_name_taken_by_others_is_theirs_unless_replace_is_said(
    fake: FakeOllama, client: OllamaClient, product: Path, tmp_path: Path
) -> None:
    fake.add(TARGET, tiny_gguf(tmp_path / "theirs.gguf", {"general.architecture": "llama"}))
    before = dict(fake.models)
    base = await resolve_base(client, "base:8b")
    with pytest.raises(ConflictError, match="we did not make it"):
        await register(client, product, TARGET, base)
    assert fake.models == before
    await register(client, product, TARGET, base, replace=True)
    check_one_correct_model(fake, product)


async def test_a_blob_cut_off_by_a_crash_is_put_right(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    base = await resolve_base(client, "base:8b")
    digest = f"sha256:{hashlib.sha256(product.read_bytes()).hexdigest()}"
    fake.blob(digest).write_bytes(product.read_bytes()[:1000])
    (fake.blobs / f"{fake.blob(digest).name}-abliterated").write_bytes(b"left by a crash")
    await register(client, product, TARGET, base)
    check_one_correct_model(fake, product)


@pytest.mark.parametrize(("template", "sent"), [("{%- if tools %}", False), ("{{ .Prompt }}", False), (GO, True)])
async def test_only_a_real_go_template_is_sent(
    fake: FakeOllama, client: OllamaClient, product: Path, tmp_path: Path, template: str, sent: bool
) -> None:
    fake.add("plain:1", tiny_gguf(tmp_path / "plain.gguf", {}), template=template)
    await register(client, product, TARGET, await resolve_base(client, "plain:1"))
    assert ("template" in fake.models[f"registry.ollama.ai/library/{TARGET}"]) is sent


def test_every_blob_the_base_is_made_of_is_named_in_the_creation() -> None:
    asked = create_request("new:1", Modelfile(), Digests("m", ("p", "q"), ("a",), ("d",)))
    assert asked["files"] == {"model.gguf": "m", "mmproj.gguf": "p", "mmproj-2.gguf": "q"}
    assert (asked["adapters"], asked["draft_files"]) == ({"adapter.gguf": "a"}, {"draft.gguf": "d"})


async def test_a_model_without_a_base_keeps_its_jinja(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    done = await register(client, product, TARGET)
    assert done.linked, "any model of the engine shows where its store is"
    assert "template" not in fake.models[f"registry.ollama.ai/library/{TARGET}"] and done.notes == ()
    fake.version = "0.17.1"
    done = await register(client, product, "other:1")
    assert any("tools will not work there" in note for note in done.notes)


async def test_lost_capabilities_are_said(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    base = await resolve_base(client, "base:8b")
    base = Base(**{**base.__dict__, "capabilities": base.capabilities | {"thinking"}})
    done = await register(client, product, TARGET, base)
    assert "capability thinking: the base has it, the new model does not" in done.notes


async def test_an_ollama_with_known_holes_is_warned_of(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    fake.version = "0.17.0"
    done = await register(client, product, TARGET, await resolve_base(client, "base:8b"))
    assert any("known vulnerabilities" in note for note in done.notes)
    fake.version = "0.17.1"
    done = await register(client, product, TARGET, await resolve_base(client, "base:8b"))
    assert not any("vulnerabilities" in note for note in done.notes)


async def test_an_ollama_too_old_is_refused_before_anything_is_sent(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    fake.version = "0.4.9"
    with pytest.raises(EngineRefused, match="too old"):
        await register(client, product, TARGET)
    assert set(fake.requests) == {"GET /api/version"}


@pytest.mark.parametrize("name", ["", "no spaces here", "a:b:c", "-x", "a" * 81])
async def test_a_name_ollama_refuses_is_refused_here(client: OllamaClient, product: Path, name: str) -> None:
    with pytest.raises(RecipeError):
        await register(client, product, name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something", b"GGUF\x03\x00\x00\x00", b"GGUF\x09\x00\x00\x00"])
async def test_a_product_that_is_no_gguf_is_refused(client: OllamaClient, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError):
        await register(client, file, TARGET)


# -- faults: the first try fails, the second makes exactly one correct model ---------------------------------------


FAULTS = {
    "version answers 500": ("GET /api/version", [status(500)], EngineUnavailable),
    "down before anything": ("GET /api/version", [reset, reset], EngineUnavailable),
    "show answers 500": ("POST /api/show", [status(500)], EngineUnavailable),
    "the queue is full": ("HEAD /api/blobs", [status(503)], EngineUnavailable),
    "the upload breaks twice": ("POST /api/blobs", [reset, reset], EngineUnavailable),
    "the disk is full at the blob": (
        "POST /api/blobs",
        [status(500, "write: no space left on device")] * 2,
        EngineDiskFull,
    ),
    "the digest is not confirmed": ("POST /api/blobs", [status(400, "digest mismatch")], EngineRefused),
    "create answers 500": ("POST /api/create", [status(500)], EngineUnavailable),
    "create is cut before the work": ("POST /api/create", [says({"status": "parsing"}, cut=True)], EngineUnavailable),
    "create is cut after the work": ("POST /api/create", [says(cut=True, first_create=True)], EngineUnavailable),
    "create ends without a word": ("POST /api/create", [says()], EngineUnavailable),
    "create stops within a line": ("POST /api/create", [says(b'{"stat')], EngineUnavailable),
    "create says no inside its 200": ("POST /api/create", [says({"error": "llama-quantize failed"})], EngineRefused),
    "the disk is full in create": (
        "POST /api/create",
        [says({"error": "write /x: no space left on device"})],
        EngineDiskFull,
    ),
    "success that isn't one": ("POST /api/create", [says({"status": "success"})], EngineUnavailable),
}


@pytest.mark.parametrize("how", ["linked", "uploaded"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_leaves_nothing_wrong_and_the_next_try_succeeds(
    fake: FakeOllama, client: OllamaClient, product: Path, fault: str, how: str
) -> None:
    route, script, error = FAULTS[fault]
    base = await resolve_base(client, "base:8b")
    base = base if how == "linked" else remote(base)
    fake.faults[route] = list(script)
    if how == "linked" and route == "POST /api/blobs":
        assert (await register(client, product, TARGET, base)).linked, "nothing is uploaded, so nothing can fail"
    else:
        with pytest.raises(error):
            await register(client, product, TARGET, base)
        done = await register(client, product, TARGET, base)
        assert done.existing is (fault == "create is cut after the work")
    check_one_correct_model(fake, product)


async def test_the_engine_restarts_in_the_middle_and_the_next_try_succeeds(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    base = remote(await describe_base(client, "base:8b"))
    await fake.__aexit__()
    with pytest.raises(EngineUnavailable):
        await register(client, product, TARGET, base)
    await fake.__aenter__()
    await register(client, product, TARGET, base)
    check_one_correct_model(fake, product)


async def test_show_failing_after_the_creation_is_found_done_the_next_time(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    base = await resolve_base(client, "base:8b")

    async def pass_on(*_: object) -> None:
        return None

    fake.faults["POST /api/show"] = [pass_on, status(500)]
    with pytest.raises(EngineUnavailable):
        await register(client, product, TARGET, base)
    assert (await register(client, product, TARGET, base)).existing
    check_one_correct_model(fake, product)


async def test_a_cancelled_registration_is_finished_by_the_next(
    fake: FakeOllama, client: OllamaClient, product: Path
) -> None:
    base = await resolve_base(client, "base:8b")
    reached = asyncio.Event()

    async def wait_here(*_: object) -> None:
        reached.set()

    fake.faults["POST /api/create"] = [wait_here]
    task = asyncio.create_task(register(client, product, TARGET, base))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.finished == [TARGET], "the creation was followed to its end"
    assert isinstance(await register(client, product, TARGET, base), Registration)
    check_one_correct_model(fake, product)


# -- finding the base ----------------------------------------------------------------------------------------------


async def test_a_base_is_resolved_to_its_file(fake: FakeOllama, client: OllamaClient) -> None:
    base = await resolve_base(client, "BASE:8b")
    assert base.blob_path.read_bytes()[:4] == b"GGUF" and base.blob_path == fake.blob(base.digest)
    assert base.projector is not None and base.projector.is_file()
    assert base.modelfile.template == GO and "tools" in base.capabilities and base.content == ""


async def test_a_base_that_is_gone_says_how_to_get_it(client: OllamaClient) -> None:
    with pytest.raises(NotFound, match="ollama pull gone:1b"):
        await resolve_base(client, "gone:1b")


@pytest.mark.parametrize(
    ("shown", "says_so"),
    [
        ({"remote_model": "big", "remote_host": "https://ollama.com"}, "a cloud model"),
        ({"details": {"format": "safetensors"}, "modelfile": "FROM base:8b\n"}, "safetensors"),
        ({"modelfile": "FROM base:8b\n"}, "safetensors"),
        ({"modelfile": "FROM /home/them/.ollama/models/blobs/sha256-" + "0" * 64 + "\n"}, "remote or in a container"),
        ({"modelfile": "# nothing\n"}, "names no file"),
    ],
)
async def test_a_base_that_cannot_be_edited_says_why_and_what_to_do(
    fake: FakeOllama, client: OllamaClient, shown: dict[str, Any], says_so: str
) -> None:
    fake.models["registry.ollama.ai/library/base:8b"]["show"] = shown
    with pytest.raises(ModelError, match=says_so) as caught:
        await resolve_base(client, "base:8b")
    assert caught.value.remedy


@contextlib.contextmanager
def one_who_may_not_read_everything() -> Iterator[None]:
    """As root, for whom no file is closed, somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


async def test_a_base_we_may_not_read_names_the_group(fake: FakeOllama, client: OllamaClient) -> None:
    base = await describe_base(client, "base:8b")
    base.blob_path.chmod(0)
    with pytest.raises(ModelError, match="usermod -aG ollama"), one_who_may_not_read_everything():
        await resolve_base(client, "base:8b")


async def test_a_blob_that_is_no_gguf_is_said(fake: FakeOllama, client: OllamaClient) -> None:
    base = await describe_base(client, "base:8b")
    base.blob_path.write_bytes(b"broken")
    with pytest.raises(ModelError, match="is no GGUF file"):
        await resolve_base(client, "base:8b")
