"""The daemon as a person has it: recipes in, models out, and what happens when things go wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import ollama
import pytest

from abliterated import refuser
from e2e.daemons import BIN, House, house
from strangers import within

pytestmark = pytest.mark.e2e


def recipe(model: str, name: str) -> bytes:
    data = refuser.files()
    return (
        f'model = "{model}"\nname = "{name}"\n'
        f'[prompts]\nharmful = "{data.harmful}"\nharmless = "{data.harmless}"\ncount = 48\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 8\ntokens = 48\n"
    ).encode()


def digests(house: House) -> dict[str, str]:
    """The engine's models, as a client sees them through the proxy: digest by name."""
    with ollama.Client(host=house.url) as client:
        return {str(model.model): str(model.digest) for model in client.list().models}


@pytest.fixture(scope="module")
def served() -> Iterator[House]:
    with house() as made:
        made.configure("embedded")
        made.serve()
        made.until(made.engine_answers, "the engine")
        with ollama.Client(host=made.url) as client:
            digest = client.create_blob(refuser.files().model)
            client.create(model="refuser", files={"refuser.gguf": digest}, template=refuser.template_go())
        yield made


def test_two_recipes_run_one_after_the_other_and_a_malformed_one_stops_neither(served: House) -> None:
    first = served.drop(recipe("ollama:refuser", "one-abliterated"), "one")
    served.drop(b'model = "ollama:refuser"\n[edit]\nstrenght = 2\n', "broken")
    second = served.drop(recipe("ollama:refuser", "two-abliterated"), "two")
    one, two = served.ended(first), served.ended(second)
    assert (one.state, two.state) == ("succeeded", "succeeded"), (one.failure, two.failure)
    assert one.ended is not None
    assert two.started is not None
    assert one.started is not None
    rejected = served.state / "spool" / "rejected"
    served.until(lambda: any(rejected.glob("*broken.reason.txt")), "the rejection")
    reason = next(rejected.glob("*broken.reason.txt")).read_text()
    assert "line 3" in reason
    assert "strength" in reason
    names = set(digests(served))
    assert {"refuser:latest", "one-abliterated:latest", "two-abliterated:latest"} <= names
    # Same recipe but for the name, same seed: the same bytes.
    assert one.result is not None
    assert two.result is not None
    assert one.result.content == two.result.content


