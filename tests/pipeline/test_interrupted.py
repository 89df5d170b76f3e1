"""Every point a run tells of: cancelled there, or the disk full there, nothing is visible, and the next attempt ends
with the bytes of a run nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from abliterate.contract.errors import Cancelled
from abliterate.contract.messages import Progress, Result, Task
from abliterated.pipeline.direction_files import write_direction
from abliterated.pipeline.directions import direction
from abliterated.pipeline.run import run
from pipeline.folders import CONVERTER, listed, planted_folder, task
from pipeline.planted import REFUSAL, plant

PATIENCE = 30.0


def given(at: Path) -> dict[str, Any]:
    """A direction at hand, and nothing asked: the edit alone."""
    write_direction(at / "given.pt", direction(np.eye(64)[REFUSAL], origin={}), {})
    return {"direction": {"method": "file", "file": str(at / "given.pt")}, "evaluate": {"prompts": 0}}


FORMS: dict[str, Callable[[Path], Task]] = {
    "gguf": lambda at: task(plant(at), direction={"method": "layer", "layer": 2}),
    "converted": lambda at: task(planted_folder(at), CONVERTER, export={"quantize": "Q8_0"}, **given(at)),
    "folder": lambda at: task(planted_folder(at, shards=True), export={"format": "safetensors"}, **given(at)),
    "adapter": lambda at: task(plant(at), edit={"norm": "none"}, export={"format": "adapter"}, **given(at)),
}
# On a disk of its own: fills it at each point in turn, makes room again, and says what happened.
PROGRAM = """
import json, shutil, sys
from pathlib import Path
import msgspec
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.messages import Task
from abliterated.pipeline.run import run

task = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Task)
disk, points, told = Path(sys.argv[2]), json.loads(sys.argv[3]), []
filler = disk / "filler"
for point in points:
    def emit(progress):
        if f"{progress.stage}: {progress.message}" == point and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                except OSError:
                    pass
    try:
        run(task, emit, lambda: False)
        ended = "done"
    except AbliteratedError as error:
        ended = type(error).__name__
    except BaseException as error:
        ended = repr(error)
    visible = [path.name for path in Path(task.output).iterdir() if path.name[0] != "."]
    told.append([point, filler.exists(), ended, visible])
    filler.unlink(missing_ok=True)
    if ended == "done":
        shutil.rmtree(task.output)
last = run(task, lambda _: None, lambda: False)
print(json.dumps([told, last.product, last.digest]))
"""


def points(asked: Task) -> tuple[list[str], Result]:
    """Everything an undisturbed run tells, each once, and its result. In folders of its own."""
    seen: list[str] = []
    elsewhere = Path(asked.work).parent / "elsewhere"
    alone = msgspec.structs.replace(asked, work=str(elsewhere / "work"), output=str(elsewhere / "out"))
    result = run(alone, lambda progress: seen.append(f"{progress.stage}: {progress.message}"), lambda: False)
    return list(dict.fromkeys(seen)), result


def visible(folder: Path) -> list[str]:
    return [name for name in listed(folder) if not name.startswith(".")]


def content(path: Path) -> Any:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return {file.name: content(file) for file in sorted(path.iterdir())}


@pytest.mark.parametrize("form", FORMS)
def test_cancelled_anywhere_nothing_is_visible_and_the_next_attempt_ends_alike(tmp_path: Path, form: str) -> None:
    asked = FORMS[form](tmp_path)
    everywhere, undisturbed = points(asked)
    assert len(everywhere) >= 4
    for point in everywhere:
        stop: list[float] = []

        def emit(progress: Progress, point: str = point, stop: list[float] = stop) -> None:
            if f"{progress.stage}: {progress.message}" == point and not stop:
                stop.append(time.monotonic())

        try:
            run(asked, emit, lambda stop=stop: bool(stop))  # type: ignore[misc]
            # An earlier attempt had ended that stage, so there was nothing to cancel; or all that was left was to tell.
            assert not stop or point.startswith("report: "), f"not cancelled at {point}"
            shutil.rmtree(asked.output)
        except Cancelled:
            assert time.monotonic() - stop[0] < PATIENCE
            assert visible(Path(asked.output)) == [], point
    result = run(asked, lambda _: None, lambda: False)
    assert (result.product, result.digest, result.content) == (
        undisturbed.product,
        undisturbed.digest,
        undisturbed.content,
    )
    elsewhere = Path(asked.work).parent / "elsewhere" / "out"
    assert content(Path(asked.output) / result.product) == content(elsewhere / undisturbed.product)


def where_it_writes(everywhere: list[str]) -> list[str]:
    """Of a stage that only computes, the last point before it writes what it found; of one that writes, all."""
    stages = [point.partition(":")[0] for point in everywhere]
    followed = zip(everywhere, stages, [*stages[1:], ""], strict=True)
    return [point for point, stage, following in followed if stage in ("edit", "report") or following != stage]


def own_disk(at: Path, megabytes: int) -> list[str]:
    """What makes a command run with a small disk of its own mounted at `at`; skips where that can't be had."""
    inside = f'mount -t tmpfs -o size={megabytes}m tmpfs "{at}" && exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    try:
        if subprocess.run([*argv, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no disk of one's own can be mounted here")
    except FileNotFoundError:
        pytest.skip("no disk of one's own can be mounted here")
    return argv


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_fills_up_anywhere_is_named_and_leaves_nothing(tmp_path: Path, form: str) -> None:
    asked = FORMS[form](tmp_path)
    everywhere, undisturbed = points(asked)
    disk = tmp_path / "disk"
    disk.mkdir()
    there = msgspec.structs.replace(asked, work=str(disk / "work"), output=str(disk / "out"))
    (tmp_path / "task.json").write_bytes(msgspec.json.encode(there))
    argv = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "task.json"),
        str(disk),
        json.dumps(where_it_writes(everywhere)),
    ]
    done = subprocess.run([*own_disk(disk, 8), *argv], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told, product, digest = json.loads(done.stdout.splitlines()[-1])
    for point, filled, ended, seen in told:
        if filled:
            assert ended == "DiskError", (point, ended)
            assert seen == [], point
    assert sum(filled for _, filled, *_ in told) >= 2
    assert (product, digest) == (undisturbed.product, undisturbed.digest)
