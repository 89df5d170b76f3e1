"""A search's journal: what it kept is found again, and what a kill cut short is not."""

from __future__ import annotations

from pathlib import Path

from abliterated.pipeline.search_journal import Journal

ROWS = [(0.1, 0.25, 1e-7), (0.0, 1.0, 1 / 3)]


def test_what_was_kept_is_found_again_to_the_bit(tmp_path: Path) -> None:
    Journal(tmp_path / "trials.jsonl", "inputs").keep(["a", 16], ROWS)
    again = Journal(tmp_path / "trials.jsonl", "inputs")
    assert again.recall(["a", 16]) == ROWS
    assert again.recall(["a", 32]) is None


def test_a_line_cut_short_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, "inputs")
    journal.keep("first", ROWS)
    whole = path.read_bytes()
    journal.keep("second", ROWS)
    for cut in range(len(whole), path.stat().st_size):
        path.write_bytes(path.read_bytes()[:cut])
        again = Journal(path, "inputs")
        assert again.recall("first") == ROWS
        assert again.recall("second") is None
        assert path.read_bytes() == whole
        again.keep("second", ROWS)


def test_another_searchs_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    Journal(path, "before").keep("batch", ROWS)
    assert Journal(path, "now").recall("batch") is None
    assert path.read_bytes() == b""
