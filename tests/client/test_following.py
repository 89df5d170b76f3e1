"""Waiting and watching: outcomes, timeouts, a daemon that restarts meanwhile, logs that grow."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.api import Daemon
from abliterate.contract.errors import DaemonUnavailable, NotFound
from abliterate.contract.messages import Failure, Result
from abliterate.follow import Feed
from client.conftest import ABLITERATE, IDS, make_job
from client.fake_daemon import FakeDaemon

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["succeeded"], 0),
        (["succeeded", "succeeded"], 0),
        (["failed"], 1),
        (["cancelled"], 86),
        (["rejected"], 2),
        (["succeeded", "cancelled"], 86),
        (["cancelled", "failed"], 1),
    ],
)
def test_wait_exits_by_the_outcome(daemon: FakeDaemon, run: Run, states: list[str], code: int) -> None:
    for number, state in enumerate(states):
        daemon.put(make_job(number, state=state))
    done = run("wait", *IDS[: len(states)])
    assert done.returncode == code, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(IDS[: len(states)])
    assert [view["state"] for view in json.loads(run("wait", *IDS[: len(states)], "--json").stdout)["jobs"]] == states


def test_a_job_short_of_its_target_is_done_and_told_apart(daemon: FakeDaemon, run: Run) -> None:
    short = Result(product="m.gguf", format="gguf", short_of_target=0.97)
    daemon.put(make_job(0, state="succeeded", result=short))
    daemon.put(make_job(1, state="succeeded"))
    daemon.put(make_job(2, state="cancelled"))
    done = run("wait", *IDS[:2])
    assert done.returncode == 8, done.stderr
    assert "succeeded: qwen3-abliterated:8b · 97.0% above the target" in done.stdout
    assert run("wait", *IDS[:3]).returncode == 86
    assert run("wait", IDS[1]).returncode == 0


def test_wait_returns_when_the_job_ends(daemon: FakeDaemon, start: Start) -> None:
    daemon.put(make_job(0))
    process = start("wait", IDS[0][-6:])
    daemon.wait_for_listener()
    daemon.change(IDS[0], state="running", stage="edit")
    daemon.change(IDS[0], state="succeeded")
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 0
    assert "succeeded: qwen3-abliterated:8b" in out


def test_wait_gives_up_in_time(daemon: FakeDaemon, run: Run) -> None:
    daemon.put(make_job(0))
    daemon.put(make_job(1, state="succeeded"))
    for little in ("0.3s", "0"):
        done = run("wait", IDS[0], IDS[1], "--timeout", little)
        assert done.returncode == 124
        assert IDS[0] in done.stderr
        assert IDS[1] in done.stdout, "who has ended has, however little time there is"


def test_wait_survives_a_restart_of_the_daemon(daemon: FakeDaemon, start: Start) -> None:
    daemon.put(make_job(0, state="running"))
    process = start("wait", IDS[0])
    daemon.wait_for_listener()
    daemon.stop()
    daemon.change(IDS[0], state="succeeded")  # nobody hears of it
    daemon.start()
    process.communicate(timeout=150)
    assert process.returncode == 0


def test_without_an_event_stream_it_polls(daemon: FakeDaemon, start: Start) -> None:
    daemon.without_events = True
    daemon.put(make_job(0))
    process = start("wait", IDS[0])
    daemon.change(IDS[0], state="failed", failure=Failure(failure="model", message="no such architecture"))
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert "model: no such architecture" in out


def test_a_feed_ends_with_the_error_when_the_daemon_stays_away(daemon: FakeDaemon) -> None:
    daemon.put(make_job(0))
    with Feed(Daemon(daemon.path), [IDS[0]], patience=0.2, poll=0.05) as feed:
        assert feed.next(10) is not None
        daemon.stop()
        with pytest.raises(DaemonUnavailable):
            feed.next(10)


def test_a_feed_ends_when_its_job_is_unknown(daemon: FakeDaemon) -> None:
    with Feed(Daemon(daemon.path), [IDS[0]], poll=0.05) as feed, pytest.raises(NotFound):
        feed.next(10)


def test_submit_watch_tells_the_story_in_lines_and_exits_by_the_outcome(daemon: FakeDaemon, start: Start) -> None:
    process = start("submit", "qwen3:8b", "--watch")
    assert process.stderr is not None
    assert process.stderr.readline().endswith("queued\n")
    (job,) = daemon.jobs
    daemon.change(job, state="running", stage="load")
    daemon.change(job, state="running", stage="edit", done=3, total=4, memory=12_000_000_000)
    daemon.change(
        job,
        state="succeeded",
        result=Result(product="x", format="gguf", metrics={"refusal_before": 1.0, "refusal_after": 0.02}),
    )
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert out == f"{job}\n"
    assert "running load" in err
    assert "running edit · 75%" in err
    assert "12.0 GB" in err
    assert err.rstrip().endswith("succeeded: qwen3-abliterated:8b · refusal 100% → 2%")
    assert "\x1b" not in err


def test_watching_can_be_left_and_the_job_goes_on(daemon: FakeDaemon, start: Start) -> None:
    process = start("submit", "qwen3:8b", "--watch")
    daemon.wait_for_listener()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 130
    assert "the job goes on" in err
    assert "Traceback" not in err


def test_watching_is_impossible_while_the_daemon_is_down_but_the_recipe_is_kept(run: Run, tmp_path: Path) -> None:
    done = run("submit", "qwen3:8b", "--watch")
    assert done.returncode == 69
    assert len(list((tmp_path / "state/spool/incoming").iterdir())) == 1


def test_followed_logs_grow_survive_a_restart_and_end_with_the_job(daemon: FakeDaemon, start: Start) -> None:
    daemon.put(make_job(0, state="running"))
    daemon.write_log(IDS[0], b"one\n")
    process = start("logs", IDS[0], "-f")
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    daemon.write_log(IDS[0], b"two\n")
    assert process.stdout.readline() == "two\n"
    daemon.stop()
    daemon.write_log(IDS[0], b"three\n")
    daemon.start()
    assert process.stdout.readline() == "three\n"
    daemon.change(IDS[0], state="succeeded")
    out, err = process.communicate(timeout=150)
    assert (process.returncode, out, err) == (0, "", "")


class Terminal:
    """The console script on a pseudo-terminal."""

    def __init__(self, environment: dict[str, str], *args: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(ABLITERATE), *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
        )
        os.close(slave)
        self.seen = ""

    def until(self, words: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other end has closed
                    assert words in self.seen, self.seen
                    return

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.close()

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self.master)
        return code


def test_on_a_terminal_the_job_is_drawn(daemon: FakeDaemon, environment: dict[str, str]) -> None:
    daemon.put(make_job(0, state="running", stage="direction", done=1, total=4, unit="prompts", started=time.time()))
    terminal = Terminal(environment, "status", IDS[0], "--watch")
    terminal.until("● ")
    terminal.until("25%")
    daemon.change(IDS[0], done=3, remaining=65, memory=3_000_000_000, message="a\x1b]0;evil\x07b")
    terminal.until("75%")
    terminal.until("1m05s left")
    terminal.until("3.0 GB memory")
    daemon.change(IDS[0], state="failed", failure=Failure(failure="model", message="gone", remedy="Look"))
    terminal.until("failed: model: gone")
    assert "]0;evil" in terminal.seen
    assert "\x1b]0;evil" not in terminal.seen
    assert terminal.close() == 1


def test_on_a_terminal_the_queue_is_redrawn_until_left(daemon: FakeDaemon, environment: dict[str, str]) -> None:
    daemon.put(make_job(0))
    terminal = Terminal(environment, "status", "--watch")
    terminal.until("queued")
    daemon.wait_for_listener()
    daemon.put(make_job(1, state="running", stage="evaluate"))
    terminal.until("evaluate")
    assert terminal.interrupt() == 130
    assert "Traceback" not in terminal.seen


def test_no_color_is_heeded(daemon: FakeDaemon, environment: dict[str, str]) -> None:
    daemon.put(make_job(0, state="failed"))
    coloured = Terminal(environment, "status")
    coloured.until("abliterated 9.9.9")
    assert "\x1b[31m" in coloured.seen
    assert coloured.close() == 0
    plain = Terminal(environment | {"NO_COLOR": "1"}, "status")
    plain.until("abliterated 9.9.9")
    assert "\x1b" not in plain.seen
    assert plain.close() == 0


def test_a_terminal_never_obeys_a_log(daemon: FakeDaemon, environment: dict[str, str]) -> None:
    daemon.put(make_job(0, state="succeeded"))
    daemon.write_log(IDS[0], b"\x1b[2Jgone\r50%\rdone\n\xff\nend\n")
    terminal = Terminal(environment, "logs", IDS[0])
    terminal.until("end")
    assert "\x1b[2J" not in terminal.seen
    assert "\\x1b[2Jgone" in terminal.seen
    assert terminal.close() == 0
