"""Asks an engine over Ollama's API, streaming, with the standard library alone.

Every failure is typed and names its remedy. Does not know conversations, prints nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from abliterate.chat.address import Address
from abliterate.contract.errors import AbliteratedError, EngineRefused, EngineUnavailable, NotFound

CONNECT_SECONDS: Final = 5.0
ASK_SECONDS: Final = 30.0
MOST_NAMED: Final = 8  # of the models that are there, in a remedy


@dataclass(frozen=True)
class Piece:
    """One message of a streamed answer; `numbers` come with the last."""

    content: str = ""
    thinking: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    done: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Answer:
    """An answer that is still being written. A context manager: leaving it stops the model."""

    def __init__(self, engine: Engine, connected: socket.socket, response: http.client.HTTPResponse) -> None:
        self._engine = engine
        self._socket = connected
        self._response = response

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._socket.close()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come. Raises EngineRefused for an error in the stream, and for one that just ends."""
        while True:
            try:
                line = self._response.readline()
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._engine.unavailable(error, "the answer broke off") from error
            if not line:
                raise EngineRefused("the answer broke off", remedy="Ask again; the engine's log may tell why")
            if not line.strip():
                continue
            piece = _piece(_object(line))
            yield piece
            if piece.done:
                return


class Engine:
    """The engine at `address`. Holds no connection between two questions."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def models(self) -> list[Mapping[str, Any]]:
        """Every model it has, as `/api/tags` tells of it: the last made first."""
        models = self._ask("GET", "/api/tags").get("models") or []
        return [model for model in models if isinstance(model, Mapping) and model.get("name")]

    def names(self) -> list[str]:
        """The names of every model it has."""
        return [str(model["name"]) for model in self.models()]

    def how_to_have(self, model: str) -> str:
        """How this engine comes by a model it lacks, as a remedy."""
        try:
            embedded = "abliterated" in str(self._ask("GET", "/api/version").get("version"))
        except AbliteratedError:
            embedded = False
        if embedded:  # it has no registry
            return "the embedded engine can't fetch models: name a .gguf file or hf:ORG/REPO, or install Ollama"
        return f"`ollama pull {model}` fetches it"

    def show(self, model: str) -> Mapping[str, Any]:
        """What `/api/show` says of a model. Raises NotFound, with the names that are near."""
        return self._ask("POST", "/api/show", {"model": model}, model)

    def chat(self, body: Mapping[str, Any]) -> Answer:
        """Ask; the answer streams. Raises NotFound, EngineRefused or EngineUnavailable."""
        model = str(body.get("model", ""))
        _, connected, response = self._open("POST", "/api/chat", {**body, "stream": True}, None, model)
        return Answer(self, connected, response)

    def unavailable(self, error: BaseException, what: str = "") -> EngineUnavailable:
        """What a failure on the socket means to a person."""
        if isinstance(error, socket.gaierror):
            return EngineUnavailable(f"no host {self.address.host} is known", remedy="Check --host and OLLAMA_HOST")
        if isinstance(error, ssl.SSLError):
            return EngineUnavailable(
                f"{self.address}: no secure connection ({error.reason})", remedy="Check whether it is http:// instead"
            )
        what = what or f"nobody answers at {self.address}"
        if isinstance(error, TimeoutError):
            what += " in time"
        return EngineUnavailable(
            what, remedy="Start Ollama or `abliterated serve`, or name another with --host or OLLAMA_HOST"
        )

    def _ask(self, method: str, path: str, body: Any = None, model: str = "") -> Mapping[str, Any]:
        connection, _, response = self._open(method, path, body, ASK_SECONDS, model)
        try:
            return _object(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self.unavailable(error) from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: Any, timeout: float | None, model: str
    ) -> tuple[http.client.HTTPConnection, socket.socket, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        content = json.dumps(body).encode() if body is not None else None
        try:
            connection.connect()
            connected = connection.sock
            connected.settimeout(timeout)  # a model may take minutes to load
            connection.request(method, self.address.path + path, content, headers)
            response = connection.getresponse()
            told = response.read(65536) if response.status >= 400 else b""
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.unavailable(error) from error
        except BaseException:
            connection.close()  # an interrupt, before the first word
            raise
        if response.status >= 400:
            connection.close()
            raise self._refusal(response.status, told, model)
        return connection, connected, response

    def _refusal(self, status: int, told: bytes, model: str) -> AbliteratedError:
        try:
            message = str(_object(told).get("error") or f"{self.address} answered {status}")
        except EngineRefused:
            message = f"{self.address} answered {status}"
        if status == 404 and model:
            return NotFound(f"{model}: no such model at {self.address}", remedy=self._near(model))
        return EngineRefused(message, remedy=_remedy(message, model))

    def _near(self, model: str) -> str:
        import difflib

        from abliterate.contract.names import DEFAULT_TAG, SUFFIX

        try:
            there = self.names()
        except AbliteratedError:
            there = []
        spelt = {name.removesuffix(f":{DEFAULT_TAG}"): name for name in there}
        if near := difflib.get_close_matches(model.removesuffix(f":{DEFAULT_TAG}"), spelt, n=1, cutoff=0.75):
            return f"Did you mean {near[0]}?"
        if SUFFIX in model:
            return f"`abliterate submit {model.replace(SUFFIX, '', 1)}` makes it"
        if not there:
            return f"There is none yet: {self.how_to_have(model)}"
        return f"There are {', '.join(list(spelt)[:MOST_NAMED])}" + (", and more" if there[MOST_NAMED:] else "")


def _remedy(message: str, model: str) -> str:
    if "does not support tools" in message:
        return f"Leave --tools away, or see `abliterate doctor {model}`"
    if "does not support thinking" in message:
        return "Leave --think away"
    if "context" in message:
        return "Give it more room with --set num_ctx=8192, or begin anew with /clear"
    return f"See `abliterate doctor {model}`" if model else "The engine's log may tell why"


def _piece(told: Mapping[str, Any]) -> Piece:
    if told.get("error"):
        raise EngineRefused(str(told["error"]), remedy="Ask again; the engine's log may tell why")
    message = told.get("message")
    if not isinstance(message, Mapping):
        message = {}
    calls = tuple(call for call in message.get("tool_calls") or () if isinstance(call, Mapping))
    return Piece(
        content=str(message.get("content") or ""),
        thinking=str(message.get("thinking") or ""),
        calls=calls,
        done=bool(told.get("done")),
        numbers=told if told.get("done") else {},
    )


def _object(content: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise EngineRefused("the engine's answer isn't understood", remedy="Is it an Ollama that listens there?")
    return value
