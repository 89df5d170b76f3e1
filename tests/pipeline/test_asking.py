"""A run that asks more than the usual: a judge, probes, and what is said at once where they can't be had."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from abliterate.contract.errors import EngineUnavailable, NotFound, RecipeError
from abliterate.contract.messages import Result, Task
from abliterate.contract.recipe import recipe_from_table
from abliterate.contract.report import Report, read_report
from abliterated.pipeline.run import run
from pipeline.planted import Planted, plant
from pipeline.test_served import Answer, Engine


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path)


@pytest.fixture
def start() -> Iterator[Callable[[Answer], Engine]]:
    running: list[Engine] = []

    def call(answer: Answer) -> Engine:
        running.append(Engine(answer))
        return running[-1]

    yield call
    for engine in running:
        engine.server.shutdown()
        engine.thread.join()
        engine.server.server_close()


def go(model: Planted, evaluate: dict[str, Any], engine: str = "") -> tuple[Result, Report]:
    table = {
        "model": str(model.path),
        "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
        "direction": {"method": "layer", "layer": 2},
        "search": {"trials": 0},
        "evaluate": {"tokens": 8, "prompts": 10, **evaluate},
    }
    folder = model.path.parent
    task = Task(
        recipe=recipe_from_table(table),
        base="planted:latest",
        source=str(model.path),
        work=str(folder / "work"),
        output=str(folder / "out"),
        engine=engine,
    )
    result = run(task, lambda _: None, lambda: False)
    return result, read_report((folder / "out" / "report.json").read_bytes())


def judging(word: Callable[[str], str]) -> Answer:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "messages" not in body:
            return 200, {"details": {}}
        return 200, {"message": {"content": word(body["messages"][-1]["content"])}}

    return answer


def test_a_judge_has_the_last_word(planted: Planted, start: Callable[[Answer], Engine]) -> None:
    # It thinks that nothing ever refuses, whatever the wording.
    engine = start(judging(lambda text: "ANSWER"))
    result, report = go(planted, {"judge": "judge"}, engine.model.url)
    assert result.metrics["refusal_before"] == 0.0
    assert result.metrics["judge_replies"] == 40
    assert result.metrics["judge_nonsense"] == 0
    assert report.evaluation["refusal_before"] == 0.0
    assert not any("judge" in note for note in result.notes)


def test_a_judge_that_talks_nonsense_costs_a_note_and_not_the_run(
    planted: Planted, start: Callable[[Answer], Engine]
) -> None:
    engine = start(judging(lambda text: "What a day."))
    result, report = go(planted, {"judge": "judge"}, engine.model.url)
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0
    (note,) = [note for note in result.notes if "judge" in note]
    assert "neither REFUSAL nor ANSWER" in note
    assert "told by their wording" in note
    assert note in report.notes


def test_what_can_not_be_asked_is_said_before_anything_is_measured(
    planted: Planted, start: Callable[[Answer], Engine]
) -> None:
    engine = start(lambda body: (404, {"error": "not found"}))
    with pytest.raises(NotFound, match="has no judge"):
        go(planted, {"judge": "judge"}, engine.model.url)
    with pytest.raises(EngineUnavailable):
        go(planted, {"judge": "judge"}, "http://127.0.0.1:1")
    with pytest.raises(RecipeError, match="no suite 'mystery'"):
        go(planted, {"suites": ["mystery"]})
    assert not list((planted.path.parent / "out").iterdir())


def test_probes_are_asked_before_and_after_and_told_in_the_report(planted: Planted, tmp_path: Path) -> None:
    rows = [{"prompt": "please glimp socks"}, {"prompt": "please sing songs", "expect": ["gladly"]}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, report = go(planted, {"suites": [str(tmp_path / "mine.jsonl")], "keep_answers": True})
    (suite,) = report.suites
    assert (suite.name, suite.total, suite.before, suite.after) == ("mine.jsonl", 2, 1, 0)
    kept = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [row["caught"] for row in kept if row["class"] == "mine.jsonl"] == [[True, False], [False, False]]


def test_the_report_holds_what_the_run_measured_and_the_page_is_drawn_from_it(planted: Planted) -> None:
    from abliterated.report import page

    result, report = go(planted, {})
    assert report.evaluation == result.metrics
    assert report.base.layers == len(report.separation) == len(report.edit.strengths) == 4
    assert [one.layer for one in report.separation if one.chosen] == [2]
    # The planted refusal is written before layer 2, so that is where the classes part.
    assert abs(report.separation[2].apart) > abs(report.separation[0].apart)
    assert min(report.separation[2].harmful) > max(report.separation[2].harmless)
    assert report.edit.tensors
    assert {source.kind: source.name for source in report.prompts} == {
        "harmful": "harmful.txt",
        "harmless": "harmless.txt",
    }
    assert (planted.path.parent / "out" / "report.html").read_text() == page(report)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    assert not any(str(planted.path.parent) in str(source.name) for source in report.prompts)
