"""A daemon in a thread: the control API on a real unix socket, jobs that a test moves by hand."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import EngineView, ErrorBody, JobView, Status, Submit, Submitted
from abliterate.contract.recipe import parse_recipe, target_name
from abliterate.contract.states import TERMINAL, State

_AFTER: dict[str, tuple[frozenset[str], State]] = {
    "cancel": (frozenset({"queued", "held", "running"}), "cancelled"),
    "hold": (frozenset({"queued"}), "held"),
    "release": (frozenset({"held"}), "queued"),
    "retry": (frozenset({"failed", "cancelled"}), "queued"),
}


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = True
    request_queue_size = 64


class FakeDaemon:
    """Start it with `start`, put jobs with `put`; `stop` breaks every connection as a crash would."""

    def __init__(self, socket_path: Path) -> None:
        self.path = socket_path
        self.jobs: dict[str, JobView] = {}
        self.logs: dict[str, bytes] = {}
        self.reports: dict[str, dict[str, bytes]] = {}
        self.submitted: dict[str, Submit] = {}
        self.paused = False
        self.without_events = False
        self.metrics = ""
        self.listeners = 0
        self.changed = threading.Condition()
        self.events: list[JobView] = []
        self.running = False
        self._connections: set[socket.socket] = set()

    def start(self) -> FakeDaemon:
        self.running = True
        self._server = _Server(str(self.path), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        if not self.running:
            return
        with self.changed:
            self.running = False
            self.changed.notify_all()
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)
        self.path.unlink(missing_ok=True)

    def put(self, job: JobView) -> JobView:
        """Add or change a job; everybody who listens hears of it."""
        with self.changed:
            self.jobs[job.id] = job
            self.events.append(job)
            self.changed.notify_all()
        return job

    def change(self, job: str, **fields: Any) -> JobView:
        return self.put(msgspec.structs.replace(self.jobs[job], **fields))

    def write_log(self, job: str, text: bytes) -> None:
        with self.changed:
            self.logs[job] = self.logs.get(job, b"") + text
            self.changed.notify_all()

    def wait_for_listener(self, count: int = 1, deadline: float = 60) -> None:
        """Until `count` clients read a stream."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.listeners >= count, deadline), "nobody listens"

    def find(self, piece: str) -> JobView | None:
        found = [job for name, job in self.jobs.items() if name.startswith(piece) or name.endswith(piece)]
        return found[0] if len(found) == 1 else None

    def status(self) -> Status:
        return Status(
            version="9.9.9",
            pid=1,
            uptime=1.5,
            paused=self.paused,
            proxy="127.0.0.1:11434",
            engine=EngineView(kind="ollama", url="http://127.0.0.1:11435", version="0.34.1", answers=True),
            jobs=list(self.jobs.values()),
        )


