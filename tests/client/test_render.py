"""Text for people: nothing a terminal obeys, columns that fit, times and sizes as people say them."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.messages import Failure, JobView, Result
from abliterate.contract.states import STATES
from abliterate.live import Pace, closing_line, plain_line
from abliterate.render import (
    cell_width,
    clean,
    colours,
    duration,
    fit,
    job_details,
    job_table,
    json_text,
    percent,
    short_ids,
    size,
)
from client.conftest import IDS, make_job

WORDS = st.text(max_size=40)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JOBS = st.builds(
    make_job,
    st.integers(0, 2),
    label=WORDS,
    model=WORDS,
    target=WORDS,
    state=st.sampled_from(STATES),
    explanation=WORDS,
    stage=WORDS,
    message=WORDS,
    unit=WORDS,
    done=NUMBERS,
    total=NUMBERS,
    remaining=st.none() | NUMBERS,
    memory=st.integers(0, 2**62),
    submitted=NUMBERS,
    started=st.none() | NUMBERS,
    ended=st.none() | NUMBERS,
    failure=st.none() | st.builds(Failure, failure=st.just("disk"), message=WORDS, remedy=WORDS),
    result=st.none()
    | st.builds(
        Result,
        product=WORDS,
        format=WORDS,
        metrics=st.dictionaries(WORDS, NUMBERS, max_size=2),
        seconds=st.dictionaries(WORDS, NUMBERS, max_size=2),
        notes=st.lists(WORDS, max_size=2),
    ),
)


@given(st.text(), st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), min_size=1))
def test_cleaned_text_has_nothing_to_obey(text: str, bad: str) -> None:
    assert clean(text + bad + text).isprintable()
    assert clean("plain – ✓") == "plain – ✓"


@settings(max_examples=60, deadline=None)
@given(st.lists(JOBS, max_size=3), st.integers(0, 200), st.booleans())
def test_any_job_is_drawn_on_lines_of_its_own(jobs: list[JobView], width: int, colour: bool) -> None:
    table = job_table(jobs, now=1e9, width=width, colour=False)
    assert len(table.split("\n")) == len(jobs) + 1
    assert table.replace("\n", "").isprintable()
    assert len(job_table(jobs, now=1e9, colour=colour).split("\n")) == len(jobs) + 1
    for job in jobs:
        for text in (plain_line(job), closing_line(job)):
            assert text.isprintable()
        assert job_details(job, now=1e9).replace("\n", "").isprintable()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_is_the_same_value_and_harmless(text: str) -> None:
    out = json_text({"a": text})
    assert json.loads(out) == {"a": text}
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (-1, ""),
        (float("nan"), ""),
        (0, "0s"),
        (59.9, "59s"),
        (200, "3m20s"),
        (7500, "2h05m"),
        (3e5, "3d11h"),
    ],
)
def test_times(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (150e6, "150 MB"), (12e9, "12.0 GB"), (5e12, "5.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_short_ids_grow_until_they_differ() -> None:
    assert short_ids(IDS) == {one: one[-6:] for one in IDS}
    twins = ["01aaaaaaaaaaaaaaaaaa1zzzzzzz", "01aaaaaaaaaaaaaaaaaa2zzzzzzz"]
    assert set(short_ids(twins).values()) == {"1zzzzzzz", "2zzzzzzz"}


def test_a_narrow_terminal_takes_from_the_long_columns() -> None:
    rows = job_table([make_job(reason="window", explanation="x" * 200, label="y" * 50)], now=1.0, width=100)
    assert all(len(row) <= 100 for row in rows.split("\n"))
    assert "queued" in rows
    assert fit([6, 50, 40, 6, 60, 4, 4, 4], 0) == [6, 50, 40, 6, 60, 4, 4, 4]


def test_in_a_narrow_terminal_what_is_made_is_told_and_not_of_what() -> None:
    job = make_job(model="ollama:qwen3:8b", target="qwen3-abliterated:8b", reason="window", explanation="x" * 60)
    wide = job_table([job], now=1.0, width=200)
    assert "MODEL → TARGET" in wide and "ollama:qwen3:8b → qwen3-abliterated:8b" in wide
    head, row = job_table([job], now=1.0, width=100).split("\n")
    assert head.split()[2] == "TARGET" and "qwen3-abliterated:8b" in row and "→" not in row


def test_in_a_narrow_terminal_the_reason_keeps_its_share() -> None:
    job = make_job(reason="window", explanation="waits until 01:00", model="ollama:llama3.3:70b-instruct-q4_K_M")
    assert "window: waits until 01:00" in job_table([job], now=1.0, width=100)


@pytest.mark.parametrize("width", [52, 60, 66, 72, 80])
def test_in_a_terminal_of_few_columns_no_row_is_broken_and_the_state_stays(width: int) -> None:
    words = {"label": "a-recipe-of-mine.gguf", "submitted": 1.0}
    runs = make_job(0, state="registering", stage="register", done=1.0, total=1.0, remaining=3e5, **words)
    waits = make_job(1, reason="window", explanation="waits until 01:00", **words)
    for jobs in ([waits], [runs, waits]):
        for colour in (False, True):
            table = job_table(jobs, now=9e6, width=width, colour=colour)
            assert all(cell_width(re.sub(r"\x1b\[\d+m", "", row)) <= width for row in table.split("\n"))
            assert "qwen3-ablit" in table and "queued" in table and "window: wai" in table
    assert "104d" in job_table([waits], now=9e6, width=60)  # what is empty goes before what tells something


def test_percent_only_where_something_runs() -> None:
    assert percent(make_job(state="running", done=1, total=3)) == "33%"
    assert percent(make_job(state="running", done=1, total=0)) == ""
    assert percent(make_job(state="queued", done=1, total=3)) == ""


def test_colour_is_for_terminals_that_want_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert colours(Terminal(), {"TERM": "xterm"})
    assert not colours(Terminal(), {"TERM": "dumb"})
    assert not colours(Terminal(), {"TERM": "xterm", "NO_COLOR": "1"})
    assert not colours(io.StringIO(), {"TERM": "xterm"})


def test_the_pace_of_a_stage_forgets_the_stage_before() -> None:
    pace = Pace()
    for at in range(5):
        pace.add(make_job(stage="load", done=at * 1e9), float(at))
    assert pace.text("B") == "1.0 GB/s"
    pace.add(make_job(stage="search", done=0), 5.0)
    assert pace.text("trials") == ""
    pace.add(make_job(stage="search", done=3), 7.0)
    assert pace.text("trials") == "1.5 trials/s"
