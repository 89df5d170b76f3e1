"""What goes over the wires: worker → daemon (progress, result), daemon → client (jobs, status), and the worker's task.

Plain frozen structs, encoded as JSON by msgspec. Does not know sockets or files.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import field

from abliterate.contract.errors import FailureClass
from abliterate.contract.recipe import Recipe
from abliterate.contract.states import Reason, Stage, State


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is given: a recipe whose names are resolved to files.

    `source`: absolute path of a .gguf (the first part of a split one) or of a folder with safetensors; "" while it
    must still be fetched (`hf:`). `base`: how the user named it. `base_digest`: sha256:… where the engine knows it.
    `work`: where stages lie. `output`: the folder that gets the product and the reports. `lock`: the GPU lock's file,
    "" for none. `converter`: path of the user's converter from a folder to GGUF, an Ollama's address (http://…) where
    its importer does that, "" for none. `engine`: address of the Ollama that serves `evaluate.judge`, "" for
    $OLLAMA_HOST.
    """

    recipe: Recipe
    base: str
    source: str
    work: str
    output: str
    base_digest: str = ""
    job: str = ""
    remote_code: list[str] = field(default_factory=list)
    lock: str = ""
    converter: str = ""
    engine: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="event"):
    """How far a stage is. `remaining`: seconds, None where no honest estimate exists. `memory`: peak bytes resident."""

    stage: Stage
    done: float = 0
    total: float = 0
    unit: str = ""
    message: str = ""
    remaining: float | None = None
    memory: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True, tag="result", tag_field="event"):
    """What a run made. `product`: file or folder name below the output folder; digests are sha256 hex.

    `metrics`: numbers by name (`refusal_before`, `kl_mean`, …); `seconds`: by stage; `direction`: how it was chosen.
    `coverage`: writers edited / writers expected. `residual`: ‖vᵀW'‖/‖vᵀW‖ over the edited tensors (largest).
    `short_of_target`: how far the share of refusals stays above the target the search was given.
    """

    product: str
    format: str
    digest: str = ""
    content: str = ""
    bytes_written: int = 0
    direction: dict[str, Any] = field(default_factory=dict)
    coverage: float = 1.0
    residual: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    notes: list[str] = field(default_factory=list)
    short_of_target: float = 0.0
    certification: dict[str, Any] = field(default_factory=dict)


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure", tag_field="event"):
    """Why a run ended without a product."""

    failure: FailureClass
    message: str
    remedy: str = ""


WorkerEvent = Progress | Result | Failure


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the client sees it. Times are seconds since the epoch."""

    id: str
    label: str
    model: str
    target: str
    state: State
    reason: Reason = ""
    explanation: str = ""
    stage: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    message: str = ""
    remaining: float | None = None
    memory: int = 0
    attempts: int = 0
    submitted: float = 0
    started: float | None = None
    ended: float | None = None
    failure: Failure | None = None
    result: Result | None = None


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine the daemon works with, and whether it answers."""

    kind: str
    url: str
    version: str = ""
    answers: bool = False


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/status`."""

    version: str
    pid: int
    uptime: float
    paused: bool
    proxy: str
    engine: EngineView
    jobs: list[JobView]
    draining: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/jobs`: a recipe's text and the id its submitter chose."""

    recipe: str
    id: str = ""
    label: str = ""


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to it. `existing`: the id was known already; nothing was added. `jobs`: all ids a matrix made."""

    id: str
    target: str = ""
    existing: bool = False
    jobs: list[str] = field(default_factory=list)


class Clean(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/clean`: forget the jobs that ended so many days ago; None: `jobs.keep_days`."""

    days: float | None = None


class Cleaned(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to it: how many jobs are forgotten, how many bytes that freed."""

    jobs: int
    bytes: int


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Every error the control API answers."""

    error: str
    remedy: str = ""
    exit_code: int = 1