def _handler(owner: FakeDaemon) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def setup(self) -> None:
            with owner.changed:
                owner._connections.add(self.request)
                if not owner.running:  # accepted while it stops: nobody else would end it
                    with contextlib.suppress(OSError):
                        self.request.shutdown(socket.SHUT_RDWR)
            super().setup()

        def finish(self) -> None:
            owner._connections.discard(self.request)
            with contextlib.suppress(OSError):
                super().finish()

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")
            if parts == ["metrics"]:
                self._text(owner.metrics)
            elif parts == ["v1", "status"]:
                self._answer(200, owner.status())
            elif parts == ["v1", "jobs"]:
                self._answer(200, {"jobs": list(owner.jobs.values())})
            elif parts == ["v1", "events"] and not owner.without_events:
                self._stream_events()
            elif parts[:2] == ["v1", "jobs"] and len(parts) in (3, 4):
                job = owner.find(parts[2])
                if job is None:
                    self._no_job(parts[2])
                elif len(parts) == 3:
                    self._answer(200, job)
                elif parts[3] == "report":
                    self._report(job.id, parse_qs(url.query).get("format", ["json"])[0])
                else:
                    query = parse_qs(url.query)
                    self._stream_log(job.id, "follow" in query, int(query.get("offset", ["0"])[0]))
            else:
                self._answer(404, ErrorBody(error=f"no route {url.path}", exit_code=1))

        def _report(self, job: str, form: str) -> None:
            content = owner.reports.get(job, {}).get(form)
            if content is None:
                error = f"job {job} has no report: it is {owner.jobs[job].state}"
                self._answer(404, ErrorBody(error=error, remedy="A job leaves one when it has succeeded", exit_code=7))
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = self.path.strip("/").split("/")
            if parts == ["v1", "jobs"]:
                self._submit(msgspec.json.decode(body, type=Submit))
            elif parts[:2] == ["v1", "queue"]:
                owner.paused = parts[2] == "pause"
                self._answer(200, {"paused": owner.paused})
            else:
                job = owner.find(parts[2])
                if job is None:
                    self._no_job(parts[2])
                    return
                allowed, after = _AFTER[parts[3]]
                if job.state not in allowed:
                    error = ErrorBody(error=f"job {job.id} is {job.state}", remedy="Nothing to do", exit_code=6)
                    self._answer(409, error)
                    return
                reason = {"held": "user"}.get(after, "")
                self._answer(200, owner.change(job.id, state=after, reason=reason))

        def _submit(self, submit: Submit) -> None:
            known = submit.id in owner.jobs
            try:
                recipe = parse_recipe(submit.recipe.encode())
            except RecipeError as error:
                self._answer(400, ErrorBody(error=error.message, remedy=error.remedy, exit_code=2))
                return
            target = target_name(recipe).short()
            if not known:
                owner.submitted[submit.id] = submit
                owner.put(JobView(id=submit.id, label=submit.label, model=recipe.model, target=target, state="queued"))
            self._answer(200 if known else 201, Submitted(id=submit.id, target=target, existing=known))

        def _no_job(self, piece: str) -> None:
            self._answer(404, ErrorBody(error=f"no job {piece}", remedy="`abliterate status` lists them", exit_code=7))

        def _answer(self, status: int, value: Any) -> None:
            content = msgspec.json.encode(value)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def _text(self, text: str) -> None:
            content = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _begin(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()

        def _chunk(self, content: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            self.wfile.flush()

        def _stream_events(self) -> None:
            self.close_connection = True
            with owner.changed:
                seen = len(owner.events)
                owner.listeners += 1
                owner.changed.notify_all()
            try:
                self._begin("text/event-stream")
                self._chunk(b": hello\n\n")
                while owner.running:
                    with owner.changed:
                        if len(owner.events) == seen:
                            owner.changed.wait(0.5)
                        fresh, seen = owner.events[seen:], len(owner.events)
                    for number, job in enumerate(fresh):
                        data = msgspec.json.encode(job)
                        self._chunk(b"id: %d\nevent: job\ndata: %s\n\n" % (seen - len(fresh) + number, data))
            finally:
                with owner.changed:
                    owner.listeners -= 1

        def _stream_log(self, job: str, follow: bool, offset: int) -> None:
            self.close_connection = True
            with owner.changed:
                owner.listeners += 1
                owner.changed.notify_all()
            try:
                self._begin("text/plain; charset=utf-8")
                while True:
                    with owner.changed:
                        ended = owner.jobs[job].state in TERMINAL
                        fresh = owner.logs.get(job, b"")[offset:]
                        if not fresh and follow and not ended and owner.running:
                            owner.changed.wait(0.5)
                            continue
                    if not owner.running:
                        return  # as a crash: no last chunk
                    if fresh:
                        offset += len(fresh)
                        self._chunk(fresh)
                    if not follow or (ended and not fresh):
                        break
                self.wfile.write(b"0\r\n\r\n")
                self.wfile.flush()
            finally:
                with owner.changed:
                    owner.listeners -= 1

    return Handler
