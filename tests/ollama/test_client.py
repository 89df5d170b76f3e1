"""The client and an engine that misbehaves: what each failure is called, and what is never done to the engine."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from pathlib import Path

import pytest
from aiohttp import web

from abliterate.contract.errors import EngineRefused, EngineUnavailable, ModelError, NotFound
from abliterated.ollama.client import EngineDiskFull, OllamaClient, hash_file
from abliterated.ollama.version import Generation, read_version
from engines import free_port
from fake_ollama import FakeOllama, line, reset, says, status, stream, tiny_gguf

CREATE = {"model": "new", "files": {"model.gguf": ""}}


@pytest.fixture
async def fake(tmp_path: Path):
    async with FakeOllama(tmp_path / "store") as engine:
        yield engine


@pytest.fixture
async def client(fake: FakeOllama):
    async with OllamaClient(fake.url) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "generation", "too_old", "notes"),
    [
        ("0.4.7", Generation.LEGACY, True, 1),
        ("0.11.0", Generation.LEGACY, False, 1),
        ("0.17.1", Generation.LEGACY, False, 0),
        ("0.30.0-rc3", Generation.REWRITING, False, 0),
        ("0.34.0", Generation.REWRITING, False, 0),
        ("0.34.1", Generation.CURRENT, False, 0),
        ("1.0.0", Generation.CURRENT, False, 0),
        ("0.34.1-abliterated", Generation.EMBEDDED, False, 0),
        ("0.0.0", Generation.DEVELOPMENT, False, 1),
        ("nightly", Generation.DEVELOPMENT, False, 1),
    ],
)
def test_a_version_tells_its_generation(text: str, generation: Generation, too_old: bool, notes: int) -> None:
    version = read_version(text)
    assert (version.generation, version.too_old, len(version.notes())) == (generation, too_old, notes)


async def test_nobody_listening_is_worth_another_try() -> None:
    async with OllamaClient(f"127.0.0.1:{free_port()}") as client:
        with pytest.raises(EngineUnavailable, match="no engine answers at"):
            await client.version()


@pytest.mark.parametrize("address", ["ftp://x", "http://"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    async with OllamaClient(address) as client:
        with pytest.raises((EngineRefused, EngineUnavailable)):
            await client.version()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(500), EngineUnavailable),
        (status(503, "server busy"), EngineUnavailable),
        (status(400, "invalid model name"), EngineRefused),
        (status(403, ""), EngineRefused),
        (status(404, "not here"), NotFound),
        (status(500, "write: no space left on device"), EngineDiskFull),
        (reset, EngineUnavailable),
    ],
)
async def test_each_answer_has_its_error(fake: FakeOllama, client: OllamaClient, fault, error) -> None:
    fake.faults["POST /api/show"] = [fault]
    with pytest.raises(error):
        await client.show("any")


async def test_whatever_an_engine_says_is_told_in_one_line(fake: FakeOllama, client: OllamaClient) -> None:
    words = "llama runner process has terminated:\n  CUDA error\r\n\tout of memory " + "x" * 5000
    fake.faults["POST /api/show"] = [status(500, words)]
    with pytest.raises(EngineUnavailable) as told:
        await client.show("any")
    assert told.value.message.isprintable() and len(told.value.message) <= 2000
    fake.faults["POST /api/create"] = [says({"error": words})]
    with pytest.raises(EngineRefused, match="has terminated: CUDA error out of memory x") as refused:
        await client.create(CREATE)
    assert "\n" not in refused.value.message


async def test_a_failure_inside_a_200_is_a_refusal(fake: FakeOllama, client: OllamaClient) -> None:
    fake.faults["POST /api/create"] = [says({"error": "unsupported architecture"})]
    with pytest.raises(EngineRefused, match="unsupported architecture"):
        await client.create(CREATE)


@pytest.mark.parametrize("fault", [says({"status": "writing manifest"}), says(b'{"status": "wri'), says(cut=True)])
async def test_a_stream_without_success_is_no_success(fake: FakeOllama, client: OllamaClient, fault) -> None:
    fake.faults["POST /api/create"] = [fault]
    with pytest.raises(EngineUnavailable):
        await client.create(CREATE)


async def test_a_cancelled_caller_stays_until_the_creation_has_ended(fake: FakeOllama, client: OllamaClient) -> None:
    begun, go_on, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request, _: FakeOllama) -> web.StreamResponse:
        response = await stream(request, {"status": "parsing GGUF"})
        begun.set()
        await go_on.wait()
        if request.transport is None or request.transport.is_closing():
            left.set()
        await line(response, {"status": "success"})
        return response

    fake.faults["POST /api/create"] = [slow]
    caller = asyncio.create_task(client.create(CREATE))
    await begun.wait()
    caller.cancel()
    done, _ = await asyncio.wait([caller], timeout=0.2)
    assert not done
    caller.cancel()  # insisting doesn't help
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not left.is_set()


async def test_a_listener_that_fails_does_not_end_the_creation(fake: FakeOllama, client: OllamaClient, caplog) -> None:
    fake.faults["POST /api/create"] = [says({"status": "success"})]

    def broken(*_: object) -> None:
        raise RuntimeError("nobody home")

    await client.create(CREATE, broken)
    assert "progress can't be reported" in caplog.text


async def test_a_blob_is_sent_once(fake: FakeOllama, client: OllamaClient, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(range(256)) * 20_000)
    seen: list[tuple[str, int, int]] = []
    digest = await client.push_blob(file, report=lambda *step: seen.append(step))
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" == hash_file(file)
    assert fake.blob(digest).read_bytes() == file.read_bytes()
    assert seen[0][0] == "hashing" and seen[-1] == ("uploading", 5_120_000, 5_120_000)
    await client.push_blob(file, digest)
    assert fake.requests.count("POST /api/blobs") == 1


async def test_a_file_that_changed_is_never_uploaded_whole(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one" * 1_000_000)
    digest = hash_file(file)
    file.write_bytes(b"two" * 1_000_000)
    with pytest.raises(ModelError, match="changed after it was made"):
        await client.push_blob(file, digest)
    assert list(fake.blobs.iterdir()) == []


async def test_a_digest_the_engine_does_not_confirm_is_refused(
    fake: FakeOllama, client: OllamaClient, tmp_path: Path
) -> None:
    fake.faults["POST /api/blobs"] = [status(400, "digest mismatch")]
    with pytest.raises(EngineRefused, match="digest mismatch"):
        await client.push_blob(tiny_gguf(tmp_path / "model.gguf", {}))


async def test_an_upload_that_breaks_is_tried_once_more(fake: FakeOllama, client: OllamaClient, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf", {}, padding=3_000_000)
    fake.faults["POST /api/blobs"] = [reset]
    digest = await client.push_blob(file)
    assert fake.blob(digest).stat().st_size == file.stat().st_size


async def test_an_answer_before_the_body_was_read_counts(tmp_path: Path) -> None:
    """Go answers a blob it has with 200, reads nothing, and resets the connection."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head.split(b" ")[0])
        present = heads.count(b"HEAD") > 1 or heads[-1] == b"POST"
        answer = b"200 OK" if present else b"404 Not Found"
        writer.write(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        if heads[-1] == b"POST":
            plain = writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(30_000_000))
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, OllamaClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        assert await client.push_blob(file) == hash_file(file)
    assert heads[:2] == [b"HEAD", b"POST"]


async def test_copy_delete_and_unload(fake: FakeOllama, client: OllamaClient, tmp_path: Path) -> None:
    fake.add("a:1", tiny_gguf(tmp_path / "a.gguf", {}))
    await client.copy("a:1", "b:1")
    assert {row["name"] for row in await client.tags()} == {"a:1", "b:1"}
    assert await client.unload("b:1")
    await client.delete("b:1")
    with pytest.raises(NotFound):
        await client.delete("b:1")
    with pytest.raises(NotFound):
        await client.copy("c:1", "d:1")
    answer = await client.chat_once("a:1", [{"role": "user", "content": "hello"}])
    assert answer["message"]["content"] == "a quiet answer"
