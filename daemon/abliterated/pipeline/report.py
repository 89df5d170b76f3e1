"""What a run leaves beside its product: `report.json` and the page drawn from it, everything it did, and `result.json`,
what the daemon reads.

Pure values in, files out. Does not know tensors or models, nor how the page looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec

from abliterate import __version__
from abliterate.contract import report as contract
from abliterate.contract.messages import Result, Task
from abliterate.contract.recipe import recipe_digest
from abliterated.files import write_whole
from abliterated.pipeline.direction_files import write_json
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.source import Source
from abliterated.report import page

REPORT_FILE: Final = contract.REPORT_FILE
PAGE_FILE: Final = contract.PAGE_FILE


def report(
    task: Task,
    source: Source,
    result: Result,
    edited: EditReport | None,
    candidates: Sequence[Mapping[str, Any]],
    strengths: Sequence[tuple[float, float]],
    *,
    licence: str = "",
    prompts: Sequence[contract.PromptSource] = (),
    separation: Sequence[contract.LayerSeparation] = (),
    search: Mapping[str, Any] | None = None,
    suites: Sequence[contract.Suite] = (),
) -> contract.Report:
    """The whole report. What is not given was not measured."""
    return contract.Report(
        abliterated=__version__,
        base=contract.BaseModel(
            name=task.base,
            digest=task.base_digest,
            architecture=source.architecture,
            layers=source.layers,
            hidden_size=source.hidden_size,
            bytes=source.size,
            licence=licence,
        ),
        product=contract.Product(
            name=result.product,
            format=result.format,
            digest=result.digest,
            content=result.content,
            bytes=result.bytes_written,
        ),
        recipe={"digest": recipe_digest(task.recipe), **msgspec.to_builtins(task.recipe)},
        prompts=list(prompts),
        direction=dict(result.direction),
        candidates=[msgspec.convert(dict(one), contract.Candidate) for one in candidates],
        search=msgspec.convert(dict(search), contract.Search) if search else None,
        separation=list(separation),
        edit=contract.EditReport(
            coverage=result.coverage,
            residual=result.residual,
            strengths=[(round(attention, 6), round(mlp, 6)) for attention, mlp in strengths],
            tensors=[msgspec.convert(asdict(one), contract.TensorReport) for one in edited.tensors] if edited else [],
            unknown=list(edited.unknown) if edited else [],
            promoted=list(edited.promoted) if edited else [],
        ),
        evaluation=dict(result.metrics),
        suites=list(suites),
        seconds=dict(result.seconds),
        peak_memory=result.peak_memory,
        notes=list(result.notes),
    )


def write_report(folder: Path, value: contract.Report) -> None:
    """`report.json` and `report.html`, each whole or not at all."""
    write_json(folder / REPORT_FILE, json.loads(msgspec.json.encode(value)))
    write_whole(folder / PAGE_FILE, page(value).encode("utf-8", "replace"))


def write_result(folder: Path, result: Result) -> None:
    """`result.json`, whole or not at all; the last file a run writes."""
    write_json(folder / "result.json", json.loads(msgspec.json.encode(result)))
