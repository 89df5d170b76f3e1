"""How an engine begins and ends, and what survives: processes killed for real."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import ollama
import psutil
import pytest

from abliterated import cli
from abliterated.engine.pool import Pool
from abliterated.shapes.refusals import Refused
from engine.conftest import LONG
from engine.running import Engine, engine, until, whole_answer
from strangers import gone, within

HI = [{"role": "user", "content": "hi"}]

PARENT = """
import os, subprocess, sys, time
read, write = os.pipe()
arguments = [sys.executable, "-m", "abliterated.engine", "--listen", "127.0.0.1:0", "--models", sys.argv[1]]
child = subprocess.Popen(arguments + ["--parent-fd", str(read)], pass_fds=[read], stderr=subprocess.PIPE, text=True)
print(child.pid, child.stderr.readline(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def running(tmp_path: Path, ggufs: dict[str, Path]) -> Engine:  # type: ignore[misc]
    with engine(tmp_path / "models") as started:
        started.create("plain", ggufs["plain"])
        started.create("endless", ggufs["endless"])
        yield started


def test_an_engine_and_its_runners_die_with_their_parent(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    models = tmp_path / "models"
    with engine(models) as first:
        first.create("plain", ggufs["plain"])
    with subprocess.Popen([sys.executable, "-c", PARENT, str(models)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        pid = int(line.split()[0])
        url = re.search(r"http://\S+", line)
        assert url
        assert httpx.post(f"{url[0]}/api/generate", json={"model": "plain"}, timeout=60).status_code == 200
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout
        [runner] = [int(number) for number in listed.split()]
        parent.kill()
        until(lambda: gone(pid) and gone(runner))


def test_the_pipe_alone_is_enough(tmp_path: Path) -> None:
    """As where there is no PDEATHSIG: the parent lives, its end of the pipe is closed."""
    read, write = os.pipe()
    arguments = ["--listen", "127.0.0.1:0", "--models", str(tmp_path), "--parent-fd", str(read)]
    with subprocess.Popen(
        [sys.executable, "-m", "abliterated.engine", *arguments], pass_fds=[read], stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(read)
        assert process.stderr is not None and "listening" in process.stderr.readline()
        os.close(write)
        assert process.wait(60) == 0


def test_a_taken_port_is_one_clear_line_and_75(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        arguments = ["--listen", f"127.0.0.1:{port}", "--models", str(tmp_path)]
        ended = subprocess.run(
            [sys.executable, "-m", "abliterated.engine", *arguments], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 75
    assert ended.stderr == f"127.0.0.1:{port} is taken by another process. Stop it, or listen on another port\n"


def test_the_verb_says_a_mistake_as_every_other_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine", "--listen", "nowhere", "--models", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("abliterated: ") and said[1].startswith("  → ") and len(said) == 2


async def test_an_installation_without_llama_cpp_says_what_brings_it(
    tmp_path: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pool = Pool()
    try:
        with pytest.raises(Refused, match=r"llama\.cpp is not installed here") as caught:
            await pool.probe(next(iter(ggufs.values())))
    finally:
        await pool.close()
    assert "pip install 'abliterated[pipeline]'" in str(caught.value)


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:99999", "127.0.0.1:"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, listen: str) -> None:
    arguments = ["--listen", listen, "--models", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "abliterated.engine", *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--listen", "127.0.0.1:0", "--models", str(tmp_path / "file")]
    ended = subprocess.run(
        [sys.executable, "-m", "abliterated.engine", *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 4 and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL])
def test_a_runner_that_dies_mid_stream_takes_nobody_along(running: Engine, number: signal.Signals) -> None:
    lines: list[dict[str, object]] = []
    body = {"model": "endless", "messages": HI, "options": {"num_ctx": LONG}}
    with running.http.stream("POST", "/api/chat", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not lines:
                running.holding("endless").send_signal(number)
            lines.append(json.loads(line))
    assert lines[-1] == {"error": f"llama runner process has terminated: signal: {number.name}"}
    assert running.ollama.ps().models == []
    assert running.ollama.chat("plain", HI).message.content == "a plain answer, nothing more"
    assert running.ollama.chat("endless", HI, options={"num_predict": 2}).eval_count == 2


def test_a_runner_that_died_idle_is_started_again(running: Engine) -> None:
    running.ollama.generate("plain", "")
    runner = running.holding("plain")
    runner.kill()
    until(lambda: not psutil.pid_exists(runner.pid))  # a zombie may still have threads, and they the socket
    assert running.ollama.chat("plain", HI).message.content == "a plain answer, nothing more"


def test_a_death_before_the_first_byte_is_a_500(running: Engine) -> None:
    running.ollama.generate("endless", "", options={"num_ctx": LONG})
    runner = running.holding("endless")
    with running.stalled_talk("endless", options={"num_ctx": LONG}):  # the one slot is taken: ours waits
        runner.suspend()
        waiting = httpx.Client(base_url=running.url, timeout=60)
        host, port = running.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "endless", "messages": HI, "options": {"num_ctx": LONG}}).encode()
        with waiting, socket.create_connection((host, int(port)), timeout=60) as second:
            second.sendall(
                b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            assert waiting.get("/api/version").status_code == 200  # the front answers while the runner does not
            runner.kill()
            answer = whole_answer(second)
    assert b" 500 " in answer.splitlines()[0] and b"llama runner process has terminated" in answer


def test_sigterm_ends_it_within_two_seconds_even_mid_stream(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    with engine(tmp_path / "models") as started:
        started.create("endless", ggufs["endless"])
        with started.stalled_talk("endless", options={"num_ctx": LONG}):
            runner = started.holding("endless").pid
            with within(2):
                started.process.terminate()
                assert started.process.wait(60) == 0
            until(lambda: gone(runner))
    assert "Traceback" not in "".join(started.log)


def test_models_outlive_a_kill_and_half_uploads_do_not(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    models = tmp_path / "models"
    with engine(models) as first:
        first.create("plain", ggufs["plain"])
        shown = first.ollama.list()
        host, port = first.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as upload:
            head = f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
            upload.sendall(head.encode() + b"x" * 1000)
            until(lambda: [path for path in (models / "blobs").iterdir() if path.name.startswith(".upload-")])
            first.process.kill()
            first.process.wait()
    with engine(models) as second:
        assert second.ollama.list() == shown
        assert second.ollama.chat("plain", HI).message.content == "a plain answer, nothing more"
    assert not [path for path in (models / "blobs").iterdir() if path.name.startswith(".")]


def test_an_abandoned_upload_leaves_nothing(running: Engine) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    folder = running.models / "blobs"

    def half() -> list[Path]:
        return [path for path in folder.iterdir() if path.name.startswith(".upload-")]

    with socket.create_connection((host, int(port))) as upload:
        head = f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        upload.sendall(head.encode() + b"x" * 1000)
        until(half)
    until(lambda: not half())
    assert running.ollama.list().models


def test_a_load_that_fails_says_what_llama_cpp_said(running: Engine, ggufs: dict[str, Path]) -> None:
    """The blob rots on disk after its creation; the engine goes on."""
    text = running.ollama.show("plain").modelfile or ""
    [blob] = [Path(line[5:]) for line in text.splitlines() if line.startswith("FROM ")]
    with blob.open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(
        ollama.ResponseError, match=r"unable to load model: .*(corrupted|incomplete|within the file bounds)"
    ) as no:
        running.ollama.chat("plain", HI)
    assert no.value.status_code == 500
    assert running.ollama.chat("endless", HI, options={"num_predict": 2}).eval_count == 2


def test_the_front_never_imports_llama_cpp() -> None:
    code = (
        "import sys, abliterated.engine.main\n"
        "assert 'xllamacpp' not in sys.modules and 'aiohttp' not in sys.modules\n"
        "import abliterated.engine.server\n"
        "assert not {'xllamacpp', 'torch', 'numpy', 'gguf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
