"""Asks a model that an Ollama serves, one question at a time: for a judge, and for models whose files are not here.

The engine's API is HTTP with JSON; every failure is EngineUnavailable (try again later), EngineRefused or NotFound.
Greedy always. Does not know what is asked, or why.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from abliterate.contract.errors import AbliteratedError, EngineRefused, EngineUnavailable, NotFound

# Loading a large model from a slow disk comes before the first token.
SECONDS: Final = 600.0
TRIES: Final = 3


@dataclass(frozen=True)
class Reply:
    """What it said; `tokens`: how many; `first`: log probabilities of the likeliest first tokens, where it tells."""

    text: str
    tokens: int
    first: Mapping[str, float]


@dataclass(frozen=True)
class Served:
    """One model of one engine."""

    url: str
    model: str
    seconds: float = SECONDS

    def check(self) -> dict[str, Any]:
        """What the engine says of the model. Raises NotFound where it has none of that name."""
        return self._post("/api/show", {"model": self.model})

    def chat(self, messages: Sequence[Mapping[str, str]], tokens: int, *, seed: int = 0, logs: int = 0) -> Reply:
        """Its answer, at most `tokens` long, without thinking where it can do without; `logs`: how many first tokens'
        log probabilities are wanted."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": False,
            "think": False,
            "options": {"temperature": 0, "num_predict": tokens, "seed": seed},
        }
        if logs:
            body |= {"logprobs": True, "top_logprobs": logs}
        try:
            answer = self._patiently("/api/chat", body)
        except EngineRefused:
            body.pop("think")  # an engine before thinking, or a model that can't be without
            answer = self._patiently("/api/chat", body)
        message = answer.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise EngineRefused(
                f"{self.model}: the engine at {self.url} answers without a message", remedy="Is it an Ollama?"
            )
        counted = answer.get("eval_count")
        return Reply(text, counted if isinstance(counted, int) else 0, _first(answer.get("logprobs")))

    def _patiently(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        for left in range(TRIES - 1, -1, -1):
            try:
                return self._post(path, body)
            except EngineUnavailable:
                if not left:
                    raise
                time.sleep(2.0 * (TRIES - left))
        raise AssertionError("the last try either answers or raises")

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            parts = urllib.parse.urlsplit(self.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=self.seconds)
        except ValueError as error:
            raise EngineUnavailable(f"{self.url} is no address", remedy="Give http://HOST:PORT") from error
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", parts.path.rstrip("/") + path, json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnavailable(
                f"the engine at {self.url} does not answer ({error or type(error).__name__})",
                remedy="Start it, or see its log",
            ) from error
        finally:
            connection.close()
        try:
            found = json.loads(data)
        except ValueError:
            found = {}
        found = found if isinstance(found, dict) else {}
        if response.status >= 400 or "error" in found:
            raise self._refusal(response.status, str(found.get("error", response.reason))[:300])
        return found

    def _refusal(self, status: int, said: str) -> AbliteratedError:
        if status == 404:
            return NotFound(f"the engine at {self.url} has no {self.model}", remedy=f"`ollama pull {self.model}`")
        if status >= 500:
            return EngineUnavailable(f"{self.model}: the engine fails ({said})", remedy="See its log")
        return EngineRefused(f"{self.model}: the engine refuses ({said})", remedy="See its log")


def engine_url(host: str = "") -> str:
    """Where the engine is: `host`, or $OLLAMA_HOST, or where Ollama is by default."""
    found = (host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    url = found if "://" in found else f"http://{found}"
    try:
        parts = urllib.parse.urlsplit(url)
        bare = parts.port is None and parts.scheme == "http" and "://" not in found
    except ValueError:
        bare = False  # said when it is asked
    return (f"{url}:11434" if bare else url).rstrip("/")


def _first(told: Any) -> Mapping[str, float]:
    """The first token's likeliest, as the engine lists them; empty where it doesn't."""
    try:
        listed = told[0]["top_logprobs"]
        return {str(one["token"]): float(one["logprob"]) for one in listed}
    except (TypeError, KeyError, IndexError, ValueError):
        return {}
