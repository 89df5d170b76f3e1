"""What this room says of files, engines and processes that fail in ways hardly anybody meets, and what to do next."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from abliterate.contract.errors import (
    AbliteratedError,
    DiskError,
    EngineRefused,
    EngineUnavailable,
    ModelError,
    NotFound,
)
from abliterate.contract.names import parse_name
from abliterated.ollama import admission
from abliterated.ollama.admission import admit
from abliterated.ollama.certification import CertificationUnfinished, certify_apart
from abliterated.ollama.certify import Certificate
from abliterated.ollama.client import EngineDiskFull, EngineFailed, OllamaClient, hash_file
from abliterated.ollama.importer import import_folder
from abliterated.ollama.locate import Base, resolve_base
from abliterated.ollama.modelfile import Modelfile, write
from abliterated.ollama.register import register
from abliterated.ollama.repair import repair
from fake_ollama import FakeOllama, Fault, says, status, tiny_gguf
from strangers import as_nobody

GO = "{{ .Tools }}"
KEYS = {"general.architecture": "llama", "tokenizer.chat_template": "{% for t in tools %}{{ t }}{% endfor %}"}
TARGET = "base-abliterated:8b"
NONE = "sha256:" + "0" * 64


def remedied(error: AbliteratedError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert error.remedy and error.remedy in str(error)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("base:8b", tiny_gguf(tmp_path / "base.gguf", KEYS), template=GO)
        yield engine


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(fake.url) as opened:
        yield opened


async def test_whoever_names_a_model_that_is_not_there_hears_how_this_engine_comes_by_one(
    client: OllamaClient, fake: FakeOllama
) -> None:
    with pytest.raises(NotFound) as caught:
        await resolve_base(client, "gone:1")
    remedied(caught.value, "gone:1: the engine at", "`ollama pull gone:1` fetches it; there are base:8b")
    fake.version = "0.30.1-abliterated.embedded"
    with pytest.raises(NotFound) as caught:
        await resolve_base(client, "gone:1")
    remedied(caught.value, "can't fetch models: give a .gguf file or hf:ORG/REPO, or install Ollama")
    fake.faults["GET /api/tags"] = [status(500, "out of order")] * 9
    with pytest.raises(NotFound, match="`ollama pull gone:1` fetches it"):
        await resolve_base(client, "gone:1")


@pytest.fixture
async def base(client: OllamaClient) -> Base:
    return await resolve_base(client, "base:8b")


@pytest.fixture
def product(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "model.gguf", {**KEYS, "abliterated.content": "c0ffee"})


# -- the wire ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "remedy"),
    [
        (status(500, "write: no space left on device"), EngineDiskFull, "Free space where Ollama keeps its models"),
        (status(404, "not here"), NotFound, "`ollama list`"),
        (status(403, ""), EngineRefused, "use 127.0.0.1"),
        (status(500), EngineFailed, "journalctl -u ollama"),
        (status(503, "server busy"), EngineUnavailable, "Try again"),
        (status(400, "invalid model name"), EngineRefused, "journalctl -u ollama"),
    ],
)
async def test_every_no_of_an_engine_names_the_next_step(
    fake: FakeOllama, client: OllamaClient, fault: Fault, kind: type[AbliteratedError], remedy: str
) -> None:
    fake.faults["POST /api/show"] = [fault]
    with pytest.raises(kind) as caught:
        await client.show("any")
    remedied(caught.value, "/api/show", remedy)


async def test_a_creation_that_breaks_off_says_how_far_it_came(fake: FakeOllama, client: OllamaClient) -> None:
    fake.faults["POST /api/create"] = [says({"status": "writing manifest"})]
    with pytest.raises(EngineUnavailable) as caught:
        await client.create({"model": "new", "files": {}})
    remedied(caught.value, "creating new ended after 'writing manifest'", "safe to run again")


async def test_an_address_that_is_none() -> None:
    async with OllamaClient("ftp://somewhere") as client:
        with pytest.raises(EngineRefused) as caught:
            await client.version()
    remedied(caught.value, "'ftp://somewhere' is no address of an engine", "proxy.upstream")


async def test_a_file_that_goes_away_before_or_while_it_is_sent(client: OllamaClient, tmp_path: Path) -> None:
    with pytest.raises(DiskError) as hashed:
        hash_file(tmp_path / "gone")
    remedied(hashed.value, "gone: can't be read (No such file")
    with pytest.raises(DiskError) as sent:
        await client.push_blob(tmp_path / "gone", NONE)
    remedied(sent.value, "gone: can't be read (No such file")
    with pytest.raises(DiskError) as read:
        await client.push_blob(tmp_path, NONE)
    remedied(read.value, f"{tmp_path}: can't be read (Is a directory")


async def test_a_file_that_changed_under_our_hands(client: OllamaClient, product: Path) -> None:
    with pytest.raises(ModelError) as caught:
        await client.push_blob(product, NONE)
    remedied(caught.value, "changed after it was made", "Run the recipe again")


# -- the base ------------------------------------------------------------------------------------------------------


async def test_a_base_whose_file_is_not_for_this_user_or_can_not_be_read(
    fake: FakeOllama, client: OllamaClient, base: Base
) -> None:
    base.blob_path.chmod(0)
    with as_nobody(), pytest.raises(ModelError) as forbidden:
        await resolve_base(client, "base:8b")
    remedied(forbidden.value, "may not be read by this user", "usermod -aG ollama")
    base.blob_path.unlink()
    base.blob_path.mkdir()
    fake.answers["/api/show"] = shows(f"FROM {base.blob_path}\n")
    with pytest.raises(ModelError) as broken:
        await resolve_base(client, "base:8b")
    remedied(broken.value, "can't be read (Is a directory)")


def shows(modelfile: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def show(_: web.Request) -> web.Response:
        return web.json_response({"modelfile": modelfile, "details": {"format": "gguf"}, "capabilities": []})

    return show


def test_a_text_no_modelfile_can_quote() -> None:
    with pytest.raises(ModelError) as caught:
        write(Modelfile(models=("/model.gguf",), system='a\n"""\nPARAMETER stop x'))
    remedied(caught.value, "no modelfile can quote", "as JSON")


