"""A client of Ollama's API, as much of it as registration needs, over aiohttp.

What it takes care of: a failure inside a 200, an answer that comes before the body was read, a creation that must not
lose its client, hours without a byte. Every failure becomes EngineUnavailable (try again later) or EngineRefused.

Does not know what a model is for, nor who waits for the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import aiohttp

from abliterate import __version__
from abliterate.contract.errors import (
    DiskError,
    EngineRefused,
    EngineUnavailable,
    FailureClass,
    ModelError,
    NotFound,
)
from abliterated.ollama.aside import aside, to_the_end
from abliterated.ollama.place import on_this_machine
from abliterated.ollama.version import Version, read_version

Report = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all (0: unknown)
CHUNK = 1 << 18  # the daemon's loop relays tokens between two pieces of an upload
HASHED = 1 << 22  # between two pieces a thread that hashes wants the interpreter, and the loop waits for it
LONGEST_WORD = 2000  # of an engine, in an error
QUICK = aiohttp.ClientTimeout(total=60, connect=5)  # questions that need no model loaded
PATIENT = aiohttp.ClientTimeout(total=None, connect=5, sock_read=None)  # loading, creating, copying

logger = logging.getLogger(__name__)


class EngineDiskFull(EngineUnavailable):
    """The engine's own disk is full; with room on it the same request succeeds."""

    failure: ClassVar[FailureClass] = "disk"


class EngineFailed(EngineUnavailable):
    """The engine is there and this request failed inside it (500): waiting may mend that, or never."""


def hash_file(path: Path, report: Report | None = None) -> str:
    """`sha256:…` of a file, read in pieces. Blocking: call it in a thread. Raises DiskError."""
    digest, done, buffer = hashlib.sha256(), 0, bytearray(HASHED)
    try:
        with path.open("rb", buffering=0) as file:
            total = path.stat().st_size
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                done += count
                if report:
                    report("hashing", done, total)
    except OSError as error:
        raise DiskError(f"{path}: can't be read ({error.strerror})", remedy="Check the file and its disk") from error
    return f"sha256:{digest.hexdigest()}"


