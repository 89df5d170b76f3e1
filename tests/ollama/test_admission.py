"""A product gets its name only when it has been proven; whatever happens on the way, one correct model is the end."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from abliterate.contract.errors import ConflictError, EngineRefused, EngineUnavailable
from abliterated.ollama import admission
from abliterated.ollama.admission import CertificationFailed, admit, beside, check_name
from abliterated.ollama.certify import Certificate, certify
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import Base, resolve_base
from fake_ollama import FakeOllama, reset, tiny_gguf

TARGET = "base-abliterated:8b"
GO = "{{ .Tools }}"


@pytest.fixture(autouse=True)
def certified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same certification in this process; the process of its own has its tests in test_certify."""

    async def here(url: str, model: str, reference: str = "", *, product: Path, baked: bool) -> Certificate:
        async with OllamaClient(url) as client:
            return await certify(client, model, reference, baked=baked)

    monkeypatch.setattr(admission, "certify_apart", here)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        keys = {"general.architecture": "llama", "tokenizer.chat_template": "{% for %}"}
        engine.add("base:8b", tiny_gguf(tmp_path / "base.gguf", keys), template=GO)
        yield engine


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(fake.url) as opened:
        yield opened


@pytest.fixture
async def base(client: OllamaClient) -> Base:
    return await resolve_base(client, "base:8b")


def product(folder: Path, content: str = "c0ffee", template: str = "{% for %}") -> Path:
    folder.mkdir(exist_ok=True)
    keys = {"general.architecture": "llama", "abliterated.content": content, "tokenizer.chat_template": template}
    return tiny_gguf(folder / "model.gguf", keys)


def names(fake: FakeOllama) -> list[str]:
    return sorted(name.removeprefix("registry.ollama.ai/library/") for name in fake.models)


async def content_of(client: OllamaClient, name: str) -> str:
    return str((await client.show(name))["model_info"].get("abliterated.content", ""))


def breaks_tools(fake: FakeOllama) -> None:
    """New models render tool conversations otherwise than their base."""

    async def post_chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "abliterated" in body["model"] and body.get("tools"):
            return web.json_response({"_debug_info": {"rendered_template": json.dumps(body["messages"])}})
        return await fake.post_chat(request)

    fake.answers["/api/chat"] = post_chat


