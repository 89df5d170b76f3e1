"""Whether what the engine shows is what was given to it, and how it came there without a copy, or with one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from abliterate.contract.errors import EngineRefused
from abliterate.contract.names import parse_name
from abliterated.ollama import store
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import describe_base, resolve_base
from abliterated.ollama.register import register
from fake_ollama import FakeOllama, tiny_gguf

TARGET = "base-abliterated:8b"
KEYS = {"general.architecture": "llama", "tokenizer.chat_template": "{% for %}"}


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOllama]:
    async with FakeOllama(tmp_path / "store") as engine:
        engine.add("base:8b", tiny_gguf(tmp_path / "base.gguf", KEYS), template="{{ .Tools }}")
        yield engine


@pytest.fixture
def product(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tiny_gguf(tmp_path / "out" / "model.gguf", {**KEYS, "abliterated.content": "c0ffee"}, padding=100_000)


def makes(fake: FakeOllama, **otherwise: Any) -> None:
    """From now on a creation ends well, and the model is another than was asked for."""

    async def create(request: web.Request) -> web.StreamResponse:
        response = await fake.post_create(request)
        fake.models[parse_name(TARGET).key()] |= otherwise
        return response

    fake.answers["/api/create"] = create


def other_blob(fake: FakeOllama, folder: Path, **keys: str) -> dict[str, str]:
    file = tiny_gguf(folder / "other.gguf", {**KEYS, **keys}, padding=5)
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    shutil.copyfile(file, fake.blob(digest))
    return {"model.gguf": digest}


@pytest.mark.parametrize("keys", [{"abliterated.content": "0ther"}, {}], ids=["other key", "no key"])
async def test_other_weights_under_the_name_are_no_registration(
    fake: FakeOllama, product: Path, tmp_path: Path, keys: dict[str, str]
) -> None:
    makes(fake, files=other_blob(fake, tmp_path, **keys))
    async with OllamaClient(fake.url) as client:
        with pytest.raises(EngineRefused, match="shows other weights than the ones registered"):
            await register(client, product, TARGET, await resolve_base(client, "base:8b"))


async def test_where_the_key_is_not_shown_the_blobs_digest_is_the_proof(
    fake: FakeOllama, product: Path, tmp_path: Path
) -> None:
    """An engine elsewhere that tells of no key of ours: its file can't be looked into either."""
    fake.elsewhere = "/somewhere/else/models/blobs"
    makes(fake, show={"model_info": {"general.architecture": "llama"}})
    async with OllamaClient(fake.url, local=False) as client:
        done = await register(client, product, TARGET, await describe_base(client, "base:8b"))
        assert done.layer == done.digest
        assert any("identity rests on the blob's digest" in note for note in done.notes)
        del fake.models[parse_name(TARGET).key()]
        makes(fake, files=other_blob(fake, tmp_path), show={"model_info": {"general.architecture": "llama"}})
        with pytest.raises(EngineRefused, match="other weights"):
            await register(client, product, TARGET, await describe_base(client, "base:8b"))


async def test_a_gguf_written_anew_by_an_engine_that_keeps_them_is_noted(
    fake: FakeOllama, product: Path, tmp_path: Path
) -> None:
    makes(fake, files=other_blob(fake, tmp_path, **{"abliterated.content": "c0ffee"}))
    async with OllamaClient(fake.url) as client:
        done = await register(client, product, TARGET, await resolve_base(client, "base:8b"))
    assert any("the engine wrote the GGUF anew" in note for note in done.notes)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=shared))
    yield folder
    shutil.rmtree(folder)


async def test_a_store_on_another_file_system_gets_a_copy_over_http(
    other_disk: Path, product: Path, tmp_path: Path
) -> None:
    async with FakeOllama(other_disk / "store") as fake, OllamaClient(fake.url) as client:
        fake.add("base:8b", tiny_gguf(tmp_path / "base.gguf", KEYS))
        done = await register(client, product, TARGET, await resolve_base(client, "base:8b"))
        assert not done.linked
        assert fake.requests.count("POST /api/blobs") == 1
        assert fake.blob(done.digest).read_bytes() == product.read_bytes()
        assert sorted(path.name for path in fake.blobs.iterdir() if not path.name.startswith("sha256-")) == []


def test_a_blob_put_there_counts_as_new_and_may_be_read_by_the_engine(tmp_path: Path, product: Path) -> None:
    """Ollama removes what no manifest names once it is an hour old; and it is often another user."""
    os.utime(product, (1_000_000_000, 1_000_000_000))
    product.chmod(0o600)
    folder = tmp_path / "blobs"
    folder.mkdir()
    assert store.link(product, "sha256:" + "0" * 64, folder)
    blob = store.blob_path(folder, "sha256:" + "0" * 64).stat()
    assert blob.st_mtime > 1_500_000_000 and blob.st_mode & 0o777 == 0o644


def test_where_no_hard_link_can_be_a_shared_copy_is_tried(
    tmp_path: Path, product: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few test machines have a file system that shares extents; the kernel's part is played here."""
    shared: list[int] = []

    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def clone(target: int, request: int, source: int) -> int:
        shared.append(request)
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return 0

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(fcntl, "ioctl", clone)
    folder = tmp_path / "blobs"
    folder.mkdir()
    digest = "sha256:" + "0" * 64
    assert store.link(product, digest, folder)
    assert shared == [0x40049409]
    assert [path.name for path in folder.iterdir()] == ["sha256-" + "0" * 64]
    assert store.blob_path(folder, digest).read_bytes() == product.read_bytes()
    assert not store.blob_path(folder, digest).samefile(product)


def test_where_neither_can_be_nothing_is_left(tmp_path: Path, product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "blobs").mkdir()
    if store.link(product, "sha256:" + "0" * 64, tmp_path / "blobs"):
        pytest.skip("this file system shares extents")
    assert list((tmp_path / "blobs").iterdir()) == []