class OllamaClient:
    """One engine at one address. An async context manager. `local`: its files are this machine's."""

    def __init__(self, url: str, *, local: bool | None = None) -> None:
        address = url if "://" in url else f"http://{url}"
        self.url = address.replace("//0.0.0.0", "//127.0.0.1").rstrip("/")
        self.local = on_this_machine(self.url) if local is None else local
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"abliterated/{__version__}"},
            timeout=PATIENT,
            read_bufsize=CHUNK,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()
        self._session = None

    # -- questions ------------------------------------------------------------------------------------------------

    async def version(self) -> Version:
        """Which engine answers."""
        answer = await self._json("GET", "/api/version")
        return read_version(str(answer.get("version", "")))

    async def tags(self) -> list[dict[str, Any]]:
        """Every model the engine has."""
        return _rows(await self._json("GET", "/api/tags"))

    async def ps(self) -> list[dict[str, Any]]:
        """Every model that is loaded."""
        return _rows(await self._json("GET", "/api/ps"))

    async def show(self, name: str) -> dict[str, Any]:
        """All about one model. Raises NotFound."""
        return await self._json("POST", "/api/show", {"model": name})

    async def has_blob(self, digest: str) -> bool:
        """Is the blob there? The engine looks at its name only."""
        async with self._request("HEAD", f"/api/blobs/{digest}", missing_is_an_answer=True) as response:
            return response.status == 200

    # -- changes --------------------------------------------------------------------------------------------------

    async def push_blob(self, path: Path, digest: str = "", report: Report | None = None) -> str:
        """Upload a file unless its blob is there; returns its digest, which is computed first where it isn't known.

        While uploading, the digest is computed again: a file that changes under our hands is refused.
        """
        digest = digest or await aside(hash_file, path, report)
        for attempt in (1, 2):
            if await self.has_blob(digest):
                break
            body = _Upload(path, digest, report)
            try:
                async with self._request(
                    "POST", f"/api/blobs/{digest}", data=body.read(), headers={"Content-Length": str(body.size())}
                ) as response:
                    await response.read()
                break
            except EngineUnavailable as error:
                if body.error is not None:
                    raise body.error from error
                # An engine that has the blob answers and closes without reading: what we then see may be a reset.
                if attempt == 2 and not await self.has_blob(digest):
                    raise
        return digest

    async def create(self, request: Mapping[str, Any], report: Report | None = None) -> None:
        """Create a model and wait for the last line, which must say success.

        An Ollama whose client leaves a creation in the middle keeps its temporary files and a blocked goroutine for
        ever; so a cancelled caller gets its CancelledError only when the stream has ended.
        """
        await to_the_end(self._create(request, report))

    async def _create(self, request: Mapping[str, Any], report: Report | None) -> None:
        target, last = str(request.get("model", "")), ""
        async with self._request("POST", "/api/create", {**request, "stream": True}) as response:
            async for line in self._lines(response):
                if "error" in line:
                    raise _refusal(f"creating {target}: {line['error']}", _status(line))
                last = str(line.get("status", ""))
                if report is not None:
                    try:
                        report(last, int(line.get("completed") or 0), int(line.get("total") or 0))
                    except Exception:  # a creation is followed to its end, whoever listens
                        logger.exception("progress can't be reported", extra={"action": "ollama.create"})
                        report = None
        if last != "success":
            raise EngineUnavailable(
                f"{self.url}: the stream of creating {target} ended after {last or 'nothing'!r}",
                remedy="It is safe to run again",
            )

    async def delete(self, name: str) -> None:
        """Delete a model. Raises NotFound."""
        await self._json("DELETE", "/api/delete", {"model": name})

    async def copy(self, source: str, destination: str) -> None:
        """A second name for a model. Raises NotFound."""
        await self._json("POST", "/api/copy", {"source": source, "destination": destination})

    async def load(self, name: str, keep_alive: str | int) -> None:
        """Load a model, to be kept that long. Raises NotFound."""
        await self._json("POST", "/api/generate", {"model": name, "keep_alive": keep_alive}, patience=PATIENT)

    async def unload(self, name: str, seconds: float = 60) -> bool:
        """Unload a model and wait until it is gone from the list of loaded ones; False where it stays (it is busy)."""
        await self._json("POST", "/api/generate", {"model": name, "keep_alive": 0}, patience=PATIENT)
        deadline = asyncio.get_running_loop().time() + seconds
        while name in {row.get("name") for row in await self.ps()}:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True

    async def chat_once(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokens: int = 64,
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | None = None,
        keep_alive: str | int | None = None,
        render_only: bool = False,
    ) -> dict[str, Any]:
        """One greedy answer, whole: the message and the counters. `render_only`: only the prompt, unanswered."""
        body: dict[str, Any] = {
            "model": name,
            "messages": list(messages),
            "stream": False,
            "options": {"temperature": 0, "seed": 0, "num_predict": tokens},
        }
        optional = {"tools": list(tools) or None, "think": think, "keep_alive": keep_alive}
        body |= {key: value for key, value in optional.items() if value is not None}
        if render_only:
            body["_debug_render_only"] = True
        return await self._json("POST", "/api/chat", body, patience=PATIENT)

    # -- the wire -------------------------------------------------------------------------------------------------

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, patience: aiohttp.ClientTimeout = QUICK
    ) -> dict[str, Any]:
        async with self._request(method, path, body, patience=patience) as response:
            data = await response.read()
        try:
            answer = json.loads(data) if data.strip() else {}
        except ValueError as error:
            raise self._unavailable(f"{path} answered what is no JSON") from error
        if not isinstance(answer, dict):
            raise self._unavailable(f"{path} answered what is no object")
        if set(answer) == {"error"}:
            raise _refusal(f"{path}: {answer['error']}", 0)
        return answer

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream of JSON lines; the last may lack its line break."""
        rest = b""
        async for data in response.content.iter_any():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.strip():
                    yield self._object(line)
        if rest.strip():
            yield self._object(rest)

    def _object(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise self._unavailable("the stream was cut in the middle of a line") from error
        return found if isinstance(found, dict) else {}

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        data: AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: aiohttp.ClientTimeout = PATIENT,
        missing_is_an_answer: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One exchange; foreign exceptions and bad statuses become ours, also while the body is read."""
        assert self._session is not None, "use `async with OllamaClient(url) as client`"
        try:
            async with self._session.request(
                method, self.url + path, json=body, data=data, headers=headers, timeout=patience, allow_redirects=False
            ) as response:
                if response.status >= 300 and not (missing_is_an_answer and response.status == 404):
                    said = _said(await response.content.read(8192)) or response.reason or ""
                    raise _refusal(f"{self.url}{path}: {said}", response.status)
                yield response
        except TimeoutError as error:
            raise self._unavailable(f"{path} did not answer in time") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise EngineRefused(
                f"{self.url!r} is no address of an engine", remedy="Check proxy.upstream in config.toml"
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise self._unavailable(str(error.strerror or error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._unavailable(f"{path}: {error or type(error).__name__}") from error

    def _unavailable(self, what: str) -> EngineUnavailable:
        return EngineUnavailable(f"no engine answers at {self.url} ({what})", remedy="Start Ollama, or wait for it")


class _Upload:
    """A file on its way into the engine's store: read in a thread, hashed as it goes, never whole in memory."""

    def __init__(self, path: Path, digest: str, report: Report | None) -> None:
        self.path, self.digest, self.report = path, digest, report
        self.error: ModelError | DiskError | None = None

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise DiskError(f"{self.path}: can't be read ({error.strerror})", remedy="Check the file") from error

    async def read(self) -> AsyncIterator[bytes]:
        """The file in pieces. What goes wrong is kept in `error`: aiohttp reports it as a broken connection."""
        hashed, done, total = hashlib.sha256(), 0, self.size()

        def piece(file: FileIO) -> bytes:
            data = file.read(CHUNK)
            hashed.update(data)
            return data

        try:
            with self.path.open("rb", buffering=0) as file:
                # An answer cancels us: closed under the thread, the descriptor might be a new connection's by then.
                while data := await to_the_end(aside(piece, file)):
                    done += len(data)
                    if done >= total and (done > total or f"sha256:{hashed.hexdigest()}" != self.digest):
                        raise ValueError
                    yield data
                    if self.report:
                        self.report("uploading", done, total)
            if done != total:
                raise ValueError
        except OSError as error:
            self.error = DiskError(
                f"{self.path}: can't be read ({error.strerror})", remedy="Check the file and its disk"
            )
            raise
        except ValueError:
            self.error = ModelError(
                f"{self.path}: its content is not {self.digest[:19]}…, so it changed after it was made",
                remedy="Run the recipe again",
            )
            raise


def _rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in answer.get("models") or () if isinstance(row, dict)]


def _said(data: bytes) -> str:
    """The message in an error's body, in any of Ollama's shapes."""
    text = data.decode(errors="replace").strip()
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text.splitlines()[0][:300] if text else ""
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _status(line: Mapping[str, Any]) -> int:
    status = line.get("status")
    return status if isinstance(status, int) else 0


def _refusal(message: str, status: int) -> EngineRefused | EngineUnavailable | NotFound:
    """Our error for what the engine said, in one line; `status` 0 for an error inside a 200."""
    message = " ".join(message.split())[:LONGEST_WORD]
    if "no space left on device" in message or "disk quota exceeded" in message:
        return EngineDiskFull(message, remedy="Free space where Ollama keeps its models")
    if status == 404:
        return NotFound(message, remedy="See `ollama list` for what is there")
    if status == 403:
        return EngineRefused(message or "forbidden", remedy="Ollama refuses this address's host name: use 127.0.0.1")
    if status == 500:
        return EngineFailed(message, remedy="Try again; Ollama's log says more (journalctl -u ollama)")
    if status in (408, 429, 499) or status > 500:
        return EngineUnavailable(message, remedy="Try again; Ollama's log says more")
    return EngineRefused(message, remedy="Ollama's log says more (journalctl -u ollama)")