def test_the_client_submits_waits_and_shows_the_log(served: House, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(recipe("ollama:refuser", "three-abliterated"))
    job_id = served.client("submit", str(path)).strip()
    served.client("wait", job_id)
    jobs = json.loads(served.client("status", "--json"))["jobs"]
    mine = next(job for job in jobs if job["id"] == job_id)
    assert (mine["state"], mine["target"]) == ("succeeded", "three-abliterated:latest")
    assert job_id in served.client("logs", job_id)
    assert "three" in served.client("status")


def test_a_base_the_engine_does_not_have_fails_with_the_remedy(served: House) -> None:
    job = served.ended(served.drop(recipe("ollama:nothing-here", "four-abliterated"), "missing"))
    assert job.state == "failed"
    assert job.failure is not None
    assert "nothing-here" in job.failure.message
    assert job.failure.remedy


def test_a_name_that_is_taken_by_somebody_elses_model_is_not_overwritten(served: House) -> None:
    with ollama.Client(host=served.url) as client:
        client.copy("refuser", "theirs-abliterated")
    before = digests(served)["theirs-abliterated:latest"]
    job = served.ended(served.drop(recipe("ollama:refuser", "theirs-abliterated"), "taken"))
    assert job.state == "failed"
    assert job.failure is not None
    assert "replace" in job.failure.remedy
    assert digests(served)["theirs-abliterated:latest"] == before


def test_a_path_outside_the_roots_is_rejected(served: House) -> None:
    served.drop(b'model = "/etc/passwd"\n', "nosy")
    rejected = served.state / "spool" / "rejected"
    served.until(lambda: any(rejected.glob("*nosy.reason.txt")), "the rejection")
    assert "[paths] models" in next(rejected.glob("*nosy.reason.txt")).read_text()


def test_a_second_daemon_on_the_same_home_leaves_at_once_and_names_the_first(served: House) -> None:
    assert served.process is not None
    argv = [str(BIN / "abliterated"), "serve", "--config", str(served.config)]
    with within(20):
        told = subprocess.run(argv, capture_output=True, text=True, timeout=500)
    assert told.returncode == 75
    assert str(served.process.pid) in told.stderr
    assert served.control.status().pid == served.process.pid


def test_after_kill_9_the_engine_is_gone_and_serve_answers_again_within_ten_seconds(served: House) -> None:
    served.stop(signal.SIGKILL)

    def answers() -> bool:
        with urllib.request.urlopen(f"{served.url}/api/tags", timeout=60) as answer:
            return b"refuser:latest" in answer.read()

    with within(10):
        served.serve()
        served.until(answers, "the engine behind the proxy")
    jobs = {job.label: job.state for job in served.control.jobs()}
    assert jobs["one"] == "succeeded", "the journal is still there"


def test_a_running_job_can_be_cancelled(served: House) -> None:
    (served.state / "locks").mkdir(exist_ok=True)
    from abliterated.jobs.gpu import device_lock, lock_file

    path = lock_file(served.state / "locks", "auto")
    with device_lock(path, waiting=lambda who: None, cancelled=lambda: False, job="test"):
        job_id = served.drop(recipe("ollama:refuser", "five-abliterated"), "five")
        served.until(lambda: served.control.job(job_id).state == "running", "the job to run")
        served.client("cancel", job_id)
        assert served.ended(job_id).state == "cancelled"
    served.client("wait", job_id, code=86)


def test_submitting_works_while_the_daemon_is_down(tmp_path: Path) -> None:
    with house() as made:
        made.configure("ollama")
        path = tmp_path / "r.toml"
        path.write_bytes(recipe("ollama:refuser", "x-abliterated"))
        job_id = made.client("submit", str(path)).strip()
        assert [entry.name for entry in made.incoming.iterdir()] == [f"{job_id}.r.toml"]
        made.client("status", code=69)
        made.serve()
        made.until(lambda: made.control.job(job_id).state == "queued", "the job to be taken")
        made.until(lambda: made.control.job(job_id).reason == "ollama-down", "the reason")
        made.until(lambda: not any(made.incoming.iterdir()), "the file to go")


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with house() as made, socket.create_server(("127.0.0.1", made.proxy)):
        made.configure("ollama")
        told = subprocess.run(
            [str(BIN / "abliterated"), "serve", "--config", str(made.config)],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert told.returncode == 75
        assert str(made.proxy) in told.stderr
        assert "→" in told.stderr


def test_an_engine_port_that_somebody_else_holds_is_said_and_ends_the_daemon() -> None:
    with house() as made, socket.create_server(("127.0.0.1", made.upstream)):
        made.configure("embedded")
        told = subprocess.run(
            [str(BIN / "abliterated"), "serve", "--config", str(made.config)],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert told.returncode == 75
        assert f"{made.upstream}: taken" in told.stderr


def test_a_wrong_configuration_names_line_and_key(tmp_path: Path) -> None:
    with house() as made:
        made.config.write_text("[proxy]\nlisten = 3\nupstrem = 'x'\n")
        told = subprocess.run(
            [str(BIN / "abliterated"), "serve", "--config", str(made.config)],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert told.returncode == 2
        assert "line 2" in told.stderr
        assert "line 3" in told.stderr
        assert "upstream" in told.stderr


def test_a_stopped_daemon_leaves_nothing_running(tmp_path: Path) -> None:
    with house() as made:
        made.configure("embedded")
        made.serve()
        made.until(made.engine_answers, "the engine")
        assert made.stop() == 0
        with pytest.raises(ConnectionRefusedError):
            made.engine_answers()
        assert not (made.state / "control.sock").exists()
        assert (made.state / "journal.sqlite3").exists()


def asked(house: House, request: str) -> tuple[int, dict[str, object]]:
    """One raw request to the control socket; status and JSON."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(60)
        line.connect(str(house.state / "control.sock"))
        line.sendall(request.encode())
        answer = b""
        while piece := line.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("line", "body", "status"),
    [
        ("GET /v1/nothing", "", 404),
        ("GET /v1/jobs/zzzz", "", 404),
        ("GET /v1/jobs/..%2f..%2fetc", "", 404),
        ("DELETE /v1/jobs", "", 405),
        ("POST /v1/jobs", "not json", 400),
        ("POST /v1/jobs", '{"recipe": 7}', 400),
        ("POST /v1/jobs", '{"recipe": "model = 7"}', 400),
        ("POST /v1/jobs", '{"recipe": "model = \\"ollama:m\\"", "id": "../x"}', 400),
        ("POST /v1/jobs/zzzz/cancel", "", 404),
        ("POST /v1/queue/explode", "", 404),
    ],
)
def test_a_wrong_request_gets_a_clear_answer(served: House, line: str, body: str, status: int) -> None:
    request = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    code, answer = asked(served, request)
    assert code == status
    assert answer["error"]


def test_metrics_are_on_the_control_socket_and_not_on_ollamas_port(served: House) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(served.state / "control.sock"))
        line.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        page = b""
        while piece := line.recv(65536):
            page += piece
    assert b'abliterated_jobs{state="succeeded"}' in page
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(f"{served.url}/metrics", timeout=60):
        pass
    with caught.value as answer:
        assert answer.code == 404
