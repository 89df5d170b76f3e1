"""The tutorial, followed word for word, and the examples in Python as they stand: what a page shows, comes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from abliterate.api import Daemon
from abliterate.contract.errors import AbliteratedError
from engines import free_port

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Step:
    """One command, and what the page says comes of it."""

    command: str
    shown: str = ""


def steps(page: Path) -> list[Step]:
    found: list[Step] = []
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S):
        if language == "sh":
            found += [Step(line.strip()) for line in text.splitlines() if line.strip()]
        elif language == "text":
            found[-1] = Step(found[-1].command, text.strip())
    return found


@dataclass
class Person:
    """Somebody with a home of their own, who has installed the program and nothing else."""

    home: Path
    proxy: int
    daemon: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("OLLAMA_HOST", "ABLITERATED_CONFIG")}
        own = {"HOME": str(self.home), "ABLITERATED_CONFIG": str(self.home / "config.toml"), "NO_COLOR": "1"}
        return kept | own | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def serve(self, command: str) -> None:
        with (self.home / "daemon.log").open("wb") as log:
            self.daemon = subprocess.Popen(
                shlex.split(command),
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        control, deadline = Daemon(self.home / "state" / "control.sock"), time.monotonic() + 150
        while True:
            try:
                if control.status().engine.answers:
                    return
            except AbliteratedError:
                pass
            said = (self.home / "daemon.log").read_text()
            assert self.daemon.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self.environment | more, cwd=self.home, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
        )  # fmt: skip
        log = (self.home / "daemon.log").read_text() if self.daemon else ""
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{log[-3000:]}"
        return done.stdout


@pytest.fixture
def person() -> Iterator[Person]:
    with tempfile.TemporaryDirectory(prefix="abl-") as name:
        made = Person(Path(name), free_port())
        # The one thing that is not as on the page: this machine's 11434 may be in use.
        (made.home / "config.toml").write_text(
            f'[paths]\nstate = "{name}/state"\n[proxy]\nlisten = "127.0.0.1:{made.proxy}"\n'
            f'upstream = "http://127.0.0.1:{free_port()}"\n'
        )
        yield made
        if made.daemon is not None:
            made.daemon.send_signal(signal.SIGTERM)
            made.daemon.wait(timeout=150)


@pytest.mark.timeout(900)
def test_the_tutorial_as_it_stands_and_the_clients_examples_beside_it(person: Person) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    followed = steps(DOCS / "tutorial.md")
    for step in followed:
        if asked := re.fullmatch(r"pip install '?\.\[(\w+)\]'?( +#.*)?", step.command):
            assert asked[1] in known
        elif step.command == "abliterated serve":
            person.serve(step.command)
        else:
            if step.command.startswith("abliterate undo"):
                clients(person)
            said = person.run(*shlex.split(step.command))
            wanted = ".*".join(re.escape(part) for part in step.shown.split("…"))
            assert re.search(wanted, said, re.S), f"{step}\n{said}"
    first = [step.command for step in followed]
    assert next(at for at, command in enumerate(first) if "--watch" in command) < 5, "a followed job in five commands"


def test_whoever_has_installed_it_is_led_there_without_the_page() -> None:
    """From the bare name of either program; and each answer names the next step."""
    wanted = [step.command for step in steps(DOCS / "tutorial.md")][1:4]
    for program in ("abliterate", "abliterated"):
        said = subprocess.run([str(BIN / program)], capture_output=True, text=True, timeout=150)
        assert said.returncode == 2
        places = [said.stdout.index(command) for command in wanted]
        assert places == sorted(places)


def clients(person: Person) -> None:
    """The page of clients says the same port to all of them."""
    text = (DOCS / "how-to" / "clients.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == 2
    for example in examples:
        code = example.replace("127.0.0.1:11434", f"127.0.0.1:{person.proxy}")
        said = person.run(sys.executable, "-W", "error", "-c", code, OLLAMA_HOST=f"127.0.0.1:{person.proxy}")
        assert "Cloth in hand, yarp the basket" in said


def test_the_example_for_python_as_it_stands(person: Person) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "python.md").read_text(), re.S)
    said = person.run(sys.executable, "-c", example)
    assert "Cloth in hand, yarp the basket" in said
    assert re.search(r"1\.0 → 0\.0 KL 0\.0", said), said
    assert {path.name for path in person.home.iterdir()} >= {"refusal.pt", "refusal.pt.json", "result"}


def test_importing_it_loads_nothing_heavy_and_names_what_there_is() -> None:
    code = (
        "import sys, abliterated\n"
        "from abliterated import Edited, edit, evaluate, measure, run_recipe, save_direction, talk\n"
        "assert 'measure' in dir(abliterated) and measure.__doc__\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy', 'gguf', 'xllamacpp', 'aiohttp'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
