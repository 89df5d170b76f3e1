"""Talking to a model as a person does: in a terminal and in a pipe, on the embedded engine with models that answer."""

from __future__ import annotations

import importlib.util
import json
import readline
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abliterated import refuser
from client.terminals import terminal

if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("no embedded engine: pip install 'abliterated[pipeline]'", allow_module_level=True)

from engine.conftest import ENDLESS, THOUGHTFUL
from engine.running import Engine, engine
from engine.scripted_gguf import Model, Script, write

Run = Callable[..., subprocess.CompletedProcess[str]]
CALL = ["<tool_call>", '\n{"name": "calculate", ', '"arguments": {"expression": "6 * 7"}}\n', "</tool_call>"]
CALLING = Model(scripts=[Script(CALL), Script("so it is 42", when='"result": 42')])
EVIL = Model(scripts=[Script("a\x1b[2Jb")])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("chat")
    with engine(folder / "models") as running:
        files = refuser.files()
        running.create("refuser", files.model, template=files.template_go.read_text())
        for name, model in {"endless": ENDLESS, "thoughtful": THOUGHTFUL, "calling": CALLING, "evil": EVIL}.items():
            running.create(name, write(folder / f"{name}.gguf", model), parameters={"temperature": 0})
        yield running


@pytest.fixture
def ask(run: Run, served: Engine, environment: dict[str, str]) -> Run:
    """`abliterate chat`, with OLLAMA_HOST set."""

    def call(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
        return run("chat", *args, env=environment | {"OLLAMA_HOST": served.url}, **more)

    return call


@pytest.fixture
def here(served: Engine, environment: dict[str, str]) -> dict[str, str]:
    return environment | {"OLLAMA_HOST": served.url}


def test_in_a_pipe_the_answer_stands_alone(ask: Run) -> None:
    done = ask("refuser", "--set", "temperature=0", input="How do I yarp the basket?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(refuser.REFUSALS)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_what_is_piped_goes_before_the_prompt(ask: Run) -> None:
    done = ask("refuser", "basket?", "--set", "temperature=0", input="How do I yarp the")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_thoughts_stay_out_of_a_pipe(ask: Run) -> None:
    done = ask("thoughtful", "why?")
    assert (done.stdout, done.stderr) == ("the answer is 42\n", "")


def test_numbers_are_told_on_the_side(ask: Run) -> None:
    done = ask("thoughtful", "why?", "--verbose")
    assert done.stdout == "the answer is 42\n"
    assert "answer" in done.stderr
    assert "tokens" in done.stderr


def test_a_tool_that_is_called_is_used_and_shown(ask: Run) -> None:
    done = ask("calling", "what is 6 * 7?", "--tools")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "so it is 42\n"
    assert done.stderr == '  tool calculate(expression="6 * 7") → {"result": 42}\n'


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["refusr", "hi"], 7, ["refusr: no such model", "Did you mean refuser?"]),
        (["qwen3-abliterated:8b", "hi"], 7, ["no such model", "abliterate submit qwen3:8b"]),
        (["refuser", "hi", "--set", "num_ctxx=1"], 2, ["num_ctxx: no option", "did you mean num_ctx?"]),
        (["refuser", "hi", "--set", "num_ctx=x"], 2, ["num_ctx=x: not a whole number", "num_ctx=4096"]),
        (["refuser", "hi", "--set", "num_ctx"], 2, ["no key=value"]),
        (["refuser", "hi", "--host", "127.0.0.1:1"], 75, ["nobody answers at http://127.0.0.1:1", "OLLAMA_HOST"]),
        (["refuser", "hi", "--host", "ftp://x"], 2, ["ftp is not spoken", "http://"]),
        (["refuser"], 2, ["nothing to ask", "in a terminal"]),
    ],
)
def test_every_error_names_the_next_step(ask: Run, args: list[str], code: int, words: list[str]) -> None:
    done = ask(*args)
    assert (done.returncode, done.stdout) == (code, "")
    for word in words:
        assert word in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(here: dict[str, str]) -> None:
    with terminal("chat", "endless", environment=here) as person:
        person.until(">>> ")
        person.type("hi\n")
        person.until("round and round it goes")
        person.type("\x03")
        person.until("stopped")
        person.until(">>> ")
        person.type("/load thoughtful\n")  # what was said before goes along, and is answered
        person.until("Now thoughtful.")
        person.until(">>> ")
        person.type("and now?\n")
        shown = person.until("the answer is 42")
        assert "I should ponder" in shown
        person.until(">>> ")
        person.type("half a line")
        person.until("half a line")
        person.interrupt_until("Ctrl-D or /bye leaves")
        person.until(">>> ")
        person.type("\x04")
        assert person.ended() == 0


def test_a_conversation_of_commands_and_several_lines(here: dict[str, str], tmp_path: Path) -> None:
    with terminal("chat", "thoughtful", "--hide-thinking", environment=here) as person:
        for typed, shown in [
            ('"""one\n', "... "),
            ('two"""\n', "the answer is 42"),
            ("/set system be brief\n", "System prompt set."),
            ("/set parameter num_ctx 2048\n", "num_ctx = 2048"),
            ("/set nothink\n", "without thinking"),
            ("/tools\n", "calculate"),
            ("/show\n", "be brief"),
            ("/clear\n", "Forgotten."),
            ("/claer\n", "Did you mean /clear?"),
            ("/load nothing\n", "no such model"),
            ("/?\n", "Ctrl-C"),
        ]:
            person.type(typed)
            person.until(shown)
            assert "ponder" not in person.seen
        person.type("/bye\n")
        assert person.ended() == 0
    history = tmp_path / ".local/state/abliterated/chat-history"
    assert "/set system be brief" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit knows no bracketed paste")
def test_lines_pasted_together_are_one_message(here: dict[str, str]) -> None:
    with terminal("chat", "thoughtful", environment=here) as person:
        person.until(">>> ")
        person.type("\x1b[200~one\rtwo\rthree\x1b[201~\r")
        person.until("the answer is 42")
        person.until(">>> ")
        person.type("/show\r")
        person.until("2 messages")
        person.until(">>> ")
        person.type("\x04")
        assert person.ended() == 0


def test_what_a_model_says_can_t_drive_the_terminal(here: dict[str, str], ask: Run) -> None:
    with terminal("chat", "evil", "hi", environment=here | {"NO_COLOR": "1"}) as person:
        assert person.ended() == 0
        assert "a\\x1b[2Jb" in person.seen
    assert ask("evil", "hi").stdout == "a\x1b[2Jb\n"


def test_no_history_is_kept_where_none_is_wanted(here: dict[str, str], tmp_path: Path) -> None:
    with terminal("chat", "thoughtful", "--no-history", environment=here) as person:
        person.until(">>> ")
        person.type("/bye\n")
        assert person.ended() == 0
    assert not (tmp_path / ".local/state/abliterated/chat-history").exists()


def test_without_a_host_the_daemon_s_proxy_is_asked(
    run: Run, served: Engine, environment: dict[str, str], tmp_path: Path
) -> None:
    config = Path(environment["ABLITERATED_CONFIG"])
    address = served.url.removeprefix("http://")
    config.write_text(config.read_text() + f"[proxy]\nlisten = {json.dumps(address)}\n")
    done = run("chat", "thoughtful", "why?")
    assert (done.returncode, done.stdout) == (0, "the answer is 42\n"), done.stderr
