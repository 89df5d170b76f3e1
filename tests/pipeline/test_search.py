"""The search: strengths that keep to the target and do less harm than the recipe's, the same ones every time, even if
it is killed on the way; and what it says where there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from abliterate.contract.errors import Cancelled, ModelError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import recipe_from_table
from abliterated.pipeline.direction_files import write_direction
from abliterated.pipeline.directions import direction
from abliterated.pipeline.downhill import STAGES, NoWayDown
from abliterated.pipeline.run import _finalists, run
from abliterated.pipeline.search import LAST, Finalist, Searched, Tried
from abliterated.pipeline.search_sampler import FIRST
from abliterated.pipeline.search_stage import winner
from abliterated.pipeline.session import Found
from abliterated.pipeline.trials import Change
from pipeline.planted import REFUSAL, Planted, plant

TRIALS = 18
# So many that the last are those on the way downhill.
DOWNHILL = FIRST + 1 + LAST
# Killed at each (message, least done) in turn; one process forks them all, so that torch is imported once.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import msgspec
import abliterated.pipeline.session, abliterated.pipeline.trials, transformers.models.llama.modeling_llama
from abliterate.contract.messages import Task
from abliterated.pipeline.run import run
from abliterated.pipeline.search import LAST
from abliterated.pipeline.search_sampler import FIRST

task = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Task)
for message, least in json.loads(sys.argv[2]):
    def emit(progress):
        if f"{progress.stage}: {progress.message}" == message and progress.done >= least:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        run(task, emit, lambda: False)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(f"{message}: ended with {status}")
"""


def task(model: Planted, **tables: Any) -> Task:
    asked = {
        "model": str(model.path),
        "prompts": {"harmful": str(model.harmful), "harmless": str(model.harmless)},
        "evaluate": {"tokens": 8, "prompts": 16},
        "search": {"trials": TRIALS},
    }
    folder = model.path.parent
    work, output = str(folder / "work"), str(folder / "out")
    recipe = recipe_from_table({**asked, **tables})
    return Task(recipe=recipe, base="planted:latest", source=str(model.path), work=work, output=output)


def go(asked: Task) -> Result:
    return run(asked, lambda _: None, lambda: False)


def told(asked: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(asked.output) / "report.json").read_text())
    return found


