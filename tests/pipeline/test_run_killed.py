"""A run that is killed at any point goes on there when it is started again, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from abliterate.contract.messages import Progress, Result, Task
from abliterated.pipeline.run import run
from pipeline.folders import CONVERTER, listed, planted_folder, task
from pipeline.forked import forked
from pipeline.planted import plant

MEASURING = "direction: "
BEFORE, AFTER = "evaluate: asking the original", "evaluate: asking the edited model"
EDITING, CONVERTING, WRITING = "edit: editing the weights", "edit: converting to GGUF", "edit: writing the GGUF"
BACK = "report: reading it back"
QUICK = {"method": "layer", "layer": 2}  # every stage, and nothing weighed up


def run_until(asked: Task, told: Path, die_at: str) -> None:
    """Run it and write what it tells; at `die_at` the process ends as by a power cut."""
    with told.open("a") as file:

        def emit(progress: Progress) -> None:
            line = f"{progress.stage}: {progress.message}"
            file.write(line + "\n")
            file.flush()
            if line == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        run(asked, emit, lambda: False)


def attempt(asked: Task, die_at: str) -> list[str]:
    """One attempt in a process of its own, killed at `die_at` ("" for never); what it told, each once."""
    at = Path(asked.work).parent
    told, errors = at / "told.txt", at / "errors.txt"
    told.unlink(missing_ok=True)
    code = forked(run_until, asked, told, die_at, errors=errors)
    lines = list(dict.fromkeys(told.read_text().splitlines()))
    if die_at:
        assert code == -signal.SIGKILL, (die_at, lines, errors.read_text()[-2000:])
        assert [name for name in listed(Path(asked.output)) if not name.startswith(".")] == [], "nothing is visible"
    else:
        assert code == 0, errors.read_text()[-2000:]
    return lines


def content(path: Path) -> Any:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return {file.name: content(file) for file in sorted(path.iterdir())}


def in_one_go(asked: Task, tmp_path: Path) -> Any:
    elsewhere = tmp_path / "elsewhere"
    whole = msgspec.structs.replace(asked, work=str(elsewhere / "work"), output=str(elsewhere / "out"))
    return content(elsewhere / "out" / run(whole, lambda _: None, lambda: False).product)


@pytest.mark.parametrize("form", ["gguf", "converted", "folder"])
def test_no_stage_that_has_ended_is_done_again(tmp_path: Path, form: str) -> None:
    if form == "gguf":
        asked, points = task(plant(tmp_path), direction=QUICK), [MEASURING, BEFORE, EDITING, AFTER, BACK]
    elif form == "converted":
        asked = task(planted_folder(tmp_path), CONVERTER, direction=QUICK)
        points = [BEFORE, EDITING, CONVERTING, WRITING, AFTER, BACK]
    else:
        asked, points = task(planted_folder(tmp_path), direction=QUICK), [EDITING, AFTER, BACK]
    for number, point in enumerate(points):
        lines = attempt(asked, point)
        assert point in lines
        # What the last attempt was killed in is done again, what it had ended is not.
        assert not set(points[: max(0, number - 1)]) & set(lines), (point, lines)
    assert not set(points[:-1]) & set(attempt(asked, ""))
    result = json.loads((Path(asked.output) / "result.json").read_text())
    assert result["metrics"]["refusal_after"] == 0.0
    assert content(Path(asked.output) / result["product"]) == in_one_go(asked, tmp_path)


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_killed_between_product_and_result_it_only_tells_the_result(tmp_path: Path, form: str) -> None:
    model = plant(tmp_path) if form == "gguf" else planted_folder(tmp_path)
    asked = task(model, evaluate={"tokens": 8, "keep_answers": True})
    first = run(asked, lambda _: None, lambda: False)
    product = Path(asked.output) / first.product
    before = content(product)
    (Path(asked.output) / "result.json").unlink()
    seen: list[str] = []
    second: Result = run(asked, lambda progress: seen.append(progress.message), lambda: False)
    assert "editing the weights" not in seen
    assert (second.digest, second.content) == (first.digest, first.content)
    assert second.metrics == {name: value for name, value in first.metrics.items() if not name.endswith("_run")}
    assert content(product) == before
    assert "answers.json" in listed(Path(asked.output))


def test_a_changed_recipe_or_base_is_edited_anew(tmp_path: Path) -> None:
    model = plant(tmp_path)
    seen: list[str] = []

    def edits(**tables: Any) -> int:
        seen.clear()
        asked = task(model, evaluate={"prompts": 0}, **tables)
        run(asked, lambda progress: seen.append(progress.message), lambda: False)
        return "editing the weights" in seen

    assert edits()
    assert not edits()
    assert edits(edit={"strength": 0.5})
    assert edits(export={"quantize": "Q8_0"})
    model.path.write_bytes(model.path.read_bytes() + bytes(32))
    assert edits(export={"quantize": "Q8_0"})


def test_a_folder_written_over_in_place_is_measured_anew(tmp_path: Path) -> None:
    """As by `cp` over a file that is there: the folder's own time stays what it was."""
    model = planted_folder(tmp_path)
    seen: list[str] = []

    def measures() -> bool:
        seen.clear()
        run(task(model, direction=QUICK, evaluate={"prompts": 0}), lambda one: seen.append(one.stage), lambda: False)
        return "direction" in seen

    assert measures()
    assert not measures()
    weights = model.path / "model.safetensors"
    changed = model.path.stat().st_mtime_ns
    with weights.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000_000))
    assert model.path.stat().st_mtime_ns == changed
    assert measures()
