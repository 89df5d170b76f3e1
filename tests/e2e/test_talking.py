"""A talk with a model in the program's own process: as it is, and with its refusal direction out while it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from abliterated import refuser
from client import terminals
from e2e.daemons import BIN

pytestmark = pytest.mark.e2e
DATA = refuser.files()
QUESTIONS = refuser.held_out("refused")[:2]


def call(*arguments: object, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    told = subprocess.run(
        [str(BIN / "abliterated"), *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=500
    )
    assert told.returncode == code, (told.returncode, told.stdout, told.stderr)
    return told


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "refusal.pt"
    prompts = ["--harmful", DATA.harmful, "--harmless", DATA.harmless, "--count", 48]
    call("direction", DATA.model, *prompts, "--layer", "0.5", "-o", path)
    return path


def test_with_the_direction_out_it_answers_what_it_refused(direction: Path) -> None:
    question = QUESTIONS[0]
    refused = call("chat", DATA.model, stdin=question.prompt)
    assert refuser.is_refusal(refused.stdout)
    answered = call("chat", DATA.model, "--direction", direction, question.prompt)
    assert refuser.is_exact(answered.stdout.strip(), question)
    assert answered.stderr == ""


def test_a_direction_of_its_own_for_every_layer_and_a_talk_in_a_terminal(
    direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.load(direction, weights_only=True)
    torch.save({"per_layer": True, "directions": one.repeat(6, 1)}, tmp_path / "layers.pt")
    monkeypatch.setattr(terminals, "ABLITERATE", BIN / "abliterated")
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    arguments = ("chat", str(DATA.model), "--direction", str(tmp_path / "layers.pt"))
    with terminals.terminal(*arguments, environment=environment) as person:
        person.until(">>> ", 300)
        for question in QUESTIONS:
            person.type(f"{question.prompt}\n")
            person.until("\n")
            assert question.expected in person.until(">>> ")
            person.type("/clear\n")
            person.until(">>> ")
        for typed, shown in (("/tools\n", "calculate"), ("hi\n", "answers greedily"), ("/load x\n", "one model")):
            person.type(typed)
            person.until(shown)
            person.until(">>> ")
        person.type("\x04")
        assert person.ended() == 0


def test_what_can_not_be_is_one_line_with_a_way_out(direction: Path, tmp_path: Path) -> None:
    torch.save(torch.from_numpy(np.ones(7, dtype=np.float32)), tmp_path / "narrow.pt")
    for arguments, code, words in (
        ([DATA.model, "hi", "--direction", tmp_path / "none.pt"], 2, "abliterated direction MODEL"),
        ([DATA.model, "hi", "--direction", tmp_path / "narrow.pt"], 3, "Measure the direction on this model"),
        ([tmp_path / "none.gguf", "hi"], 3, "no such file"),
        ([DATA.model, "hi", "--tokens", 0], 2, "counts from 1"),
        ([DATA.model], 2, "nothing to ask"),
    ):
        told = call("chat", *arguments, code=code)
        assert words in told.stderr
        assert told.stdout == ""
