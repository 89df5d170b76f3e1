"""The queue's verbs on a real daemon: drain, resume, clean, a matrix, and the control API over TCP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest

from abliterate.contract.states import TERMINAL
from e2e.daemons import House, house
from engines import free_port
from strangers import within

pytestmark = pytest.mark.e2e
GOOD = b'model = "ollama:base"\n'


@pytest.fixture
def served() -> Iterator[House]:
    with house() as made:
        made.tcp = free_port()  # type: ignore[attr-defined]
        made.configure("ollama", control={"tcp": f"127.0.0.1:{made.tcp}"})  # type: ignore[attr-defined]
        made.serve()
        yield made


def test_a_matrix_becomes_its_jobs_and_dropping_it_twice_changes_nothing(served: House) -> None:
    recipe = b'model = "ollama:base"\n[matrix]\n"edit.strength" = [0.5, 1.0]\nmodel = ["ollama:base", "ollama:other"]\n'
    job_id = served.drop(recipe, "many")
    served.until(lambda: len(served.control.jobs()) == 4, "four jobs")
    jobs = served.control.jobs()
    assert jobs[0].id == job_id
    assert {job.target for job in jobs} == {
        f"{base}-abliterated:latest-strength-{strength}" for base in ("base", "other") for strength in ("0.5", "1.0")
    }
    path = served.incoming / f"{job_id}.many.toml"
    path.with_name(".x.tmp").write_bytes(recipe)
    path.with_name(".x.tmp").chmod(0o640)
    path.with_name(".x.tmp").rename(path)
    served.until(lambda: not path.exists(), "the second file")
    assert len(served.control.jobs()) == 4
    for job in jobs:
        assert (served.state / "jobs" / job.id / "recipe.toml").read_bytes() == recipe


def test_drained_it_starts_nothing_until_resumed_and_says_so_through_a_restart(served: House) -> None:
    assert "drained" in served.client("drain")
    job_id = served.drop(GOOD, "night")
    served.until(lambda: served.control.job(job_id).reason == "drain", "the reason")
    served.stop()
    served.serve()
    assert served.control.status().draining
    served.client("resume")
    served.until(lambda: served.control.job(job_id).reason == "ollama-down", "going on")


def test_clean_forgets_what_has_ended_and_leaves_the_rest(served: House) -> None:
    gone, kept = served.drop(GOOD, "gone"), served.drop(GOOD, "kept")
    served.until(lambda: len(served.control.jobs()) == 2, "both jobs")
    served.client("cancel", gone)
    served.until(lambda: served.control.job(gone).state in TERMINAL, "cancelled")
    assert not (served.state / "jobs" / gone / "work").exists()
    assert "forgot 0 jobs" in served.client("clean")
    assert "forgot 1 job," in served.client("clean", "--days", "0")
    assert [job.id for job in served.control.jobs()] == [kept]
    assert not (served.state / "jobs" / gone).exists()
    assert (served.state / "jobs" / kept / "recipe.toml").exists()


def test_over_tcp_the_token_is_the_way_in(served: House) -> None:
    port: int = served.tcp  # type: ignore[attr-defined]
    secret = (served.state / "control.token").read_text()

    def ask(**headers: str) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        link.request("GET", "/v1/openapi.json", headers=headers)
        answer = link.getresponse()
        body = answer.read()
        link.close()
        return answer.status, body

    assert ask()[0] == 401
    status, body = ask(Authorization=f"Bearer {secret}")
    assert status == 200
    assert "/v1/queue/drain" in json.loads(body)["paths"]


def test_a_second_daemon_is_gone_at_once_and_names_the_first(served: House) -> None:
    import subprocess
    import sys
    from pathlib import Path

    assert served.process is not None
    argv = [str(Path(sys.executable).parent / "abliterated"), "serve", "--config", str(served.config)]
    with within(5):  # the bar is 1 s, and `make nightly` holds it
        told = subprocess.run(argv, capture_output=True, text=True, timeout=500)
    assert told.returncode == 75
    assert f"pid {served.process.pid}" in told.stderr
