"""A small hub on this machine: the routes, headers and redirects the hub's client uses, and a second server for large
files, as the real one has. Breaks connections where a test says so, and counts what it sent.

Does not know the code under test.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    """One request that came, and the body bytes that went."""

    server: str
    method: str
    path: str
    range: str
    authorization: str
    status: int
    sent: int


def begun(cache: Path, size: int) -> list[Path]:
    """The files of which more than `size` bytes have come and not all; others come and go meanwhile."""
    found = []
    for path in cache.rglob("*.incomplete"):
        with suppress(FileNotFoundError):
            if path.stat().st_size > size:
                found.append(path)
    return found


@dataclass
class Faults:
    """What goes wrong. `cut`: by file, after how many bytes each further answer breaks off. `portal`: every answer is a
    page that is none of the hub's; `untold`, `understated`: files whose digest or last byte is not listed."""

    cut: dict[str, list[int]] = field(default_factory=dict)
    ignore_range: bool = False
    statuses: list[int] = field(default_factory=list)
    spoil: dict[str, int] = field(default_factory=dict)
    hold: threading.Event | None = None
    token: str = ""
    gated: bool = False
    disabled: bool = False
    portal: bool = False
    untold: str = ""
    understated: str = ""


class LocalHub:
    """One repository, `org/model`, at one commit; `branch` names of it resolve to that commit."""

    def __init__(self, files: dict[str, bytes], commit: str = COMMIT) -> None:
        self.files, self.commit, self.branches = files, commit, {"main"}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.streaming = threading.Event()
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]

    @property
    def endpoint(self) -> str:
        return self._servers[0].url

    @property
    def cdn(self) -> str:
        return self._servers[1].url

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin", "tokenizer.json"))

    def sent(self, name: str) -> int:
        """Body bytes of one file, over all requests."""
        return sum(request.sent for request in self.requests if request.path.endswith("/" + name))

    def gets(self, name: str) -> list[Request]:
        """The requests that asked for a file's bytes and got some."""
        return [one for one in self.requests if one.path.endswith("/" + name) and one.method == "GET" and one.sent]

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        for server in self._servers:
            server.start()
        try:
            yield self
        finally:
            if self.faults.hold:
                self.faults.hold.set()
            self.stop()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()


class _Server:
    def __init__(self, hub: LocalHub, role: str) -> None:
        handler = type("Handler", (_Handler,), {"hub": hub, "role": role})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub
    role: str
    query = ""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        self.path, self.query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        faults = self.hub.faults
        if self.role == "cdn":
            return self._file(self.path.removeprefix("/blob/"))
        if faults.portal:
            return self._answer(200, {"Content-Type": "text/html"}, b"<html>Please log in to the network</html>")
        if faults.disabled:
            return self._answer(403, {}, message="Access to this resource is disabled.")
        if faults.token and self.headers.get("Authorization") != f"Bearer {faults.token}":
            wrong = bool(self.headers.get("Authorization"))
            message = "Invalid credentials in Authorization header" if wrong else "Invalid username or password."
            return self._answer(401, {} if wrong else {"X-Error-Code": "RepoNotFound"}, message=message)
        if faults.statuses and not self.path.startswith("/api/"):
            return self._answer(faults.statuses.pop(0), {})
        if match := re.fullmatch(r"/api/models/org/model(?:/revision/(.+))?", self.path):
            revision = match[1] or "main"
            if revision not in (*self.hub.branches, self.hub.commit):
                return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            info = {"_id": "0", "id": "org/model", "modelId": "org/model", "sha": self.hub.commit, "private": False}
            return self._json(info | {"siblings": [*map(self._sibling, self.hub.files)], "tags": []})
        if self.path == f"/api/models/org/model/tree/{self.hub.commit}":
            return self._json(
                [*map(self._entry, self.hub.files), {"type": "directory", "path": "original", "oid": "0"}]
            )
        if match := re.fullmatch(rf"/org/model/resolve/{self.hub.commit}/(.+)", self.path):
            return self._resolve(match[1])
        return self._answer(404, {"X-Error-Code": "RepoNotFound"})

    def _sibling(self, name: str) -> dict[str, object]:
        """A file as the model's own route tells it where blobs=true is asked."""
        data = self.hub.files[name]
        size = len(data) - (name == self.hub.faults.understated)
        told: dict[str, object] = {"rfilename": name, "size": size, "blobId": self._sha1(data)}
        if name == self.hub.faults.untold:
            del told["blobId"]
        elif self.hub.is_large(name):
            told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return told if "blobs=" in self.query else {"rfilename": name}

    def _entry(self, name: str) -> dict[str, object]:
        data = self.hub.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": self._sha1(data)}
        if self.hub.is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    @staticmethod
    def _sha1(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _resolve(self, name: str) -> None:
        data = self.hub.files.get(name)
        headers = {"X-Repo-Commit": self.hub.commit}
        if data is None:
            return self._answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        if self.hub.faults.gated:
            return self._answer(403, headers | {"X-Error-Code": "GatedRepo"})
        if not self.hub.is_large(name):
            return self._file(name, headers | {"ETag": f'"{self._sha1(data)}"'})
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return self._answer(302, headers | linked | {"Location": f"{self.hub.cdn}/blob/{name}"})

    def _json(self, body: object) -> None:
        data = json.dumps(body).encode()
        self._answer(200, {"Content-Type": "application/json"}, data)

    def _file(self, name: str, headers: dict[str, str] | None = None) -> None:
        faults, data = self.hub.faults, self.hub.files[name]
        with self.hub.lock:
            if faults.spoil.get(name):
                faults.spoil[name] -= 1
                data = bytes(len(data))
            cut = faults.cut[name].pop(0) if self.command == "GET" and faults.cut.get(name) else None
        headers, status, start = dict(headers or {}) | {"Accept-Ranges": "bytes"}, 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not faults.ignore_range:
            start = int(asked[1])
            if start >= len(data):
                self._answer(416, headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(status, headers, data[start:], cut)

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes = b"", cut: int | None = None, message: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        going = b"" if self.command == "HEAD" else data if cut is None else data[:cut]
        asked = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        with self.hub.lock:
            self.hub.requests.append(Request(self.role, self.command, self.path, *asked, status, len(going)))
        try:
            hold = self.hub.faults.hold
            if hold and self.role == "cdn":
                self.wfile.write(going[: len(going) // 4 * 3])
                self.wfile.flush()
                self.hub.streaming.set()
                hold.wait(150)
            else:
                self.wfile.write(going)
        except OSError:
            self.close_connection = True
        if cut is not None:
            self.close_connection = True
