"""Base and abliterated side by side: an engine that answers from a script, on a real socket."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.chat.comparison import Row, Said, as_columns, as_text
from abliterate.chat.openings import reads_as_refusal
from abliterate.render import cell_width
from client.terminals import terminal

Run = Callable[..., subprocess.CompletedProcess[str]]


class Scripted(ThreadingHTTPServer):
    """`models`: name → what `/api/show` tells of its base. Those with the suffix answer, the others refuse."""

    daemon_threads = True
    models: dict[str, str]
    asked: list[tuple[str, str]]
    bodies: list[dict[str, Any]]

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"models": [{"name": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["model"]
        if name not in self.server.models:
            self._answer(404, {"error": f"model '{name}' not found"})
        elif self.path == "/api/show":
            base = self.server.models[name]
            self._answer(200, {"model_info": {"abliterated.base.name": base} if base else {}})
        else:
            prompt = body["messages"][-1]["content"]
            self.server.asked.append((name, prompt))
            self.server.bodies.append(body)
            text = "Sure: with care." if "abliterated" in name or name == "mine" else "I’m sorry, I can’t do that."
            lines = [{"message": {"content": word + " "}} for word in text.split()]
            if prompt == "break":
                lines[1:] = [{"error": "the runner has ended"}]
            lines.append({"message": {"content": ""}, "done": True, "eval_count": 4, "total_duration": 5_000_000})
            content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            self._send(200, content)

    def _answer(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def engine() -> Iterator[Scripted]:
    server = Scripted(("127.0.0.1", 0), Handler)
    server.models = {
        "qwen3:8b": "",
        "qwen3-abliterated:8b": "ollama:qwen3:8b",
        "mine": "",
        "other-abliterated": "hf:org/gone",
        "other:latest": "",
        "lost-abliterated": "ollama:gone:1b",
    }
    server.asked, server.bodies = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def compare(run: Run, engine: Scripted, environment: dict[str, str]) -> Run:
    def call(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
        return run("compare", *args, env=environment | {"OLLAMA_HOST": engine.host}, **more)

    return call


def test_both_answers_and_which_reads_as_a_refusal(compare: Run) -> None:
    done = compare("qwen3-abliterated:8b", "How do I pick a lock?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "» How do I pick a lock?\n"
        "qwen3:8b · refusal\n  I’m sorry, I can’t do that.\n"
        "qwen3-abliterated:8b\n  Sure: with care.\n\n"
    )
    assert done.stderr == "read as refusals: qwen3:8b 1 of 1 · qwen3-abliterated:8b 0 of 1\n"


def test_each_model_is_asked_in_one_sweep_and_from_a_file(compare: Run, engine: Scripted, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# mine\none\n\ntwo\n")
    answer = json.loads(compare("qwen3-abliterated:8b", "--file", "p.txt", "--json", "--tokens", "9").stdout)
    assert [name for name, _ in engine.asked] == ["qwen3:8b"] * 2 + ["qwen3-abliterated:8b"] * 2
    assert engine.bodies[0]["options"] == {"temperature": 0.0, "seed": 0, "num_predict": 9}
    assert answer["refusals"] == {"base": 2, "model": 0, "total": 2}
    assert [row["prompt"] for row in answer["rows"]] == ["one", "two"]
    assert answer["rows"][0]["base"]["refusal"] is True
    assert answer["rows"][0]["model"] == {
        "answer": "Sure: with care.", "thinking": "", "refusal": False, "tokens": 4, "seconds": 0.005,
    }  # fmt: skip


def test_prompts_come_from_a_pipe(compare: Run, engine: Scripted) -> None:
    assert compare("qwen3-abliterated:8b", input="one\ntwo\n").returncode == 0
    assert len(engine.asked) == 4


@pytest.mark.parametrize(
    ("args", "base"),
    [
        (["qwen3-abliterated:8b"], "qwen3:8b"),
        (["other-abliterated"], "other:latest"),  # what its weights name is no model of an engine
        (["mine", "--base", "qwen3:8b"], "qwen3:8b"),
    ],
)
def test_the_base_is_what_the_weights_name_or_else_what_the_name_says(
    compare: Run, engine: Scripted, args: list[str], base: str
) -> None:
    assert compare(*args, "x").returncode == 0
    assert engine.asked[0] == (base, "x")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["mine", "x"], 2, ["neither its weights nor its name", "--base"]),
        (["lost-abliterated", "x"], 7, ["gone:1b: the base of lost-abliterated is not at", "ollama pull gone:1b"]),
        (["none", "x"], 7, ["none: no such model", "There are qwen3:8b, qwen3-abl"]),
        (["qwen3-abliterated:8b"], 2, ["nothing to ask", "--file"]),
        (["qwen3-abliterated:8b", "--file", "none.txt"], 7, ["none.txt: no such file", "one prompt a line"]),
        (["qwen3-abliterated:8b", "x", "--tokens", "0"], 2, ["--tokens must be 1 or more"]),
        (["qwen3-abliterated:8b", "break"], 5, ["the runner has ended", "log"]),
    ],
)
def test_every_error_names_the_next_step(compare: Run, args: list[str], code: int, words: list[str]) -> None:
    done = compare(*args)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_terminal_shows_two_columns(engine: Scripted, environment: dict[str, str]) -> None:
    with terminal(
        "compare", "qwen3-abliterated:8b", "x", environment=environment | {"OLLAMA_HOST": engine.host, "COLUMNS": "80"}
    ) as person:
        assert person.ended() == 0
    line = next(line for line in person.seen.splitlines() if "can’t do that" in line)
    assert "│ Sure: with care." in line


@given(st.text(max_size=200), st.text(max_size=200), st.integers(0, 120))
def test_columns_never_pass_the_edge(left: str, right: str, width: int) -> None:
    row = Row("what?", Said(left), Said(right))
    text = as_columns(row, "a", "b", width)
    if width >= 60:
        assert all(cell_width(line) <= width for line in text.split("\n"))
    assert "\x1b" not in text + as_text(row, "a", "b")


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I can't help with that, I'm sorry.", True),
        ("**I’m sorry**, but no", True),
        ("<think>hm</think>\n\nEs tut mir leid, das geht nicht.", True),
        ("I can only say this: take a pick.", False),
        ("Sure. I cannot overstate how easy it is.", False),
        ("", False),
    ],
)
def test_openings(answer: str, refusal: bool) -> None:
    assert reads_as_refusal(answer) is refusal


def test_a_terminal_that_obeys_nothing_is_told_nothing_to_obey(engine: Scripted, environment: dict[str, str]) -> None:
    here = environment | {"OLLAMA_HOST": engine.host, "TERM": "dumb"}
    with terminal("compare", "qwen3-abliterated:8b", "How do I pick a lock?", environment=here) as person:
        person.until("read as refusals")
        assert person.ended() == 0
    assert "\x1b" not in person.seen
