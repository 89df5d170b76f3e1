"""Serves the page: its file, what the daemon tells (forwarded from the control socket), reports and logs. Reads only.

A thread a connection, of the standard library. Does not know the command line, nor what is drawn.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from abliterate.api import Daemon, Stream
from abliterate.contract.errors import AbliteratedError, NotFound
from abliterate.contract.ids import ULID
from abliterate.contract.report import PAGE_FILE
from abliterate.ui.gate import Gate
from abliterate.ui.machine import Machine
from abliterate.ui.traffic import by_model

MOST_STREAMS: Final = 128
LONGEST_LOG: Final = 2 << 20
_ALWAYS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_NOTHING: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_REPORT: Final = f"{_NOTHING}; style-src 'unsafe-inline'; img-src data:"  # its own, stricter, is in the file
_FAVICON: Final = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


class PageServer(ThreadingHTTPServer):
    """Listens on a loopback port; `jobs` is the folder of the jobs' folders, None where it isn't known."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, daemon: Daemon, jobs: Path | None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.control = daemon
        self.jobs = jobs
        self.gate = Gate(self.server_address[1])
        self.machine = Machine()
        self.page = resources.files("abliterate.ui").joinpath("page.html").read_bytes()
        self.policy = page_policy(self.page.decode())
        self.streams: set[Stream] = set()
        self.lock = threading.Lock()
        self.ending = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no event."""

    def end(self) -> None:
        """Stop serving and end every stream."""
        with self.lock:
            self.ending = True
            for stream in self.streams:
                stream.close()
        self.shutdown()
        self.server_close()


def page_policy(page: str) -> str:
    """The page's content security policy: its own script and style by their digests, and nothing else."""
    digests = {
        kind: " ".join(_digest(text) for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL))
        for kind in ("script", "style")
    }
    return (
        f"{_NOTHING}; script-src {digests['script']}; style-src {digests['style']}; connect-src 'self'; img-src data:"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    protocol_version = "HTTP/1.1"
    server_version = "abliterate"
    sys_version = ""
    timeout = 60
    server: PageServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged: the address of the first request holds the token."""

    def do_GET(self) -> None:
        self.close_connection = True if self.command != "GET" else self.close_connection
        url = urlsplit(self.path)
        token = parse_qs(url.query).get("token", [""])[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        verdict = self.server.gate.admit(self.command, url.path, token, headers)
        if verdict.status == 303:
            self._send(303, b"", "text/plain", {"Location": "/", "Set-Cookie": verdict.cookie})
        elif verdict.status:
            more = {"Allow": "GET, HEAD"} if verdict.status == 405 else {}
            self._send(verdict.status, f"{verdict.why}\n".encode(), "text/plain; charset=utf-8", more)
        else:
            self._route(url.path)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def _route(self, path: str) -> None:
        head, _, job = path.strip("/").partition("/")
        try:
            if path == "/":
                self._send(
                    200, self.server.page, "text/html; charset=utf-8", {"Content-Security-Policy": self.server.policy}
                )
            elif path == "/api/overview":
                self._json(200, self._overview())
            elif path == "/api/events":
                self._events()
            elif head == "report" and ULID.fullmatch(job):
                self._report(job)
            elif head == "log" and ULID.fullmatch(job):
                self._log(job)
            else:
                raise NotFound(f"nothing is at {path}", remedy="Go back to the page")
        except AbliteratedError as error:
            status = 404 if isinstance(error, NotFound) else 503
            self._json(status, {"error": error.message, "remedy": error.remedy})

    def _overview(self) -> dict[str, Any]:
        status = self.server.control.status()
        traffic: list[dict[str, Any]] = []
        with contextlib.suppress(AbliteratedError):
            traffic = by_model(self.server.control.metrics())
        return {
            "status": msgspec.to_builtins(status),
            "reports": [job.id for job in status.jobs if (page := self._page_of(job.id)) and page.is_file()],
            "machine": self.server.machine.view(),
            "traffic": traffic,
        }

    def _page_of(self, job: str) -> Path | None:
        return self.server.jobs / job / "out" / PAGE_FILE if self.server.jobs and ULID.fullmatch(job) else None

    def _report(self, job: str) -> None:
        path = self._page_of(job)
        try:
            content = path.read_bytes() if path else b""
        except OSError as error:
            raise NotFound(f"job {job} has no report here", remedy="A job has one when it has succeeded") from error
        if not content:
            raise NotFound("reports lie in the daemon's home, which isn't known here", remedy="Give --config")
        self._send(200, content, "text/html; charset=utf-8", {"Content-Security-Policy": _REPORT})

    def _log(self, job: str) -> None:
        content = b""
        with self.server.control.log(job) as stream:
            for chunk in stream.chunks():
                content = (content + chunk)[-LONGEST_LOG:]
        self._send(200, content, "text/plain; charset=utf-8", {"Content-Security-Policy": _NOTHING})

    def _events(self) -> None:
        """The daemon's own stream, byte for byte."""
        server = self.server
        with server.lock:
            full = server.ending or len(server.streams) >= MOST_STREAMS
        if full:
            raise AbliteratedError("too many pages are open", remedy="Close some")
        self.close_connection = True
        last = self.headers.get("Last-Event-ID", "")
        with server.control.events(last if last.isdigit() else "") as stream:
            with server.lock:
                server.streams.add(stream)
            try:
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._head(200, "text/event-stream", {"Connection": "close"}, None)
                self.wfile.write(b"retry: 1000\n\n")
                with contextlib.suppress(AbliteratedError, OSError):  # either side may leave
                    for chunk in stream.chunks():
                        self.wfile.write(chunk)
            finally:
                with server.lock:
                    server.streams.discard(stream)

    def _json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _send(self, status: int, content: bytes, kind: str, more: dict[str, str]) -> None:
        self._head(status, kind, more, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, kind: str, more: dict[str, str], length: int | None) -> None:
        self.send_response(status)
        headers = {**_ALWAYS, "Content-Security-Policy": _NOTHING, "Content-Type": kind, **more}
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
