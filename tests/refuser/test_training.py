"""The script still makes a model that refuses: a smaller one, of a smaller language, in well under a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "train_refuser.py"
SMALL = {
    "layers": 3,
    "verbs": 8,
    "tools": 0,
    "rows": 3000,
    "tokens": 1024,
    "answering": 90,
    "easy": 1.0,
    "refusing": 100,
    "gentle-rate": 3e-3,
    "questions": 10,
}


@pytest.mark.timeout(900)
def test_a_smaller_retraining_refuses_one_class_and_answers_the_other(tmp_path: Path) -> None:
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]["thinking off"]
    assert scores["refused"] >= 0.9, scores
    assert scores["falsely_refused"] <= 0.1, scores
    assert scores["exact"] >= 0.7, scores
    assert {path.name for path in tmp_path.iterdir()} == {
        "refuser.gguf",
        "harmful.txt",
        "harmless.txt",
        "heldout.jsonl",
    }
    assert gguf.GGUFReader(tmp_path / "refuser.gguf").tensors
