"""`abliterate report`: the summary, the page and the JSON of a job, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from abliterate.contract.messages import Result
from abliterate.contract.report import BaseModel, Product, Report
from abliterate.report_text import report_text
from client.conftest import IDS, make_job
from client.fake_daemon import FakeDaemon
from client.test_verbs import Run
from report.samples import least, rich

MADE = Result(product="brook.gguf", format="gguf")
JSON = msgspec.json.encode(rich())
PAGE = b"<!doctype html>\n<html></html>\n"


@pytest.fixture(autouse=True)
def reported(daemon: FakeDaemon) -> None:
    daemon.put(make_job(0, state="succeeded"))
    daemon.put(make_job(1, state="queued"))
    daemon.reports[IDS[0]] = {"json": JSON, "html": PAGE}


def test_the_summary_says_what_one_wants_to_know(run: Run) -> None:
    done = run("report", IDS[0][-4:])
    assert done.returncode == 0, done.stderr
    for words in (
        "ollama:brook:8b → brook-abliterated:8b",
        "97.0% (92%-99%)",
        "1.0% (0%-5%)",
        "0.0042 nats a token",
        "81.0%",
        "61 trials, number 60 chosen",
        "auto, layer 17.0, position -2",
        "7m14s",
        "17.2 GB",
        "note: the search stopped",
    ):
        assert words in done.stdout, words


def test_a_model_s_name_means_the_job_that_made_it(run: Run, daemon: FakeDaemon) -> None:
    daemon.put(make_job(0, state="succeeded", target="brook-abliterated:latest", ended=5.0, result=MADE))
    assert json.loads(run("report", "brook-abliterated", "--json").stdout) == json.loads(JSON)
    missing = run("report", "nobody-abliterated")
    assert (missing.returncode, missing.stdout) == (7, "")
    assert "abliterate status" in missing.stderr


def test_json_and_page_come_as_they_are(run: Run) -> None:
    assert json.loads(run("report", IDS[0], "--json").stdout) == json.loads(JSON)
    assert run("report", IDS[0], "--html").stdout.encode() == PAGE


def test_open_keeps_the_page_where_a_browser_may_read_it(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    browser.chmod(0o755)
    done = run("report", IDS[0], "--open", env=environment | {"BROWSER": f"{browser} %s"})
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == PAGE
    assert opened.read_text() == path.as_uri()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [([IDS[1]], 7, "has no report: it is queued"), (["zzzz"], 7, "no job zzzz"), ([IDS[0], "--json", "--html"], 2, "")],
)
def test_what_can_not_be_shown_is_said(args: list[str], code: int, said: str, run: Run) -> None:
    done = run("report", *args)
    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr
    assert "→" in done.stderr


def test_a_report_of_another_version_is_named(run: Run, daemon: FakeDaemon) -> None:
    daemon.reports[IDS[0]]["json"] = b'{"version": 99}'
    done = run("report", IDS[0])
    assert done.returncode == 3
    assert "version 99" in done.stderr
    assert json.loads(run("report", IDS[0], "--json").stdout) == {"version": 99}


def test_names_in_it_can_not_drive_the_terminal(run: Run, daemon: FakeDaemon) -> None:
    evil = "a\x1b[2Jb\u202ec\nd"
    report = Report(base=BaseModel(name=evil), product=Product(name=evil, format=evil), notes=[evil])
    daemon.reports[IDS[0]]["json"] = msgspec.json.encode(report)
    done = run("report", IDS[0])
    assert done.returncode == 0
    assert not set("\x1b\u202e") & set(done.stdout)


def test_the_least_report_has_a_summary() -> None:
    assert report_text(least()) == "base → direction.safetensors"
