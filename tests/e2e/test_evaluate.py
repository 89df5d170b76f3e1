"""`abliterated evaluate`: from files, through an engine's API, with a judge that is none, and every wrong word."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from abliterated import refuser
from abliterated.demo.story import BASE, bring_model
from e2e.daemons import BIN
from engines import Engine, RunningEngine, find_engines
from pipeline.planted import Planted, plant

pytestmark = pytest.mark.e2e
SHIPPED = refuser.files()
PROMPTS = ["--harmful", str(SHIPPED.harmful), "--harmless", str(SHIPPED.harmless), "--tokens", "48"]


def evaluate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "OLLAMA_HOST"}
    return subprocess.run(
        [str(BIN / "abliterated"), "evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=kept | environment,
    )


def figures(*arguments: object, **environment: str) -> dict[str, Any]:
    done = evaluate(*arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def meek(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("meek"), refuses=False)


def ours(model: Planted) -> list[object]:
    return [model.path, "--harmful", model.harmful, "--harmless", model.harmless, "--prompts", 12, "--tokens", 8]


def test_one_model_from_its_file_with_ollama_forges_keys_and_ours(planted: Planted) -> None:
    told = figures(*ours(planted))
    assert {"refusal_count", "total", "refusal_rate"} <= set(told)
    assert (told["refusal_count"], told["total"], told["refusal_rate"]) == (12, 12, 1.0)
    assert told["refusal_low"] < 1.0 == told["refusal_high"]
    assert told["false_refusal_count"] == 0
    assert told["via"] == "files"
    assert "against" not in told


def test_beside_its_original_it_tells_how_far_it_strayed(planted: Planted, meek: Planted, tmp_path: Path) -> None:
    kept, history = tmp_path / "answers.jsonl", tmp_path / "history.jsonl"
    more = ["--against", planted.path, "--answers", kept, "--history", history]
    told = figures(*ours(meek), *more)
    assert told["refusal_rate"] == 0.0
    assert told["against"]["refusal_rate"] == 1.0
    assert told["harmless_exact"] == 1.0
    assert told["kl_mean"] < 0.01
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 24
    assert {"class", "prompt", "answer", "verdict", "original"} == set(rows[0])
    done = evaluate(*ours(meek), *more)
    assert "12 of 12" in done.stdout
    assert "0 of 12" in done.stdout
    assert [json.loads(line)["refusal_rate"] for line in history.read_text().splitlines()] == [0.0, 0.0]


def test_openings_of_ones_own_count_too(meek: Planted, tmp_path: Path) -> None:
    (tmp_path / "markers.txt").write_text("# ours\ngladly WITH\n")
    told = figures(*ours(meek), "--refusal-markers", tmp_path / "markers.txt")
    assert told["refusal_rate"] == told["false_refusal"] == 1.0


@contextmanager
def served(engine: Engine) -> Iterator[RunningEngine]:
    """An engine with the refuser in it."""
    with engine.start() as started:
        asyncio.run(bring_model(SimpleNamespace(proxy=started.base_url)))  # type: ignore[arg-type]
        yield started


@pytest.fixture(scope="module", params=[pytest.param(one, id=one.id) for one in find_engines()])
def running(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    engine: Engine = request.param
    if engine.missing:
        pytest.skip(engine.missing)
    with served(engine) as started:
        yield started


@pytest.fixture(scope="module")
def embedded() -> Iterator[RunningEngine]:
    engine = next(one for one in find_engines() if one.embedded)
    with served(engine) as started:
        yield started


def test_a_served_model_is_asked_through_the_api_and_says_the_same(running: RunningEngine) -> None:
    told = figures(BASE, *PROMPTS, "--prompts", 6, "--served", "--against", BASE, "--host", running.base_url)
    assert told["via"] == "api"
    assert told["refusal_rate"] == 1.0
    assert told["false_refusal"] == 0.0
    assert told["harmless_exact"] == 1.0
    assert "kl_mean" not in told
    assert any("KL" in note for note in told["notes"])


def test_a_name_is_read_from_the_engines_own_file(embedded: RunningEngine) -> None:
    told = figures("ollama:refuser", *PROMPTS, "--prompts", 6, OLLAMA_HOST=embedded.base_url)
    assert told["via"] == "files"
    assert told["refusal_rate"] == 1.0


def test_a_judge_that_talks_nonsense_is_dismissed_and_said_to_be(embedded: RunningEngine) -> None:
    # The refuser knows nothing of judging: whatever it says is no verdict.
    more = ["--judge", "refuser", "--host", embedded.base_url]
    told = figures(SHIPPED.model, *PROMPTS, "--prompts", 10, *more)
    assert told["refusal_rate"] == 1.0
    assert any("the judge refuser said neither REFUSAL nor ANSWER" in note for note in told["notes"]), told["notes"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["./nothing.gguf"], 7, "no such file or folder"),
        (["refuser", "--host", "127.0.0.1:1"], 75, "no engine answers"),
        ([SHIPPED.model, "--judge", "x", "--host", "127.0.0.1:1"], 75, "does not answer"),
        ([SHIPPED.model, "--suite", "no-such"], 2, "there is no suite 'no-such'"),
        ([SHIPPED.model, "--prompts", "0"], 2, "count from 1"),
        ([SHIPPED.model, "--harmful", "/nothing.txt"], 2, "/nothing.txt"),
        ([SHIPPED.model, "--refusal-markers", "/nothing.txt"], 2, "/nothing.txt"),
        ([SHIPPED.harmful], 3, ""),
        ([SHIPPED.model, "--device", "toaster"], 2, "device"),
    ],
)
def test_a_wrong_word_is_one_clear_error(arguments: list[object], code: int, said: str) -> None:
    done = evaluate(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert "→" in done.stderr
    assert "Traceback" not in done.stderr
