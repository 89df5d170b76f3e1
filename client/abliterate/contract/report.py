"""The report of a run, `report.json`: what was done to a model and what it changed; the page is drawn from this alone.

Plain frozen structs, versioned: a reader takes what it knows and leaves the rest. Lists are empty and numbers None
where a run has not measured them. Does not know how anything is measured, nor how it is drawn.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import field

from abliterate.contract.errors import AbliteratedError, ModelError

VERSION: Final = 2
REPORT_FILE: Final = "report.json"
PAGE_FILE: Final = "report.html"


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """What was edited. `licence`: as its maker names it, "" where nobody does."""

    name: str
    digest: str = ""
    architecture: str = ""
    layers: int = 0
    hidden_size: int = 0
    bytes: int = 0
    licence: str = ""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A direction that was tried: mean refusal score without it (`bypass`, lower is better), divergence of harmless
    answers without it (`kl`, nats a token), refusal score of harmless prompts with it added (`induce`)."""

    layer: float
    position: int
    bypass: float | None = None
    kl: float | None = None
    induce: float | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A trial of the search. `refusal`: share refused, as prefill tells; `verified`: share refused by answers, where it
    was asked; `parameters`: what was tried, by name."""

    number: int
    refusal: float
    kl: float
    parameters: dict[str, Any] = field(default_factory=dict)
    chosen: bool = False
    verified: float | None = None


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """The search. `reached`: whether the chosen trial's refusals keep to the target."""

    trials: list[Trial] = field(default_factory=list)
    refusal_target: float | None = None
    reached: bool | None = None
    tokens_decoded: int = 0


class LayerSeparation(msgspec.Struct, frozen=True, kw_only=True):
    """Where the classes lie along the direction behind one layer: a projection for each prompt. `apart`: their means'
    distance in pooled standard deviations."""

    layer: int
    harmful: list[float]
    harmless: list[float]
    apart: float = 0.0
    chosen: bool = False


class TensorReport(msgspec.Struct, frozen=True, kw_only=True):
    """One edited tensor; the fields are `edit_report.TensorEdit`'s."""

    name: str
    type: str = ""
    kind: str = ""
    layer: int = -1
    residual: float = 0.0
    rounding: float = 0.0
    promoted_from: str = ""
    uncorrected: bool = False


class EditReport(msgspec.Struct, frozen=True, kw_only=True):
    """The edit. `strengths`: (attention, MLP) by layer."""

    coverage: float = 1.0
    residual: float = 0.0
    strengths: list[tuple[float, float]] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    promoted: list[str] = field(default_factory=list)


class PromptSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where prompts came from. `kind`: harmful, harmless or atoms."""

    kind: str
    name: str
    count: int
    licence: str = ""
    revision: str = ""


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """What came out."""

    name: str
    format: str
    digest: str = ""
    content: str = ""
    bytes: int = 0


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """A set of probes: how many of `total` went as `counted` says, before and after (None: not asked)."""

    name: str
    counted: str
    total: int
    before: int | None = None
    after: int | None = None
    higher_is_better: bool = False


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What is other than in the base. `failure` False: worth knowing only."""

    what: str = ""
    text: str = ""
    diff: str = ""
    failure: bool = True


class Certification(msgspec.Struct, frozen=True, kw_only=True):
    """What registering found out: conversations compared with the `reference`, differences, the first words said."""

    model: str = ""
    reference: str = ""
    engine: str = ""
    answer: str = ""
    compared: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `recipe` and `direction` are plain JSON objects; `evaluation` numbers by name (docs/reference)."""

    version: int = VERSION
    abliterated: str = ""
    base: BaseModel
    product: Product
    recipe: dict[str, Any] = field(default_factory=dict)
    prompts: list[PromptSource] = field(default_factory=list)
    direction: dict[str, Any] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    search: Search | None = None
    separation: list[LayerSeparation] = field(default_factory=list)
    edit: EditReport = EditReport()
    evaluation: dict[str, float] = field(default_factory=dict)
    suites: list[Suite] = field(default_factory=list)
    certification: Certification | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    notes: list[str] = field(default_factory=list)


class UnreadableReport(ModelError):
    """A report that is none, or of a version this one can't read."""


def read_report(data: bytes) -> Report:
    """The report in these bytes. Raises UnreadableReport."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise UnreadableReport(
                f"the report is of version {version}, and this abliterated reads {VERSION}",
                remedy="Run the recipe again, or read report.json with the abliterated that wrote it",
            )
        return msgspec.json.decode(data, type=Report)
    except AbliteratedError:
        raise
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnreadableReport(f"the report can't be read: {error}", remedy="Run the recipe again") from error


class _Versioned(msgspec.Struct):
    version: int = 1