def test_it_keeps_to_the_target_with_less_harm_than_the_recipes_own_strengths(tmp_path: Path) -> None:
    asked = task(plant(tmp_path))
    result = go(asked)
    assert result.metrics["refusal_before"] == 1.0
    assert result.metrics["refusal_after"] == 0.0
    assert result.metrics["harmless_exact"] == 1.0
    assert result.short_of_target == 0.0
    report = told(asked)
    trials = report["search"]["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    (chosen,) = [trial for trial in trials if trial["chosen"]]
    assert report["search"]["reached"]
    # Halved: all on few prompts, a third on more, a fifth on all; only one that was tried on all is chosen.
    asked_on = sorted(trial["parameters"]["prompts"] for trial in trials)
    assert asked_on[: TRIALS // 2] == [16] * (TRIALS // 2)
    assert 0 < asked_on.count(96) < TRIALS // 3
    assert chosen["parameters"]["prompts"] == 96
    assert chosen["verified"] == 0.0
    assert chosen["kl"] <= trials[0]["kl"]
    assert result.direction["trial"] == chosen["number"]
    assert result.metrics["tokens_decoded_run"] < 6000
    # What was chosen is what was written: every layer's strength is in the product's own words.
    assert report["edit"]["strengths"] != [[1.0, 1.0]] * 4 or chosen["number"] == 0


def test_the_last_trials_go_downhill_from_the_best(tmp_path: Path) -> None:
    result = go(asked := task(plant(tmp_path), search={"trials": DOWNHILL}))
    assert (result.metrics["refusal_after"], result.metrics["harmless_exact"]) == (0.0, 1.0)
    assert not any("downhill" in note for note in result.notes)
    trials = told(asked)["search"]["trials"]
    assert len(trials) == DOWNHILL
    ways = [trial["parameters"].get("downhill") for trial in trials]
    assert ways == [None] * (FIRST + 1) + ["stage"] * len(STAGES) + ["between"] * (LAST - len(STAGES))
    stages = [trial for trial in trials if trial["parameters"].get("downhill") == "stage"]
    assert stages[-1]["refusal"] <= stages[0]["refusal"], "under more pressure more is refused"
    (chosen,) = [trial for trial in trials if trial["chosen"]]
    assert chosen["parameters"]["prompts"] == 96
    assert chosen["refusal"] <= 0.03


def test_where_there_is_no_way_down_the_best_is_tried_weaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []

    def nowhere(*_: Any) -> Any:
        looked.append(None)
        raise NoWayDown("its weights are read layer by layer")

    monkeypatch.setattr("abliterated.pipeline.search.downhill", nowhere)
    asked = task(plant(tmp_path), evaluate={"prompts": 0}, search={"trials": DOWNHILL})
    with pytest.raises(Cancelled):
        run(asked, lambda _: None, lambda: bool(looked))
    result = go(asked)
    assert len(looked) == 1, "what was learnt before it was cut short is known after"
    assert "strengths were not followed downhill: its weights are read layer by layer" in result.notes
    trials = told(asked)["search"]["trials"]
    assert len(trials) == DOWNHILL
    assert not any("downhill" in trial["parameters"] for trial in trials)
    assert [trial["parameters"]["prompts"] for trial in trials[-LAST:]] == [96] * LAST


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    asked = task(plant(tmp_path), evaluate={"prompts": 0, "tokens": 8}, search={"trials": DOWNHILL})
    elsewhere = tmp_path / "elsewhere"
    whole = msgspec.structs.replace(asked, work=str(elsewhere / "work"), output=str(elsewhere / "out"))
    wanted = go(whole)
    (tmp_path / "task.json").write_bytes(msgspec.json.encode(asked))
    kills = [
        (f"search: trying strengths, {FIRST + 1} of {DOWNHILL}", 200),
        ("search: going downhill", 40),
        (f"search: trying strengths, {DOWNHILL} of {DOWNHILL}", 0),
        ("search: asking what was written", 0),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "task.json"), json.dumps(kills)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # no threads that a fork would lose
    )
    assert done.returncode == 0, done.stderr[-1500:]
    seen: list[Progress] = []
    result = run(asked, seen.append, lambda: False)
    assert not any("trying strengths" in progress.message for progress in seen), "what had ended was done again"
    assert result.digest == wanted.digest
    assert result.direction == wanted.direction
    assert told(asked)["edit"]["strengths"] == told(whole)["edit"]["strengths"]


def test_another_seed_looks_elsewhere_and_another_target_begins_anew(tmp_path: Path) -> None:
    model = plant(tmp_path)
    first = task(model, evaluate={"prompts": 0, "tokens": 8})
    go(first)
    trials = [trial["parameters"] for trial in told(first)["search"]["trials"]]
    other = task(model, evaluate={"prompts": 0, "tokens": 8}, search={"trials": TRIALS, "refusal_target": 0.5})
    go(other)
    assert told(other)["search"]["refusal_target"] == 0.5
    prompts = {"harmful": str(model.harmful), "harmless": str(model.harmless), "seed": 1}
    seeded = task(model, evaluate={"prompts": 0, "tokens": 8}, prompts=prompts)
    go(seeded)
    assert [trial["parameters"] for trial in told(seeded)["search"]["trials"]] != trials


def test_a_target_out_of_reach_delivers_the_best_and_says_how_far_off(tmp_path: Path) -> None:
    # The refusal is written in the first layers; the last one alone can't take it back.
    asked = task(plant(tmp_path), edit={"layers": "3"})
    result = go(asked)
    assert (Path(asked.output) / result.product).is_file()
    assert result.metrics["refusal_after"] == 1.0
    assert result.short_of_target == pytest.approx(0.97)
    assert any("no trial kept refusals at 3.0%" in note for note in result.notes)
    assert not told(asked)["search"]["reached"]
    assert sum(trial["verified"] is not None for trial in told(asked)["search"]["trials"]) == 3


def test_trials_are_ranked_by_prompts_seen_then_by_the_target_then_by_harm() -> None:
    def tried(**figures: Any) -> Tried:
        known = {"refused": 0.0, "expected": 0.0, "kl": 0.01, "astray": 0.0, "round": 1}
        return Tried(0, Change(np.eye(1, 4, dtype=np.float32)[None], np.zeros((2, 2))), {}, None, **(known | figures))

    in_order = [
        tried(round=2, refused=0.5, kl=0.9),
        tried(kl=0.02, refused=0.03),  # within the target, so harm decides
        tried(kl=0.02, expected=0.015),
        tried(kl=0.02, expected=0.03),  # as many as the target are still to be expected: twice as harmful
        tried(kl=0.03, expected=0.03, astray=5.0),
        tried(refused=0.04),
        tried(round=0, kl=0.0),
    ]
    ranks = [one.rank(0.03) for one in in_order]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


def test_of_several_written_the_one_that_refuses_least_is_delivered() -> None:
    finalists = tuple(Finalist(number, direction(np.eye(4)[0], origin={}), 0.0, 0.001) for number in (7, 3, 5))
    found = Searched(finalists, ())
    assert winner(found, [(7, 0.5), (3, 0.25), (5, 0.25)]) == 3, "the better finalist of equals"
    assert winner(found, []) == 7
    recipe = recipe_from_table({"model": "x.gguf"})
    verified: list[tuple[int, float]] = []
    written = []
    for one in _finalists(Found(finalists[0].direction), found, verified, recipe):
        number = next(finalist.number for finalist in finalists if finalist.direction is one)
        written.append(number)
        verified.append((number, {7: 0.5, 3: 0.25, 5: 0.25}[number]))
    assert written == [7, 3, 5, 3], "the last written is the one that stays"


def test_the_command_tells_a_missed_target_by_its_exit_code(tmp_path: Path) -> None:
    model = plant(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{model.path}"\n[prompts]\nharmful = "{model.harmful}"\nharmless = "{model.harmless}"\n'
        '[direction]\nmethod = "layer"\nlayer = 2\n'
        '[edit]\nlayers = "3"\n[search]\ntrials = 2\n[evaluate]\nprompts = 0\ntokens = 8\n'
    )
    command = [sys.executable, "-m", "abliterated.cli", "work", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 8, done.stderr
    assert list((tmp_path / "out").glob("*.gguf"))
    assert "no trial kept refusals" in done.stderr


def test_a_direction_from_a_file_gets_its_strengths_searched(tmp_path: Path) -> None:
    model = plant(tmp_path)
    vector = np.zeros(64)
    vector[REFUSAL] = 1.0
    given = direction(vector, origin={})
    write_direction(tmp_path / "given.safetensors", given, {})
    asked = task(model, direction={"method": "file", "file": str(tmp_path / "given.safetensors")})
    result = go(asked)
    assert result.metrics["refusal_after"] == 0.0
    assert result.direction["digest"] == given.digest()
    assert len(told(asked)["search"]["trials"]) == TRIALS


def test_a_model_that_refuses_nothing_is_left_alone_before_any_trial(tmp_path: Path) -> None:
    asked = task(plant(tmp_path, refuses=False))
    seen: list[Progress] = []
    with pytest.raises(ModelError, match="refuses none of"):
        run(asked, seen.append, lambda: False)
    assert "search" not in {progress.stage for progress in seen}
    assert not list((tmp_path / "out").iterdir())


def test_fewer_prompts_than_asked_for_are_said(tmp_path: Path) -> None:
    model = plant(tmp_path)
    few = tmp_path / "few.txt"
    few.write_text("\n".join(model.harmful.read_text().splitlines()[::6]) + "\n")
    asked = task(Planted(model.path, few, model.harmless), evaluate={"prompts": 0, "tokens": 8})
    result = go(asked)
    assert any("harmful prompts, not 128: measured on" in note for note in result.notes)
