"""A recipe for a model that is there, and what is said to whoever mistyped."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from abliterate.contract.recipe import parse_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
MODELS = [
    {"name": "qwen3-abliterated:8b"},
    {"name": "gemma3:4b", "size": 3_300_000_000, "details": {"family": "gemma3", "quantization_level": "Q4_K_M"}},
    {"name": "qwen3:8b"},
]


@pytest.fixture
def engine() -> Iterator[str]:
    with serving({"models": MODELS, "version": "0.35.0"}) as host:
        yield host


@contextlib.contextmanager
def serving(answer: dict[str, Any]) -> Iterator[str]:
    """An engine that answers so to whatever is got from it."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("args", "model", "note"),
    [
        ([], "ollama:gemma3:4b", "for gemma3:4b (gemma3, Q4_K_M, 3.3 GB), the newest of 2"),
        (["qwen3:8b"], "ollama:qwen3:8b", "for qwen3:8b"),
        (["qwen3:9b"], "ollama:qwen3:9b", "the engine has no qwen3:9b yet: did you mean qwen3:8b?"),
        (["zzz"], "ollama:zzz", "`ollama pull zzz` fetches it"),
        (["hf:org/model"], "hf:org/model", ""),
    ],
)
def test_a_new_recipe_is_for_a_model_that_is_there(
    run: Run, engine: str, args: list[str], model: str, note: str
) -> None:
    done = run("new", *args, "--host", engine)
    assert done.returncode == 0
    assert parse_recipe(done.stdout.encode()).model == model
    assert note in done.stderr
    assert bool(note) == bool(done.stderr)


def test_nobody_is_sent_to_fetch_what_the_embedded_engine_can_not(run: Run) -> None:
    with serving({"models": [], "version": "0.30.1-abliterated.embedded"}) as host:
        said = run("new", "--host", host).stderr
    assert "ollama pull" not in said
    assert "no model yet: the embedded engine can't fetch models: name a .gguf file or hf:ORG/REPO" in said


def test_without_an_engine_a_recipe_is_written_all_the_same(run: Run) -> None:
    done = run("new", "--host", "127.0.0.1:1")
    assert parse_recipe(done.stdout.encode()).model == "ollama:qwen3:8b"
    assert "no engine answers" in done.stderr
    assert run("new", "llama3:8b", "--host", "127.0.0.1:1").stderr == ""


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("strength = 1", "line 2: strength: unknown key (did you mean `edit.strength`?)"),
        ("[search]\nstrength = 1", "search.strength: unknown key (did you mean `edit.strength`?)"),
        ("[edit]\nstrenght = 1", "edit.strenght: unknown key (did you mean `strength`?)"),
        ("[evalute]\nprompts = 1", "evalute: unknown key (did you mean `evaluate`?)"),
        ('[search]\ntrials = "5"', "search.trials: expected a whole number, got a text (without quotes: 5)"),
        ('[edit]\ninvert = "true"', "(without quotes: true)"),
        ("[edit]\nlayers = 5", '(in quotes: "5")'),
        ('[edit]\nkernel = "gausian"', "did you mean 'gaussian'?"),
        ("[edit]\nzzzz = 1", "known here: strength"),
        ("[edit]\nstrength = 11", "line 3: edit.strength: expected a number of at most 10\n"),
        ("[search]\ntrials = 1.5", "search.trials: expected a whole number, got 1.5"),
        ('[schedule]\nafter = "x"', 'schedule.after: expected a list, got a text (in brackets: ["x"])'),
        ('[schedule]\nwindow = "1-7"', "schedule.window: '1-7' is not understood (as in \"01:00-07:00\")"),
        ('[run]\ndevice = "gpu"', "run.device: 'gpu' is not understood (auto, cpu, mps, cuda, or cuda:N)"),
        ('[direction]\nindex = "best"', "'best' is none of its values (one of auto, a number)"),
        ('[export]\nquantize = "Q4"', "export.quantize: 'Q4' is not known (One of keep, F32,"),
        ('[evaluate]\nsuites = ["mine"]', "there is no suite 'mine' (Built in: over-refusal,"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_what_was_meant(run: Run, recipe: str, words: str) -> None:
    done = run("check", "-", input=f'model = "ollama:qwen3:8b"\n{recipe}\n')
    assert done.returncode == 2
    assert words in done.stderr


def test_what_contradicts_itself_is_named_beside_what_is_misspelt_and_all_in_order(run: Run) -> None:
    done = run(
        "check", "-", input='model = "qwen3:8b"\n[edit]\nlayers = "2..5"\nstrenght = 1\n[export]\nquantize = 4\n'
    )
    lines = done.stderr.splitlines()
    assert [line.partition(": ")[2].partition(": ")[2].partition(": ")[0] for line in lines[:-1]] == [
        "model",
        "edit.layers",
        "edit.strenght",
        "export.quantize",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["stauts"], ["no verb 'stauts'", "Did you mean `abliterate status`?"]),
        (["install", "--user"], ["no verb 'install'", "Did you mean `abliterated install`?"]),
        (["submit", "x", "--wach"], ["no option --wach", "Did you mean --watch?"]),
        (["submit", "x", "--zzz=1"], ["no option --zzz", "abliterate submit --help"]),
        (["status", "a", "b"], ["too much: b", "abliterate status --help"]),
        (["chat"], ["NAME", "abliterate chat --help"]),
    ],
)
def test_a_mistake_on_the_command_line_too(run: Run, args: list[str], words: list[str]) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr
