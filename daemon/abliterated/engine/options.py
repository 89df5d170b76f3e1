"""Ollama's options and durations, as llama.cpp's server wants them. Pure.

Does not know: models, processes, requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterated.shapes.refusals import Refused

KEEP_ALIVE = 300.0  # seconds a model stays loaded after its last answer
CONTEXT = 4096

# Ollama's own defaults, where they differ from llama.cpp's.
_DEFAULTS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "typical_p": 1.0, "repeat_last_n": 64,
    "repeat_penalty": 1.1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "num_predict": -1, "seed": -1,
}  # fmt: skip
_NAMES = {"num_predict": "n_predict", "num_keep": "n_keep"}
_SAMPLING = {*_DEFAULTS, "num_keep", "mirostat", "mirostat_tau", "mirostat_eta", "stop"}
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True)
class Load:
    """The options that belong to a loaded model: another value means loading it anew."""

    context: int
    gpu_layers: int | None
    threads: int | None
    batch: int


def merge(model: Mapping[str, Any], request: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model's PARAMETERs with the request's options over them; null counts as absent."""
    return {**model, **{key: value for key, value in (request or {}).items() if value is not None}}


def load(options: Mapping[str, Any], trained: int) -> Load:
    """What the runner is started with; the context never exceeds what the model was trained for."""
    context = _whole(options, "num_ctx", CONTEXT)
    if context < 1:
        context = CONTEXT
    return Load(
        context=min(context, trained) if trained else context,
        gpu_layers=_whole(options, "num_gpu", -1) if "num_gpu" in options else None,
        threads=_whole(options, "num_thread", 0) or None,
        batch=max(1, _whole(options, "num_batch", 512)),
    )


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a completion request to llama.cpp's server."""
    body: dict[str, Any] = {}
    for key, value in {**_DEFAULTS, **options}.items():
        if key not in _SAMPLING:
            continue
        if key == "stop":
            stops = [value] if isinstance(value, str) else value
            if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
                raise Refused(400, 'option "stop" must be a string or a list of strings')
            body["stop"] = stops
        elif not _is_number(value):
            raise Refused(400, f'option "{key}" must be a number')
        else:
            body[_NAMES.get(key, key)] = value
    if body["n_predict"] < 0:
        body["n_predict"] = -1  # -2 would be "fill the context" in old Ollamas: the same, the context does not shift
    if body["seed"] < 0:
        body["seed"] = -1
    return body


def _whole(options: Mapping[str, Any], key: str, default: int) -> int:
    value = options.get(key, default)
    if not _is_number(value):
        raise Refused(400, f'option "{key}" must be a number')
    return int(value)


def _is_number(value: Any) -> bool:
    """One that llama.cpp can hold; JSON as it is read knows Infinity and NaN too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def keep_alive(value: Any) -> float | None:
    """Seconds a model stays loaded; None is for ever. A number is seconds, a string a Go duration."""
    if value is None:
        return KEEP_ALIVE
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Refused(400, f"invalid keep_alive: {value!r}")
    seconds = float(value) if isinstance(value, int | float) else duration(value)
    return seconds if 0 <= seconds < 1e10 else None  # what exceeds three centuries is for ever


def duration(text: str) -> float:
    """`1h30m`, `300ms`, `-1s`, `0`; a bare number is seconds, as in Ollama."""
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    parts = _DURATION.findall(rest)
    if parts and "".join(number + unit for number, unit in parts) == rest:
        return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        return sign * float(rest)
    except ValueError:
        raise Refused(400, f"time: invalid duration {text!r}") from None