async def test_what_is_proven_gets_its_name_and_nothing_else_stays(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    done = await admit(client, product(tmp_path / "out"), TARGET, base, reference="base:8b")
    assert names(fake) == [TARGET, "base:8b"]
    assert done.registration.name == TARGET and done.certificate.failures == []
    assert fake.requests.index("POST /api/chat") < fake.requests.index("POST /api/copy"), "proven, then named"


async def test_what_was_named_is_on_the_disk_before_success_is_told(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[list[str]] = []  # what the engine had, each time the disks were told
    monkeypatch.setattr(os, "sync", lambda: known.append(names(fake)))
    await admit(client, product(tmp_path / "out"), TARGET, base, reference="base:8b")
    assert known[0] == [beside(TARGET, admission.PROVISIONAL), "base:8b"]
    assert known[-1] == [TARGET, "base:8b"]


async def test_an_engine_that_writes_the_gguf_anew_is_no_obstacle(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    fake.version = "0.33.3"
    file = product(tmp_path / "out")
    done = await admit(client, file, TARGET, base, reference="base:8b")
    assert done.registration.layer != done.registration.digest and names(fake) == [TARGET, "base:8b"]
    assert (await admit(client, file, TARGET, base, reference="base:8b")).registration.existing


async def test_what_fails_never_gets_the_name_and_an_earlier_model_stays(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    await admit(client, product(tmp_path / "first", "0ld"), TARGET, base, reference="base:8b")
    breaks_tools(fake)
    with pytest.raises(CertificationFailed, match="tools: the prompt differs") as told:
        await admit(client, product(tmp_path / "out"), TARGET, base, reference="base:8b")
    assert "-base" not in told.value.message and told.value.certificate.failures[0].diff
    assert names(fake) == [TARGET, "base:8b"] and await content_of(client, TARGET) == "0ld"
    with pytest.raises(CertificationFailed, match="not given its name"):
        await admit(client, product(tmp_path / "out"), "second-abliterated:1", base, reference="base:8b")
    assert names(fake) == [TARGET, "base:8b"]


async def test_a_template_baked_in_is_told_by_the_files(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    breaks_tools(fake)
    done = await admit(client, product(tmp_path / "out", template="{% tools %}"), TARGET, base, reference="base:8b")
    assert {one.what for one in done.certificate.warnings} == {"tools", "tool round trip"}


async def test_the_next_version_takes_the_place_of_the_last(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    await admit(client, product(tmp_path / "first", "0ld"), TARGET, base, reference="base:8b")
    await admit(client, product(tmp_path / "out"), TARGET, base, reference="base:8b")
    assert names(fake) == [TARGET, "base:8b"] and await content_of(client, TARGET) == "c0ffee"


async def test_what_is_there_already_is_proven_again_and_left(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    file = product(tmp_path / "out")
    await admit(client, file, TARGET, base, reference="base:8b")
    fake.requests.clear()
    again = await admit(client, file, TARGET, base, reference="base:8b")
    assert again.registration.existing and not {"POST /api/create", "POST /api/copy"} & set(fake.requests)
    breaks_tools(fake)
    with pytest.raises(CertificationFailed, match="left as it is"):
        await admit(client, file, TARGET, base, reference="base:8b")
    assert names(fake) == [TARGET, "base:8b"]


@pytest.mark.parametrize("route", ["POST /api/copy", "DELETE /api/delete", "POST /api/show", "POST /api/chat"])
async def test_cut_off_anywhere_the_next_try_ends_with_one_model(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path, route: str
) -> None:
    await admit(client, product(tmp_path / "first", "0ld"), TARGET, base, reference="base:8b")
    file = product(tmp_path / "out")
    tries = 0

    async def pass_on(*_: object) -> None:
        return None

    for nth in range(12):  # the nth request of that kind is the one that breaks
        fake.faults[route] = [pass_on] * nth + [reset] * 2
        try:
            await admit(client, file, TARGET, base, reference="base:8b")
        except EngineUnavailable:
            tries += 1
        else:
            break
        assert await content_of_settled(fake, client) in ("0ld", "c0ffee"), "the name always holds a whole model"
    fake.faults.clear()
    await admit(client, file, TARGET, base, reference="base:8b")
    assert tries and names(fake) == [TARGET, "base:8b"] and await content_of(client, TARGET) == "c0ffee"


async def content_of_settled(fake: FakeOllama, client: OllamaClient) -> str:
    fake.faults.clear()
    return await content_of(client, TARGET)


async def test_a_foreign_model_of_the_name_is_found_before_the_work_and_after_it(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    fake.add(TARGET, tiny_gguf(tmp_path / "theirs.gguf", {}))
    for replace in (False, True):
        if not replace:
            with pytest.raises(ConflictError):
                await check_name(client, TARGET, replace=replace)
            with pytest.raises(ConflictError):
                await admit(client, product(tmp_path / "out"), TARGET, base)
            assert await content_of(client, TARGET) == ""
        else:
            await admit(client, product(tmp_path / "out"), TARGET, base, replace=True)
    assert names(fake) == [TARGET, "base:8b"] and await content_of(client, TARGET) == "c0ffee"


async def test_foreign_models_at_our_passing_names_are_not_touched(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    await admit(client, product(tmp_path / "first", "0ld"), TARGET, base)
    fake.add(beside(TARGET, "-replaced"), tiny_gguf(tmp_path / "theirs.gguf", {}))
    await admit(client, product(tmp_path / "out"), TARGET, base)
    assert beside(TARGET, "-replaced") in names(fake)
    fake.add(beside("x:1", "-uncertified"), tiny_gguf(tmp_path / "theirs.gguf", {}))
    with pytest.raises(ConflictError):
        await admit(client, product(tmp_path / "out"), "x:1", base)
    assert beside("x:1", "-uncertified") in names(fake)


async def test_a_model_without_a_base_is_proven_by_speaking(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    done = await admit(client, product(tmp_path / "out"), TARGET)
    assert done.certificate.answer and done.certificate.compared == []


async def test_an_engine_too_old_is_told_before_the_work(fake: FakeOllama, client: OllamaClient) -> None:
    fake.version = "0.4.7"
    with pytest.raises(EngineRefused, match="too old"):
        await check_name(client, TARGET, replace=True)


def test_the_passing_name_keeps_the_size_and_fits() -> None:
    assert beside("gemma4-abliterated:12b", "-uncertified") == "gemma4-abliterated:12b-uncertified"
    assert len(beside("m:" + "t" * 80, "-uncertified").partition(":")[2]) == 80
