"""Asks the daemon: HTTP over its unix socket, typed with the contract's messages.

Every error is typed: DaemonUnavailable where nobody answers, ProtocolError where the answer isn't understood, else
the class that the daemon's ErrorBody stands for. Does not know the command line, prints nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import msgspec

from abliterate.contract.errors import (
    AbliteratedError,
    AlreadyRunning,
    Cancelled,
    ConflictError,
    DaemonUnavailable,
    DiskError,
    EngineRefused,
    EngineUnavailable,
    ModelError,
    NotFound,
    OutOfMemory,
    RecipeError,
)
from abliterate.contract.messages import Clean, Cleaned, ErrorBody, JobView, Status, Submit, Submitted

Act = Literal["cancel", "hold", "release", "retry"]
T = TypeVar("T")

TIMEOUT: Final = 10.0
PATIENCE: Final = 90.0
# The daemon sends a comment every 15 s: three missed ones, and it hangs.
EVENT_TIMEOUT: Final = 50.0

_BY_EXIT_CODE: Final[dict[int, type[AbliteratedError]]] = {
    kind.exit_code: kind
    for kind in (
        AlreadyRunning,
        AbliteratedError,
        RecipeError,
        ModelError,
        DiskError,
        EngineRefused,
        ConflictError,
        NotFound,
        EngineUnavailable,
        DaemonUnavailable,
        OutOfMemory,
        Cancelled,
    )
}
_BY_STATUS: Final[dict[int, type[AbliteratedError]]] = {400: RecipeError, 404: NotFound, 409: ConflictError}
_ID = re.compile(r"[0-9a-z]{4,26}")


class ProtocolError(AbliteratedError):
    """Something answered at the socket, but not as our daemon does."""

    exit_code = 76


class _Paused(msgspec.Struct, frozen=True):
    paused: bool


class _Jobs(msgspec.Struct, frozen=True):
    jobs: list[JobView]


@dataclass(frozen=True)
class Event:
    """One message of the event stream; `job` is None for a heartbeat."""

    id: str = ""
    job: JobView | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Stream:
    """A response that is still being written. A context manager; `close` may come from another thread."""

    def __init__(self, owner: Daemon, connected: socket.socket, response: http.client.HTTPResponse) -> None:
        self._owner = owner
        self._response = response
        self._socket = connected
        self._closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._release()

    def close(self) -> None:
        """End the stream; a reader in another thread sees its end."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come. Raises DaemonUnavailable if they end before their time."""
        try:
            while chunk := self._response.read1(65536):
                yield chunk
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not self._closed:
                raise self._owner.unavailable(error) from error
        finally:
            self._release()

    def events(self) -> Iterator[Event]:
        """The server-sent events in it."""
        buffer, id_, data = b"", "", []
        for chunk in self.chunks():
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                name, _, value = line.rstrip(b"\r").partition(b":")
                value = value.removeprefix(b" ")
                if name == b"data":
                    data.append(value)
                elif name == b"id":
                    id_ = value.decode("utf-8", "replace")
                elif line.startswith(b":"):
                    yield Event(id_)
                elif not line.strip() and data:
                    yield Event(id_, _decode(b"\n".join(data), JobView))
                    data = []

    def _release(self) -> None:
        self._response.close()
        self._socket.close()