# -- registration --------------------------------------------------------------------------------------------------


async def test_a_success_that_is_none(fake: FakeOllama, client: OllamaClient, product: Path, base: Base) -> None:
    fake.faults["POST /api/create"] = [says({"status": "success"})]
    with pytest.raises(EngineUnavailable) as caught:
        await register(client, product, TARGET, base)
    remedied(caught.value, "said success, but has no such model", "safe to run again")


async def test_an_ollama_too_old(fake: FakeOllama, client: OllamaClient, product: Path) -> None:
    fake.version = "0.4.9"
    with pytest.raises(EngineRefused) as caught:
        await register(client, product, TARGET)
    remedied(caught.value, "Ollama 0.4.9", "too old", "Update it to 0.5")


async def test_a_product_that_is_not_the_one_that_was_made(client: OllamaClient, product: Path, base: Base) -> None:
    with pytest.raises(ModelError) as caught:
        await register(client, product, TARGET, base, digest=NONE)
    remedied(caught.value, f"{product}: its content changed", "`retry`")


async def test_a_projector_the_engine_has_lost(
    fake: FakeOllama, client: OllamaClient, product: Path, tmp_path: Path
) -> None:
    vision = fake.add("projector", tiny_gguf(tmp_path / "mmproj.gguf", {"general.architecture": "clip"}))
    fake.models[parse_name("base:8b").key()]["files"]["mmproj.gguf"] = vision
    seeing = await resolve_base(client, "base:8b")
    fake.blob(vision).unlink()
    with pytest.raises(ModelError) as caught:
        await register(client, product, TARGET, seeing)
    remedied(caught.value, fake.blob(vision).name, "engine has it no more", "`ollama pull`")


async def test_a_store_that_can_not_be_written(
    fake: FakeOllama, client: OllamaClient, product: Path, base: Base
) -> None:
    place = fake.blob(f"sha256:{hashlib.sha256(product.read_bytes()).hexdigest()}")
    (place / "something").mkdir(parents=True)
    with pytest.raises(DiskError) as caught:
        await register(client, product, TARGET, base)
    remedied(caught.value, f"{place}: can't be written", "Check that disk")


