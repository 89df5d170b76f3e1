"""What the client and the daemon say about models that are there: diagnoses, repairs, removals, the list.

Plain frozen structs, encoded as JSON by msgspec. Does not know how any of it is found out.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import field

Level = Literal["ok", "note", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing seen. `key`: its stable name; `text`: what is so; `remedy`: what to do, "" where nothing is."""

    key: str
    level: Level
    text: str
    remedy: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model, or of the installation (`model` empty). `base`: the model of the same engine it was held against."""

    model: str = ""
    engine: str = ""
    base: str = ""
    capabilities: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(finding.level in ("ok", "note") for finding in self.findings)

    @property
    def broken(self) -> bool:
        return any(finding.level == "problem" for finding in self.findings)


class DoctorRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/doctor`. `deep`: let the engine render conversations, for which it may load the model."""

    model: str = ""
    base: str = ""
    deep: bool = False


class RepairRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/repair`. `base`: the model to take template and the rest from; `back`: undo the last repair."""

    model: str
    base: str = ""
    back: bool = False


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """`changed`: what is other than before; empty: nothing needed repair. `backup`: the name of the copy kept."""

    model: str
    base: str = ""
    backup: str = ""
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    diagnosis: Diagnosis = Diagnosis()


class UndoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/undo`. `copy`: also where the name is not ours, but what is in it was made by us."""

    model: str
    copy: bool = False


class Undone(msgspec.Struct, frozen=True, kw_only=True):
    """`removed`: every name taken away. `freed`: bytes of blobs the engine no longer has. `kept_by`: models that hold
    the same weights, so that these stay."""

    model: str
    removed: list[str] = field(default_factory=list)
    freed: int = 0
    kept_by: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model of our making. `base_there`: the engine still has what it was made from. Shares are 0 to 1, None where
    nothing was measured."""

    name: str
    base: str
    size: int = 0
    base_size: int = 0
    base_there: bool = False
    quantization: str = ""
    refusal_before: float | None = None
    refusal_after: float | None = None
    modified: str = ""
    content: str = ""


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/models`. `others`: how many models of the engine are not of our making."""

    models: list[ModelRow] = field(default_factory=list)
    others: int = 0
