"""A recipe for a model that is there, and what is said to whoever mistyped."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

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
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            content = json.dumps({"models": MODELS}).encode()
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
        ('[search]\ntrials = "5"', "search.trials: expected `int`, got `str` (without quotes: 5)"),
        ('[edit]\ninvert = "true"', "(without quotes: true)"),
        ("[edit]\nlayers = 5", '(in quotes: "5")'),
        ('[edit]\nkernel = "gausian"', "did you mean 'gaussian'?"),
        ("[edit]\nzzzz = 1", "known here: strength"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_what_was_meant(run: Run, recipe: str, words: str) -> None:
    done = run("check", "-", input=f'model = "ollama:qwen3:8b"\n{recipe}\n')
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["stauts"], ["no verb 'stauts'", "abliterate status --help"]),
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
