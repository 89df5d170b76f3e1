"""Ollama's routes around models: version, tags, show, ps, blobs, create, copy, delete; and those it says no to.

Does not know: inference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import psutil
from aiohttp import web

from abliterated.engine import show
from abliterated.engine.create import CreateRequest, check
from abliterated.engine.errors import model_not_found
from abliterated.engine.header import read_header
from abliterated.engine.models import Model
from abliterated.engine.ollama_api import SERVICE
from abliterated.engine.replies import answer, ndjson, read
from abliterated.engine.service import Service
from abliterated.engine.store import Stored, read_digest, read_name
from abliterated.shapes.refusals import Refused

# The generation whose API this is. A pre-release of 0.30.1 orders above 0.30.0, which a client may ask for as the
# least; clients that split at '-' or compare by semantic versions both read it.
VERSION = "0.30.1-abliterated.embedded"
FOREVER = 253_370_764_800.0  # the end of the year 9998, for a model that stays


class ModelRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    name: str | None = None
    verbose: bool | None = None
    system: str | None = None


class CopyRequest(msgspec.Struct, frozen=True):
    source: str | None = None
    destination: str | None = None


async def root(_: web.Request) -> web.Response:
    return web.Response(text="Ollama is running")


async def version(_: web.Request) -> web.Response:
    return answer({"version": VERSION})


async def status(_: web.Request) -> web.Response:
    return answer({"cloud": {"disabled": True, "source": "engine"}})


async def tags(http: web.Request) -> web.Response:
    service = http.app[SERVICE]

    def every() -> list[dict[str, Any]]:
        return [show.listing(stored, _try(service, stored)) for stored in service.store.all()]

    return answer({"models": await asyncio.to_thread(every)})


def _try(service: Service, stored: Stored) -> Model | None:
    """A model we can't open is listed all the same, so that it can be deleted."""
    try:
        return service.library.open(stored)
    except Refused:
        return None


async def show_route(http: web.Request) -> web.Response:
    request = await read(http, ModelRequest)
    service = http.app[SERVICE]
    model = await asyncio.to_thread(service.model, request.model or request.name)
    values = model.header.values
    if request.verbose:
        values = (await asyncio.to_thread(read_header, model.path, keep=1 << 62)).values
    return answer(show.show(model, values=values, system=request.system or None))


async def ps(http: web.Request) -> web.Response:
    service = http.app[SERVICE]
    entries: list[dict[str, object]] = []
    for runner in list(service.pool.runners.values()):
        # Answering and embedding are two runners of one model.
        if any(entry["name"] == runner.want.name for entry in entries):
            continue
        stored = service.store.find(read_name(runner.want.name)) if runner.loaded else None
        model = _try(service, stored) if stored else None
        if not runner.loaded or model is None:
            continue
        size = max(_resident(runner.pid), runner.want.path.stat().st_size)
        expires = runner.expires if runner.users == 0 and runner.keep is not None else None
        keep = runner.keep if runner.keep is not None else None
        if expires is None:
            expires = FOREVER if keep is None else time.time() + keep
        entries.append(
            {
                "name": runner.want.name,
                "model": runner.want.name,
                "size": size,
                "digest": runner.want.digest,
                "details": model.details,
                "expires_at": show.stamp(expires),
                "size_vram": size if runner.gpu else 0,
                "context_length": runner.want.load.context,
            }
        )
    return answer({"models": entries})


def _resident(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0


async def has_blob(http: web.Request) -> web.Response:
    found = http.app[SERVICE].store.has(read_digest(http.match_info["digest"]))
    return web.Response(status=200 if found else 404)


async def put_blob(http: web.Request) -> web.Response:
    """Streamed to a temporary file in the store, named only when its digest is right."""
    digest = read_digest(http.match_info["digest"])
    store = http.app[SERVICE].store
    if store.has(digest):
        return web.Response(status=200)
    upload = store.upload()
    try:
        async for data in http.content.iter_chunked(1 << 20):
            await asyncio.to_thread(upload.add, data)
        await asyncio.to_thread(upload.finish, digest)
    finally:
        upload.discard()
    return web.Response(status=201)


async def create(http: web.Request) -> web.StreamResponse:
    request = await read(http, CreateRequest)
    check(request)
    service = http.app[SERVICE]
    steps: asyncio.Queue[dict[str, str] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(status: str) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, {"status": status})

    async def work() -> None:
        try:
            await service.creator.create(request, tell)
        finally:
            loop.call_soon_threadsafe(steps.put_nowait, None)

    # A client that leaves does not undo a creation: it ends, with the model there or nothing.
    task = asyncio.create_task(work())
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def progress() -> AsyncIterator[dict[str, str]]:
        while (step := await steps.get()) is not None:
            yield step
        await asyncio.shield(task)

    if request.stream is False:
        await asyncio.shield(task)
        return answer({"status": "success"})
    return await ndjson(http, progress())


async def copy(http: web.Request) -> web.Response:
    request = await read(http, CopyRequest)
    service = http.app[SERVICE]
    source, destination = read_name(request.source), read_name(request.destination)
    async with service.lock:
        stored = service.store.find(source)
        if stored is None:
            raise Refused(404, f'model "{request.source}" not found')
        await asyncio.to_thread(service.store.put, destination, stored.manifest)
    return web.Response(status=200)


async def delete(http: web.Request) -> web.Response:
    request = await read(http, ModelRequest)
    service = http.app[SERVICE]
    name = request.model or request.name
    async with service.lock:
        stored = service.store.find(read_name(name))
        if stored is None:
            raise model_not_found(name or "")
        paths = [service.store.blob(layer.digest) for layer in stored.layers("model")]
        await asyncio.to_thread(service.store.delete, stored)
    for path in paths:
        if not path.exists():
            await service.pool.unload(path)
    return web.Response(status=200)


async def no_registry(_: web.Request) -> web.Response:
    raise Refused(
        400,
        "the embedded engine has no registry to pull from or push to",
        remedy="Import a GGUF with /api/blobs and /api/create, or install Ollama",
    )
