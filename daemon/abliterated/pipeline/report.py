"""What a run leaves beside its product: `report.json`, everything it did, and `result.json`, what the daemon reads.

Pure values in, JSON files out. Does not know tensors or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec

from abliterate import __version__
from abliterate.contract.messages import Result, Task
from abliterate.contract.recipe import recipe_digest
from abliterated.pipeline.direction_files import write_json
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.source import Source

REPORT_FILE: Final = "report.json"


def report(
    task: Task,
    source: Source,
    result: Result,
    edited: EditReport | None,
    candidates: Sequence[Mapping[str, Any]],
    strengths: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """The whole report as plain JSON values."""
    return {
        "abliterated": __version__,
        "base": {
            "name": task.base,
            "digest": task.base_digest,
            "architecture": source.architecture,
            "layers": source.layers,
            "hidden_size": source.hidden_size,
            "bytes": source.size,
        },
        "recipe": {"digest": recipe_digest(task.recipe), **msgspec.to_builtins(task.recipe)},
        "direction": {**result.direction, "candidates": list(candidates)},
        "edit": {
            "coverage": result.coverage,
            "residual": result.residual,
            "strengths": [[round(attention, 6), round(mlp, 6)] for attention, mlp in strengths],
            "tensors": [asdict(tensor) for tensor in edited.tensors] if edited else [],
            "unknown": list(edited.unknown) if edited else [],
            "promoted": list(edited.promoted) if edited else [],
        },
        "evaluation": result.metrics,
        "product": {
            "name": result.product,
            "format": result.format,
            "digest": result.digest,
            "content": result.content,
            "bytes": result.bytes_written,
        },
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "notes": result.notes,
    }


def write_report(folder: Path, value: Mapping[str, Any]) -> None:
    """`report.json`, whole or not at all."""
    write_json(folder / REPORT_FILE, value)


def write_result(folder: Path, result: Result) -> None:
    """`result.json`, whole or not at all; the last file a run writes."""
    write_json(folder / "result.json", json.loads(msgspec.json.encode(result)))
