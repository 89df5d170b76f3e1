"""Finding, starting, ending and installing engines: nothing is left running, and what is missing says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from contract.cases import HELLO, PARAMETERS, Blob
from contract.scripted_model import ANSWER, GO_TEMPLATE
from engines import REPOSITORY, Engine, RunningEngine, engine_of, engine_parameters, load_installer, require

INSTALLER = REPOSITORY / "tools" / "install_ollama.py"
OLD, NEW = (known.version for known in load_installer().GENERATIONS)


def install(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, INSTALLER, *arguments],
        env=os.environ | {"OLLAMA_TOOLS_DIR": str(root)} | environment,
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def group_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The living members of its process group; those that ended while we looked don't count."""
    members = []
    for candidate in psutil.process_iter():
        try:
            if os.getpgid(candidate.pid) == process.pid and candidate.status() != psutil.STATUS_ZOMBIE:
                members.append(candidate)
        except (ProcessLookupError, psutil.Error):
            continue
    return members


def load_a_model(running: RunningEngine, blob: Blob) -> None:
    with httpx.Client(base_url=running.base_url, trust_env=False, timeout=150) as http:
        http.post(f"/api/blobs/{blob.digest}", content=blob.path.read_bytes())
        body = {"model": "lamp", "files": {"m.gguf": blob.digest}, "template": GO_TEMPLATE, "parameters": PARAMETERS}
        assert http.post("/api/create", json=body | {"stream": False}).status_code == 200
        answer = http.post("/api/chat", json={"model": "lamp", "messages": HELLO, "stream": False}).json()
        assert answer["message"]["content"] == ANSWER


@pytest.mark.parametrize("engine", engine_parameters())
def test_nothing_is_left_running_even_of_a_killed_engine(engine: Engine, files: dict[str, Blob]) -> None:
    with require(engine).start() as running:
        load_a_model(running, files["tools"])
        if not engine.embedded:
            assert len(group_of(running.process)) > 1, "a runner of its own"
        running.process.kill()
    deadline = time.monotonic() + 60
    while left := group_of(running.process):
        assert time.monotonic() < deadline, left


def test_what_does_not_start_says_so_with_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "ollama"
    broken.write_text("#!/bin/sh\necho ollama version is 9.9.9\necho no such thing as a GPU >&2\nexit 7\n")
    broken.chmod(0o755)
    engine = engine_of(broken)
    assert (engine.id, engine.missing) == ("ollama-9.9.9", "")
    with pytest.raises(RuntimeError, match=r"exit code 7(.|\n)*no such thing as a GPU"), engine.start():
        pytest.fail("it started")


def test_a_binary_that_cannot_run_is_listed_with_the_reason(tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "ollama")
    assert "No such file" in engine.missing


def test_without_go_the_installer_says_so_and_exits_3(tmp_path: Path) -> None:
    done = install(tmp_path, "--version", OLD, GO="no-such-go")
    assert done.returncode == 3
    assert "no Go toolchain" in (tmp_path / f"{OLD}.reason.txt").read_text()


def test_a_go_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "go"
    old.write_text("""#!/bin/sh\necho '{"GOVERSION": "go1.19.8", "CC": "cc", "CXX": "c++"}'\n""")
    old.chmod(0o755)
    root = tmp_path / "root"
    done = install(root, GO=str(old))
    assert done.returncode == 3, done.stderr
    for version in (OLD, NEW):
        assert "Go is too old: go1.19.8" in (root / f"{version}.reason.txt").read_text()


@pytest.mark.skipif(not shutil.which("go"), reason="no Go toolchain")
def test_a_budget_that_runs_out_leaves_a_reason_and_nothing_half_made(tmp_path: Path) -> None:
    done = install(tmp_path, "--version", OLD, "--budget", "0.7")
    assert done.returncode == 3, done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {f".{OLD}.lock", f"{OLD}.reason.txt"}
    assert (tmp_path / f"{OLD}.reason.txt").read_text().strip() in done.stderr


def test_what_is_installed_is_left_alone(tmp_path: Path) -> None:
    binary = tmp_path / NEW / "bin" / "ollama"
    binary.parent.mkdir(parents=True)
    binary.write_text("stands for the real one")
    done = install(tmp_path, "--version", NEW, GO="no-such-go")
    assert (done.returncode, binary.read_text()) == (0, "stands for the real one")
    assert os.access(tmp_path / NEW / "lib" / "ollama" / "llama-server", os.X_OK), "and its engine put beside it"


def test_the_shim_refuses_an_option_it_does_not_know() -> None:
    shim = REPOSITORY / "tools" / "llama_server_shim.py"
    done = subprocess.run([sys.executable, shim, "--brand-new"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert "error: the llama-server shim does not know" in done.stderr
    listed = subprocess.run([sys.executable, shim, "--list-devices", "--offline", "--verbose"], capture_output=True)
    assert (listed.returncode, listed.stdout) == (0, b"Available devices:\n")
