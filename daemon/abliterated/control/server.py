"""The routes on the unix socket. Parses, calls, answers; decisions are made elsewhere.

Who may connect is the socket file's mode; who did is asked of the kernel and written into the journal. Does not know
workers, the spool or Ollama.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil
from aiohttp import web

from abliterate.contract.errors import AbliteratedError, ConflictError, DiskError, NotFound, RecipeError
from abliterate.contract.messages import Clean, Cleaned, EngineView, ErrorBody, JobView, Status, Submit, Submitted
from abliterate.contract.report import PAGE_FILE, REPORT_FILE
from abliterate.contract.states import TERMINAL
from abliterated import __version__
from abliterated.control import metrics
from abliterated.control.events import Events, frame

log = logging.getLogger(__name__)

BODY_LIMIT = 256 * 1024
LOG_POLL_SECONDS = 0.2
STATUS: tuple[tuple[type[AbliteratedError], int], ...] = ((NotFound, 404), (ConflictError, 409), (DiskError, 507))
REPORTS = {"json": (REPORT_FILE, "application/json"), "html": (PAGE_FILE, "text/html")}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Any  # aiohttp's own type of it is private


class Desk(Protocol):
    """What the routes may ask of the daemon; `abliterated.desk` answers."""

    @property
    def paused(self) -> bool: ...
    async def jobs(self) -> list[JobView]: ...
    async def job(self, part: str) -> JobView: ...
    async def act(self, verb: str, job_id: str, actor: str) -> JobView: ...
    @property
    def draining(self) -> bool: ...
    async def pause(self, paused: bool) -> None: ...
    async def drain(self) -> None: ...
    async def clean(self, days: float | None) -> Cleaned: ...
    async def submit(self, wanted: Submit, actor: str) -> Submitted: ...
    async def replay(self, after: int) -> list[tuple[int, JobView]]: ...
    async def engine(self) -> EngineView: ...
    def log_file(self, job_id: str) -> Path: ...
    def report_file(self, job_id: str, name: str) -> Path: ...
    def proxy_address(self) -> str: ...
    def proxy_numbers(self) -> Mapping[str, float]: ...

    def proxy_text(self) -> str: ...


class Control:
    """The routes. `events` is where every change of a job is told."""

    def __init__(self, desk: Desk, events: Events, more: Sequence[web.RouteDef] = ()) -> None:
        self._desk = desk
        self._more = more
        self._events = events
        self._since = time.monotonic()
        self._stopping = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """Every route there is."""
        return [
            web.get("/v1/status", self.status),
            web.get("/v1/jobs", self.list_jobs),
            web.post("/v1/jobs", self.submit),
            web.get("/v1/jobs/{id}", self.show_job),
            web.get("/v1/jobs/{id}/log", self.log),
            web.get("/v1/jobs/{id}/report", self.report),
            web.post("/v1/jobs/{id}/{verb:cancel|hold|release|retry}", self.act),
            web.get("/v1/events", self.follow),
            web.post("/v1/queue/{verb:pause|resume|drain}", self.queue),
            web.post("/v1/clean", self.clean),
            web.get("/metrics", self.metrics),
            web.get("/v1/openapi.json", self.describe),
            *self._more,
        ]

    def application(self, *guards: Middleware) -> web.Application:
        """The routes as an application, behind `guards`."""
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_answer_errors, *guards])
        app.add_routes(self.routes())
        return app

    def stop(self) -> None:
        """End the streams, so that the server can close."""
        self._stopping.set()

    async def status(self, request: web.Request) -> web.Response:
        """The daemon, its engine and every job not yet cleaned away."""
        engine, jobs = await asyncio.gather(self._desk.engine(), self._desk.jobs())
        return _json(
            Status(
                version=__version__,
                pid=os.getpid(),
                uptime=time.monotonic() - self._since,
                paused=self._desk.paused,
                draining=self._desk.draining,
                proxy=self._desk.proxy_address(),
                engine=engine,
                jobs=jobs,
            )
        )

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Every job not yet cleaned away."""
        return _json({"jobs": await self._desk.jobs()})

    async def submit(self, request: web.Request) -> web.Response:
        """Queue a recipe; an id known already adds nothing."""
        try:
            wanted = msgspec.json.decode(await request.read(), type=Submit)
        except msgspec.DecodeError as error:
            raise RecipeError(f"not a submission: {error}", remedy='Send {"recipe": "<TOML>"}') from error
        done = await self._desk.submit(wanted, actor(request))
        return _json(done, status=200 if done.existing else 201)

    async def show_job(self, request: web.Request) -> web.Response:
        """One job, by its id or at least four characters of it."""
        return _json(await self._job(request))

    async def act(self, request: web.Request) -> web.Response:
        """Cancel, hold, release or retry a job."""
        job = await self._job(request)
        return _json(await self._desk.act(request.match_info["verb"], job.id, actor(request)))

    async def queue(self, request: web.Request) -> web.Response:
        """Pause, resume or drain the queue; a drain answers when nothing is at work any more."""
        verb = request.match_info["verb"]
        if verb == "drain":
            await self._desk.drain()
        else:
            await self._desk.pause(verb == "pause")
        return _json({"paused": self._desk.paused, "draining": self._desk.draining})

    async def clean(self, request: web.Request) -> web.Response:
        """Forget jobs that ended long ago."""
        try:
            wanted = msgspec.json.decode(await request.read() or b"{}", type=Clean)
        except msgspec.DecodeError as error:
            raise RecipeError(f"not understood: {error}", remedy='Send {"days": 90}') from error
        if wanted.days is not None and not 0 <= wanted.days <= 36_500:
            raise RecipeError(f"{wanted.days:g} days: out of range", remedy="Give 0 to 36500")
        return _json(await self._desk.clean(wanted.days))

    async def describe(self, request: web.Request) -> web.Response:
        """This API as an OpenAPI document."""
        from abliterated.control.openapi import text

        return web.Response(text=text(self.routes()), content_type="application/json")

    async def metrics(self, request: web.Request) -> web.Response:
        """The queue and the proxy as Prometheus text."""
        jobs = await self._desk.jobs()
        page = metrics.text(
            states=[job.state for job in jobs],
            uptime=time.monotonic() - self._since,
            resident=psutil.Process().memory_info().rss,
            proxy=self._desk.proxy_numbers(),
            more=self._desk.proxy_text(),
        )
        return web.Response(text=page, content_type="text/plain", headers={"Cache-Control": "no-store"})

    async def log(self, request: web.Request) -> web.StreamResponse:
        """The job's log from `offset`; with `follow` until the job has ended."""
        job = await self._job(request)
        follow = request.query.get("follow", "") in ("1", "true", "yes")
        offset = request.query.get("offset", "0")
        place = int(offset) if offset.isdigit() else 0
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        path = self._desk.log_file(job.id)
        while True:
            # Asked before reading: what was written before the end is read after it.
            ended = (await self._desk.job(job.id)).state in TERMINAL
            while piece := await asyncio.to_thread(_read, path, place):
                place += len(piece)
                await response.write(piece)
            if not follow or ended or self._stopping.is_set():
                return response
            await asyncio.sleep(LOG_POLL_SECONDS)

    async def report(self, request: web.Request) -> web.Response:
        """The job's report: as JSON, or the page with `format=html`."""
        job = await self._job(request)
        asked = request.query.get("format", "json")
        if asked not in REPORTS:
            raise RecipeError(f"{asked!r} is no format of a report", remedy="Ask for format=json or format=html")
        name, kind = REPORTS[asked]
        try:
            body = await asyncio.to_thread(self._desk.report_file(job.id, name).read_bytes)
        except FileNotFoundError as error:
            raise NotFound(
                f"job {job.id} has no report: it is {job.state}", remedy="A job leaves one when it has succeeded"
            ) from error
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    async def follow(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events; `Last-Event-ID` replays the transitions after it."""
        listener = self._events.listen()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            await response.prepare(request)
            seen = 0
            last = request.headers.get("Last-Event-ID") or request.query.get("after") or ""
            if last.isdigit():
                for number, view in await self._desk.replay(int(last)):
                    await response.write(frame(number, view))
                    seen = number
            await response.write(b": listening\n\n")
            while not self._stopping.is_set() and not listener.lost:
                taken = await self._take(listener)
                new = [frame(number, view) for number, view in taken if not 0 < number <= seen]
                await response.write(b"".join(new) or b": still here\n\n")
        finally:
            self._events.leave(listener)
        return response

    async def _take(self, listener: Any) -> Any:
        take = asyncio.ensure_future(listener.take())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
            return take.result() if take.done() else []
        finally:
            take.cancel()
            stop.cancel()

    async def _job(self, request: web.Request) -> JobView:
        return await self._desk.job(request.match_info["id"])


def actor(request: web.Request) -> str:
    """Who asked, for the journal: uid and pid of the peer."""
    peer = request.transport.get_extra_info("socket") if request.transport else None
    uid, pid = peer_of(peer)
    return f"uid {uid} pid {pid}"


def peer_of(peer: Any) -> tuple[int, int]:
    """uid and pid of a unix socket's other end; -1 where the system doesn't tell."""
    if peer is not None and sys.platform.startswith("linux"):
        pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return uid, pid
    return -1, -1


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _json(ErrorBody(error=error.reason, remedy="See the control API's reference"), status=error.status)
    except AbliteratedError as error:
        status = next((code for kind, code in STATUS if isinstance(error, kind)), 400)
        return _json(ErrorBody(error=error.message, remedy=error.remedy, exit_code=error.exit_code), status=status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path, extra={"action": "bug"})
        return _json(ErrorBody(error="internal error", remedy="See the daemon's log"), status=500)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _read(path: Path, place: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(place)
            return file.read(64 * 1024)
    except FileNotFoundError:
        return b""