async def test_a_name_written_by_somebody_else_meanwhile(
    fake: FakeOllama, client: OllamaClient, product: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fake.add("other", tiny_gguf(tmp_path / "other.gguf", {**KEYS, "abliterated.content": "0ther"}))

    async def create(request: web.Request) -> web.StreamResponse:
        answer = await fake.post_create(request)
        fake.models[parse_name(fake.finished[-1]).key()]["files"] = {"model.gguf": other}
        return answer

    fake.answers["/api/create"] = create
    with pytest.raises(EngineRefused) as created:
        await register(client, product, TARGET, base)
    remedied(created.value, "shows other weights than the ones registered", "run it again")
    del fake.models[parse_name(TARGET).key()], fake.answers["/api/create"]

    async def copy(request: web.Request) -> web.Response:
        answer = await fake.post_copy(request)
        fake.models[parse_name(TARGET).key()] |= {"files": {"model.gguf": other}}
        return answer

    fake.answers["/api/copy"] = copy
    monkeypatch.setattr(admission, "certify_apart", proven)
    with pytest.raises(EngineUnavailable) as named:
        await admit(client, product, TARGET, base)
    remedied(named.value, "shows other weights than the ones registered", "tried again")


async def test_a_proven_model_that_is_gone_before_it_is_named(
    fake: FakeOllama, client: OllamaClient, product: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def copy(request: web.Request) -> web.Response:
        fake.models.pop(parse_name((await request.json())["source"]).key())
        return await fake.post_copy(request)

    fake.answers["/api/copy"] = copy
    monkeypatch.setattr(admission, "certify_apart", proven)
    with pytest.raises(EngineUnavailable) as caught:
        await admit(client, product, TARGET, base)
    remedied(caught.value, "-uncertified: is gone before it was given its name", "registered again")


async def proven(url: str, model: str, reference: str = "", **_: object) -> Certificate:
    """What is certified is others' business here."""
    return Certificate(model=model, reference=reference)


async def test_a_certifier_that_is_killed(fake: FakeOllama) -> None:
    asked = asyncio.Event()

    async def hangs(request: web.Request, engine: FakeOllama) -> web.StreamResponse | None:
        asked.set()
        await engine.stopped.wait()
        return None

    fake.faults["POST /api/show"] = [hangs]
    task = asyncio.create_task(certify_apart(fake.url, "base:8b"))
    await asyncio.wait_for(asked.wait(), 60)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "abliterated.ollama.certify_run" in child.cmdline():
                child.kill()
    with pytest.raises(CertificationUnfinished) as caught:
        await task
    fake.stopped.set()
    remedied(caught.value, "base:8b: the certifier ended with -9", "tried again")


# -- the importer --------------------------------------------------------------------------------------------------


async def test_an_engine_without_an_importer_or_one_that_makes_something_else(
    fake: FakeOllama, client: OllamaClient, base: Base, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(EngineRefused) as none:
        await import_folder(client, folder, tmp_path / "out.gguf")
    remedied(none.value, "Ollama 0.35.0 has no importer for safetensors", "[tools] converter")
    fake.version = "0.11.0"
    fake.answers["/api/show"] = shows("FROM /models/as-it-was\n")
    with pytest.raises(EngineRefused) as other:
        await import_folder(client, folder, tmp_path / "out.gguf")
    remedied(other.value, "something else than a GGUF", "[tools] converter")
    fake.answers["/api/show"] = shows(f"FROM {base.blob_path}\n")
    with pytest.raises(DiskError) as unwritten:
        await import_folder(client, folder, folder / "config.json" / "out.gguf")
    remedied(unwritten.value, "out.gguf: can't be written (Not a directory)")
    assert list(fake.models) == [parse_name("base:8b").key()], "the passing model is gone each time"


# -- repair --------------------------------------------------------------------------------------------------------


def spoil(fake: FakeOllama, folder: Path) -> dict[str, object]:
    """A model of the base's kind whose stop strings cut its calls."""
    fake.add("cut:8b", tiny_gguf(folder / "cut.gguf", {**KEYS, "x": "y"}), template=GO, renderer="qwen3-coder")
    model = fake.models[parse_name("cut:8b").key()]
    model["parameters"] = {"stop": ["<tool_call>"]}
    return model


async def test_an_engine_that_makes_something_else_of_a_repair_leaves_it_as_it_was(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    before = dict(spoil(fake, tmp_path))

    async def create(request: web.Request) -> web.StreamResponse:
        answer = await fake.post_create(request)
        fake.models[parse_name("cut:8b").key()]["parameters"] = {"stop": ["<tool_call>"]}
        return answer

    fake.answers["/api/create"] = create
    with pytest.raises(EngineRefused) as caught:
        await repair(client, "cut:8b", "base:8b")
    remedied(caught.value, "cut:8b: the engine made something else of it", "as it was", "Update Ollama")
    assert fake.models[parse_name("cut:8b").key()] == before


async def test_a_renderer_that_can_not_be_taken_from_blobs_nobody_shows(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    spoil(fake, tmp_path)
    answer = fake.show(fake.models[parse_name("cut:8b").key()])
    answer["modelfile"] += "ADAPTER /somewhere/adapter.bin\n"

    async def show(request: web.Request) -> web.Response:
        asked = (await request.json())["model"]
        return web.json_response(answer) if asked == "cut:8b" else await fake.post_show(request)

    fake.answers["/api/show"] = show
    with pytest.raises(ModelError) as caught:
        await repair(client, "cut:8b", "base:8b")
    remedied(caught.value, "cut:8b: its blobs are not shown", "Register it anew from its GGUF")


async def test_a_model_that_lost_something_and_has_no_kin_here(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    fake.models.clear()
    fake.add("lone:8b", tiny_gguf(tmp_path / "lone.gguf", KEYS), template="{{ .Prompt }} of its own")
    with pytest.raises(ModelError) as caught:
        await repair(client, "lone:8b")
    remedied(caught.value, "must come from a model of its kind", "--from BASE")
