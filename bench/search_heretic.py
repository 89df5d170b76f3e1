"""The published `heretic-llm`, in an environment of its own outside the clone, driven as a person would drive it.

It asks questions at its end and needs a terminal for that, so it gets one; the first trial it offers is the one with
the fewest refusals, and of those with the least KL: its pick. Nothing of it is copied or kept here. Does not know our
side, or how results are scored.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "heretic-llm==1.4.0"
DEFAULT_TRIALS: Final = 200
LONGEST: Final = 3 * 3600.0
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]|\r")
# What it asks, and what is answered; in this order.
_QUESTIONS: Final = (
    ("Which trial do you want to use?", "\r"),
    ("What do you want to do with the decensored model?", "\r"),
    ("Path to the folder:", "{target}\r"),
)
_DONE: Final = "Model saved to"


class NoHeretic(Exception):
    """It could not be installed or run; the message says why."""


def environment(cache: Path) -> Path:
    """Its Python, installed on the first call; the same torch as ours, so that the arithmetic is no different."""
    import importlib.metadata

    python = cache / "heretic" / "venv" / "bin" / "python"
    done = cache / "heretic" / "installed"
    if done.is_file() and python.exists() and done.read_text() == PACKAGE:
        return python
    python.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    own = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(python.parent.parent)],
        [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), PACKAGE, *own],
    )
    for step in steps:
        found = subprocess.run(step, check=False, capture_output=True, text=True)
        if found.returncode:
            raise NoHeretic(f"{' '.join(step[:5])} …: {found.stderr.strip()[-400:]}")
    done.write_text(PACKAGE)
    return python


def run(
    python: Path, model: Path, prompts: dict[str, Sequence[str]], target: Path, place: Path, *, trials: int, seed: int,
    system: str, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """One run, from its start to the saved model; seconds, peak memory, tokens and every trial's figures.

    `prompts`: good, bad, good_evaluation, bad_evaluation.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    lines = [f"model = {json.dumps(str(model))}", f"seed = {seed}", 'export_strategy = "merge"']
    lines += [f"system_prompt = {json.dumps(system)}"]
    if trials != DEFAULT_TRIALS:
        lines += [f"n_trials = {trials}", f"n_startup_trials = {max(1, round(trials * 0.3))}"]
    for name, some in prompts.items():
        file = place / f"{name}.txt"
        file.write_text("\n".join(some) + "\n", encoding="utf-8")
        lines += [f"[{name}_prompts]", f"dataset = {json.dumps(str(file))}"]
    (place / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    counts = place / "counts.json"
    surroundings = {
        **os.environ,
        "COUNTS": str(counts),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "HF_HUB_OFFLINE": "1",
        "TERM": "xterm",
        "COLUMNS": "200",
    }
    surroundings.pop("PYTHONPATH", None)
    command = [str(python), str(Path(__file__).with_name("heretic_counted.py"))]
    began = time.monotonic()
    seen, usage, searched = _drive(command, place, surroundings, str(target), began)
    seconds = time.monotonic() - began
    (place / "output.txt").write_text(seen, encoding="utf-8")
    if not (target / "config.json").is_file():
        raise NoHeretic(f"it saved no model; its last words: {seen.strip()[-600:]}")
    told = _trials(place)
    return {
        "wall_s": round(seconds, 2),
        "search_s": round(searched, 2),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
        "trials": len(told),
        "best": min(((one["refusals"], one["kl_divergence"]) for one in told), default=None),
        **(json.loads(counts.read_text()) if counts.is_file() else {}),
    }


def _drive(
    command: list[str], place: Path, surroundings: dict[str, str], target: str, began: float
) -> tuple[str, Any, float]:
    """Run it on a terminal and answer its questions; what it wrote, what it used, and when its search had ended."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, cwd=place, env=surroundings, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    seen, asked, from_here, searched = "", 0, 0, 0.0
    ended = False
    while not ended:
        if time.monotonic() - began > LONGEST:
            break
        ready, _, _ = select.select([master], [], [], 1.0)
        if ready:
            try:
                data = os.read(master, 65536)
            except OSError:  # it has closed its end
                break
            seen += _ESCAPES.sub("", data.decode("utf-8", "replace"))
        if asked < len(_QUESTIONS) and _QUESTIONS[asked][0] in seen[from_here:]:
            from_here = len(seen)
            searched = searched or time.monotonic() - began
            os.write(master, _QUESTIONS[asked][1].format(target=target).encode())
            asked += 1
        ended = asked == len(_QUESTIONS) and _DONE in seen[from_here:]
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    os.close(master)
    return seen, usage, searched


def _trials(place: Path) -> list[dict[str, Any]]:
    """Each finished trial's own figures, from its journal."""
    found: dict[int, dict[str, Any]] = {}
    for file in (place / "checkpoints").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            attributes = entry.get("user_attr") or {}
            if entry.get("trial_id") is not None and attributes:
                found.setdefault(entry["trial_id"], {}).update(attributes)
    return [one for one in found.values() if "refusals" in one and "kl_divergence" in one]
