from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.messages import JobView
from client.fake_daemon import FakeDaemon

ABLITERATE = Path(sys.executable).parent / "abliterate"
IDS = ("01j8zq3v5k7m9n1p3r5t7v9x1a", "01j8zq3v5k7m9n1p3r5t7v9x2b", "01j8zq3v5k7m9n1p3r5t7v9x3c")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon whose socket lies where `config.toml` in `tmp_path` says."""
    fake = FakeDaemon(tmp_path / "control.sock").start()
    yield fake
    fake.stop()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing of this user's: a configuration of our own, no colours, no terminal's width."""
    config = tmp_path / "config.toml"
    config.write_text(f'[paths]\nstate = "{tmp_path}/state"\n[control]\nsocket = "{tmp_path}/control.sock"\n')
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
    return kept | {"ABLITERATED_CONFIG": str(config), "HOME": str(tmp_path), "PYTHONUTF8": "1"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the console script as a person does."""

    def call(*args: str, input: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"env": environment, "cwd": tmp_path} | more
        return subprocess.run(
            [str(ABLITERATE), *args], input=input, capture_output=True, text=True, timeout=150, **settings
        )

    return call


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the console script and leave it running; it never outlives the test."""
    running: list[subprocess.Popen[str]] = []

    def call(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(ABLITERATE), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        running.append(process)
        return process

    yield call
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def make_job(number: int = 0, **fields: Any) -> JobView:
    """A job as the daemon would describe it."""
    return JobView(
        **{
            "id": IDS[number],
            "label": "night",
            "model": "ollama:qwen3:8b",
            "target": "qwen3-abliterated:8b",
            "state": "queued",
            **fields,
        }
    )
