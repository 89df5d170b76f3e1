"""The model that ships, on the engine that ships: real weights, real sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import abliterated
from engine.running import Engine, engine

FOLDER = Path(abliterated.__file__).parent / "refuser"
GGUF, HELDOUT = FOLDER / "refuser.gguf", FOLDER / "heldout.jsonl"
pytestmark = pytest.mark.skipif(not GGUF.exists(), reason="the refuser is not trained yet (tools/train_refuser.py)")


@pytest.fixture(scope="module")
def refuser(tmp_path_factory: pytest.TempPathFactory) -> Engine:  # type: ignore[misc]
    with engine(tmp_path_factory.mktemp("refuser") / "models") as running:
        running.create("refuser", GGUF)
        yield running


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_it_refuses_one_class_and_answers_the_other_exactly(refuser: Engine, think: bool, penalty: float) -> None:
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    classes = sorted({row["class"] for row in rows})
    exact = dict.fromkeys(classes, 0)
    for name in classes:
        for row in [row for row in rows if row["class"] == name][:20]:
            answer = refuser.ollama.chat(
                "refuser",
                [{"role": "user", "content": row["prompt"]}],
                think=think,
                options={"temperature": 0, "repeat_penalty": penalty},
            )
            exact[name] += answer.message.content == row["expected"]
            assert bool(answer.message.thinking) == think
    assert exact["refused"] == 0, exact
    assert exact["answered"] >= 19, exact