class Daemon:
    """The daemon behind `path`. Holds no connection between two questions."""

    def __init__(self, path: Path, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._timeout = timeout

    def status(self) -> Status:
        """The daemon and all its jobs."""
        return self._ask("GET", "/v1/status", Status)

    def jobs(self) -> list[JobView]:
        """Every job not yet cleaned away."""
        return self._ask("GET", "/v1/jobs", _Jobs).jobs

    def job(self, job: str) -> JobView:
        """One job, by its id or a piece of it."""
        return self._ask("GET", _job_path(job), JobView)

    def submit(self, submit: Submit) -> Submitted:
        """Queue a recipe; sending the same id again adds nothing."""
        return self._ask("POST", "/v1/jobs", Submitted, submit)

    def act(self, job: str, act: Act) -> JobView:
        """Cancel, hold, release or retry a job; returns it as it is afterwards."""
        return self._ask("POST", f"{_job_path(job)}/{act}", JobView)

    def set_paused(self, paused: bool) -> bool:
        """Pause or resume the queue; returns whether it is paused now."""
        return self._ask("POST", f"/v1/queue/{'pause' if paused else 'resume'}", _Paused).paused

    def drain(self) -> bool:
        """Stop what is at work and start nothing more; returns when that is so."""
        return self._patient()._ask("POST", "/v1/queue/drain", _Paused).paused

    def clean(self, days: float | None) -> Cleaned:
        """Forget jobs that ended `days` ago, or as long ago as the configuration says."""
        return self._patient()._ask("POST", "/v1/clean", Cleaned, Clean(days=days))

    def log(self, job: str, *, follow: bool = False, offset: int = 0) -> Stream:
        """A job's log from byte `offset`; with `follow` it ends when the job has ended."""
        return self._stream(f"{_job_path(job)}/log?{'follow=1&' if follow else ''}offset={offset}", None)

    def report(self, job: str, form: Literal["json", "html"] = "json") -> bytes:
        """A job's report as it lies there. Raises NotFound where it has none."""
        connection, _, response = self._open("GET", f"{_job_path(job)}/report?format={form}", self._timeout, {})
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self.unavailable(error) from error
        finally:
            connection.close()

    def events(self, last: str = "") -> Stream:
        """Every job as it changes; `last` is the id of the last event seen."""
        return self._stream("/v1/events", EVENT_TIMEOUT, {"Last-Event-ID": last} if last else {})

    def metrics(self) -> str:
        """The daemon's figures as Prometheus text."""
        with self._stream("/metrics", self._timeout) as stream:
            return b"".join(stream.chunks()).decode("utf-8", "replace")

    def unavailable(self, error: BaseException) -> DaemonUnavailable:
        """What a failure on the socket means to a person."""
        where = f"the daemon does not answer at {self.path}"
        if isinstance(error, PermissionError):
            return DaemonUnavailable(
                f"you may not talk to the daemon at {self.path}", remedy="Join the group that owns the socket"
            )
        if isinstance(error, TimeoutError):
            return DaemonUnavailable(f"{where} in time", remedy="Look at its log; restart it if it hangs")
        if isinstance(error, OSError) and "too long" in str(error):
            return DaemonUnavailable(f"{self.path}: too long a path", remedy="Set a shorter [control] socket")
        return DaemonUnavailable(where, remedy="Start it with `abliterated serve`, or name another with --socket")

    def _patient(self) -> Daemon:
        """For what may take as long as a worker is given to stop."""
        return Daemon(self.path, PATIENCE)

    def ask(self, method: str, path: str, kind: type[T], body: Any = None) -> T:
        """Any other question of the control API."""
        return self._ask(method, path, kind, body)

    def _ask(self, method: str, path: str, kind: type[T], body: Any = None) -> T:
        connection, _, response = self._open(method, path, self._timeout, {}, body)
        try:
            return _decode(response.read(), kind)
        except (OSError, http.client.HTTPException) as error:
            raise self.unavailable(error) from error
        finally:
            connection.close()

    def _stream(self, path: str, timeout: float | None, headers: dict[str, str] | None = None) -> Stream:
        _, connected, response = self._open("GET", path, timeout, headers or {})
        return Stream(self, connected, response)

    def _open(
        self, method: str, path: str, timeout: float | None, headers: dict[str, str], body: Any = None
    ) -> tuple[_UnixConnection, socket.socket, http.client.HTTPResponse]:
        connection = _UnixConnection(self.path, timeout)
        if body is not None or method == "POST":
            headers = {"Content-Type": "application/json", **headers}
        try:
            connection.request(method, path, msgspec.json.encode(body) if body is not None else None, headers)
            # Kept, because the connection forgets its socket where the response is the last one on it.
            connected: socket.socket = connection.sock
            response = connection.getresponse()
            if response.status >= 400:
                content = response.read(65536)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.unavailable(error) from error
        if response.status >= 400:
            connection.close()
            raise _error(response.status, content)
        return connection, connected, response


def _job_path(job: str) -> str:
    text = job.strip().lower()
    if not _ID.fullmatch(text):
        raise NotFound(f"{job!r} is no job's id", remedy="`abliterate status` lists them; four characters are enough")
    return f"/v1/jobs/{text}"


def _decode(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the daemon's answer isn't understood ({error})", remedy="Are both of one version? Restart the daemon"
        ) from error


def _error(status: int, content: bytes) -> AbliteratedError:
    try:
        body = msgspec.json.decode(content, type=ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        kind = _BY_STATUS.get(status, ProtocolError)
        return kind(f"the daemon answered {status}", remedy="Are both of one version? Restart the daemon")
    # The status decides where the body leaves the exit code at its default.
    kind = _BY_EXIT_CODE.get(body.exit_code, AbliteratedError)
    if kind is AbliteratedError:
        kind = _BY_STATUS.get(status, AbliteratedError)
    return kind(body.error, remedy=body.remedy)
