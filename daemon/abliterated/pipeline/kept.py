"""What a run keeps of a stage that has ended, so that the next attempt with the same work folder goes on behind it.

A stage's record says what the stage depended on, what it wrote and what it reported. It counts only while the inputs
are the same and the files are those it wrote. Does not know what the stages do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from abliterate import __version__
from abliterate.contract.messages import Task
from abliterated.pipeline.direction_files import write_json
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.source import Source


def inputs_digest(task: Task, source: Source, stage: str, facts: Any) -> str:
    """sha256 (hex) of everything the stage's outcome depends on: version, base and `facts`."""
    base = [task.base_digest or [fingerprint(part) for part in source.parts], source.size]
    named = [stage, __version__, base, facts]
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


def keep(work: Path, stage: str, inputs: str, path: Path, report: EditReport) -> None:
    """Record that the stage wrote `path`."""
    facts = {"inputs": inputs, "name": path.name, "files": fingerprint(path), "report": asdict(report)}
    write_json(work / f"{stage}.json", facts)


def recall(work: Path, stage: str, inputs: str, places: Iterable[Path]) -> tuple[Path, EditReport] | None:
    """What an earlier attempt wrote, if it is what this one would write, and where it lies now."""
    try:
        facts = json.loads((work / f"{stage}.json").read_text(encoding="utf-8"))
        if facts["inputs"] != inputs:
            return None
        report = msgspec.convert(facts["report"], EditReport)
        for place in places:
            path = place / facts["name"]
            if path.exists() and fingerprint(path) == facts["files"]:
                return path, report
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def fingerprint(path: Path) -> list[list[Any]]:
    """Name, size and time of a file, or of a folder's weights: a rename keeps them, a rewrite does not."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")]) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
