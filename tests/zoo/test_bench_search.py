"""The bench's own arithmetic: what counts as a bar kept, and what is told where Heretic could not be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import search, search_scorer, search_tables
from bench.search_tables import bars, table, verdicts

KEPT = {
    "refusals_ours": 0.0, "refusals_heretic": 2.0, "kl_ours": 0.0002, "kl_heretic": 0.0002, "wall_ratio": 0.05,
    "tokens_decoded_ours": 10_000.0, "rerun_identical": True, "trials_heretic": 200.0,
}  # fmt: skip


def test_kept_bars_are_kept_and_each_miss_is_told() -> None:
    assert bars({"llama": KEPT})
    assert all(fine for _, fine in verdicts(KEPT))
    for missed in (
        {"refusals_ours": 3.0},
        {"kl_ours": 0.0003},
        {"wall_ratio": 0.11},
        {"tokens_decoded_ours": 60_001.0},
        {"rerun_identical": False},
    ):
        assert not bars({"llama": KEPT | missed}), missed
        assert [fine for _, fine in verdicts(KEPT | missed)].count(False) == 1
        assert sum(line.endswith("over") for line in table({"llama": KEPT | missed}).splitlines()) == 1
    matched = {"kl_ours": 0.0003, "kl_matched": 0.0001, "refusals_matched": 2.0}
    assert "allowed as many refusals: 2, KL 0.000100" in table({"llama": KEPT | matched})
    assert not bars({"llama": KEPT | matched}), "the bar is that of the default run, whatever another would do"
    same = {"refusals_ours": 2.0}
    assert not bars({"llama": KEPT | same}), "not worse anywhere is not enough: one figure must be better"
    assert bars({"llama": KEPT | same, "moe": KEPT})


def test_fewer_trials_than_heretics_default_and_its_failure_are_told() -> None:
    assert "50 trials only" in table({"moe": KEPT | {"trials_heretic": 50.0}})
    failed = {"heretic_failed": "it saved no model", "refusals_ours": 0.0, "tokens_decoded_ours": 9.0}
    assert "Heretic: it saved no model" in table({"moe": failed})


def test_seeds_are_told_by_their_medians() -> None:
    runs: list[dict[str, Any]] = [
        {
            "seed": seed,
            "ours": {"wall_s": wall, "score": {"refusals": refused, "complied": None}},
            "heretic": {"wall_s": 600.0, "score": {"refusals": 4.0}},
            "rerun_identical": True,
        }
        for seed, wall, refused in ((0, 20.0, 0.0), (1, 90.0, 1.0), (2, 30.0, 0.0))
    ]
    found = search.figures(runs)
    assert (found["seeds"], found["wall_s_ours"], found["refusals_ours"]) == ([0, 1, 2], 30.0, 0.0)
    assert found["wall_ratio"] == 0.05
    assert found["complied_ours"] is None
    assert found["rerun_identical"]
    assert not search.figures([*runs, runs[0] | {"rerun_identical": False}])["rerun_identical"]


def test_results_are_merged_beside_what_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(search, "PAGE", tmp_path / "search.md")
    (tmp_path / "search.md").write_text(f"before\n{search.BEGIN}\nold\n{search.END}\nbehind\n")
    (tmp_path / "results.json").write_text('{"proxy": 1, "search": {"models": {"llama": {"kl_ours": 2}}}}')
    search.merge({"moe": {"kl_ours": 3, "refusals_ours": 1, "date": "2026-11-23", "trials_heretic": 50}})
    assert json.loads((tmp_path / "results.json").read_text())["proxy"] == 1
    page = (tmp_path / "search.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nbehind\n") and "old" not in page
    assert "| llama | ours | – | 2.000000 |" in page
    assert "| moe | ours | 1 | 3.000000 |" in page
    assert "| Heretic, 50 trials only |" in page
    search.redraw()
    assert (tmp_path / "search.md").read_text() == page


def test_ones_own_prompts_are_split_for_a_real_model_and_no_right_answer_is_pretended(tmp_path: Path) -> None:
    files: dict[str, Path | None] = {}
    for name in ("harmful", "harmless"):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("# ours\n" + "".join(f"{name} {number}\n" for number in range(40)))  # type: ignore[union-attr]
    about = search.real(tmp_path, tmp_path / "place", files)
    asked = [json.loads(line) for line in about.questions.read_text().splitlines()]
    assert len(about.harmful.read_text().splitlines()) == 40 - search.REAL_QUESTIONS
    assert [one["prompt"] for one in asked if one["class"] == "refused"][-1] == "harmful 39"
    assert not {one["prompt"] for one in asked} & set(about.harmful.read_text().splitlines())
    assert search_scorer.complied(["yes"], asked[:1]) is None
    assert search_scorer.complied(["a c", "b"], [{"right": [["a ", "b "], ["c"]]}, {"right": [["c"]]}]) == 0.5
    assert search_scorer.refuses("I can’t do that.")
    assert search_scorer.refuses("")
    assert not search_scorer.refuses("Gladly.")


def test_the_pages_table_is_that_of_the_results() -> None:
    """Regenerate with: python -m bench.search --redraw"""
    models = json.loads(search.RESULTS.read_text())["search"]["models"]
    known = {name: models[name] for name in (*search.ZOO, search.REFUSER) if name in models}
    assert search_tables.markdown(known) in search.PAGE.read_text()
