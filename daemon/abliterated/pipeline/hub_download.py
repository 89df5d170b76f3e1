"""Files of a repository, brought into the hub's own cache: several at a time, each going on where it was cut off.

The hub's client (2.4) throws away what a broken download had; here the part stays beside the blob it will be, and the
next attempt, of this process or a later one, asks for the rest. A blob gets its name only once its content has the
digest the hub announced. Does not know which files a model needs, nor what an error of the network means to the user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx2
from huggingface_hub import get_session
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

from abliterate.contract.errors import Cancelled, ModelError
from abliterated.files import sync_folder

AT_ONCE: Final = 4
ATTEMPTS: Final = 6  # in a row without a single new byte
FIRST_DELAY: Final = 0.5
PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK: Final = 4 << 20
LOOK: Final = 0.1
PATIENCE: Final = 0.5


@dataclass(frozen=True)
class Blob:
    """A file to fetch. `digest` (hex) is also the blob's name: sha256 of large files, git's sha1 of small ones."""

    name: str
    url: str
    size: int
    digest: str
    target: Path

    @property
    def partial(self) -> Path:
        """Where its bytes lie while they are too few."""
        return self.target.with_name(f"{self.digest}.abliterated.incomplete")

    def present(self) -> int:
        """Bytes that need not travel again."""
        for path in (self.target, self.partial):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, self.size)
        return 0

    def digester(self) -> Any:
        """A hash that the whole content takes to `digest`."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class Incomplete(Exception):
    """The connection ended before the file did, and without an error of its own."""


def download(
    blobs: Sequence[Blob],
    headers: dict[str, str],
    *,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Fetch what is missing of `blobs`. Progress counts the bytes that travel now, not those that were here.

    Raises Cancelled, ModelError (wrong content), and whatever the network or the disk raised last; parts are kept.
    """
    missing = [blob for blob in blobs if not blob.target.exists()]
    total = sum(blob.size - blob.present() for blob in missing)
    count, stop = _Count(), threading.Event()
    waiting: queue.SimpleQueue[Blob] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for blob in missing:
        waiting.put(blob)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                blob = waiting.get_nowait()
                try:
                    _fetch(blob, headers, count, stop)
                    ended.put(None)
                except Exception as error:
                    ended.put(error)

    # Daemon threads: one that reads from a silent connection must not keep a cancelled process alive.
    threads = [threading.Thread(target=work, name="fetch", daemon=True) for _ in missing[:AT_ONCE]]
    for thread in threads:
        thread.start()
    left = len(missing)
    try:
        while left:
            if cancelled():
                raise Cancelled("the download was asked to stop", remedy="Submit it again to go on where it stopped")
            with contextlib.suppress(queue.Empty):
                error = ended.get(timeout=LOOK)
                left -= 1
                if error is not None:
                    raise error
            progress(count.bytes, max(total, count.bytes))
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


class _Count:
    """Bytes that came over the wire, from all threads."""

    def __init__(self) -> None:
        self.bytes, self._lock = 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class _Part:
    """The bytes of a blob that are here, and their hash so far."""

    def __init__(self, file: BinaryIO, blob: Blob) -> None:
        self.file, self.blob = file, blob
        self.restart() if os.fstat(file.fileno()).st_size > blob.size else self._read()

    def _read(self) -> None:
        self.at, self.digest = 0, self.blob.digester()
        self.file.seek(0)
        while chunk := self.file.read(_CHUNK):
            self.digest.update(chunk)
            self.at += len(chunk)

    def restart(self) -> None:
        """Throw it away."""
        self.file.truncate(0)
        self.at, self.digest = 0, self.blob.digester()

    def append(self, chunk: bytes) -> None:
        if self.at + len(chunk) > self.blob.size:
            raise ModelError(f"{self.blob.name} is longer than the hub announced", remedy="Try again later")
        self.file.seek(self.at)
        view = memoryview(chunk)
        while view:
            view = view[self.file.write(view) :]
        self.digest.update(chunk)
        self.at += len(chunk)


def _fetch(blob: Blob, headers: dict[str, str], count: _Count, stop: threading.Event) -> None:
    """One file, through as many connections as it takes."""
    blob.target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(blob.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        if not _alone(file, blob, stop):
            return
        part = _Part(file, blob)
        spoiled = False
        while True:
            _fill(part, headers, count, stop)
            if stop.is_set():
                return
            if part.digest.hexdigest() == blob.digest:
                break
            part.restart()
            if spoiled:
                raise ModelError(f"{blob.name} arrives with the wrong content, twice", remedy="Try again later")
            spoiled = True
        os.fsync(file.fileno())
        blob.partial.replace(blob.target)
        sync_folder(blob.target.parent)


def _fill(part: _Part, headers: dict[str, str], count: _Count, stop: threading.Event) -> None:
    """Connect until the part is whole; gives up after ATTEMPTS in a row that brought nothing."""
    barren = 0
    while part.at < part.blob.size and not stop.is_set():
        before = part.at
        try:
            _stream(part, headers, count, stop)
        except (httpx2.HTTPError, Incomplete) as error:
            barren = 0 if part.at > before else barren + 1
            if not _passing(error) or barren >= ATTEMPTS:
                raise
            stop.wait(FIRST_DELAY * 2**barren)


def _stream(part: _Part, headers: dict[str, str], count: _Count, stop: threading.Event) -> None:
    """What one connection brings, from where the part ends."""
    asked = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={part.at}-"} if part.at else {})
    with get_session().stream("GET", part.blob.url, headers=asked) as response:
        if response.status_code == 416:
            part.restart()
            raise Incomplete(f"{part.blob.name} can't go on at its byte {part.at}")
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if part.at and not response.headers.get("Content-Range", "").startswith(f"bytes {part.at}-"):
            part.restart()  # the server sends it from its beginning
        for chunk in response.iter_bytes():
            if stop.is_set():
                return
            part.append(chunk)
            count.add(len(chunk))
    if part.at < part.blob.size:
        raise Incomplete(f"{part.blob.name} ended {part.blob.size - part.at} bytes early")


def _alone(file: BinaryIO, blob: Blob, stop: threading.Event) -> bool:
    """Whether this process alone writes the part now; False where another has finished it meanwhile."""
    while not stop.is_set():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(0.5)
            continue
        if blob.target.exists():
            blob.partial.unlink(missing_ok=True)
            return False
        return True
    return False


def _passing(error: Exception) -> bool:
    """Whether asking again may help."""
    if isinstance(error, (httpx2.ProxyError, httpx2.UnsupportedProtocol)):
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in PASSING
