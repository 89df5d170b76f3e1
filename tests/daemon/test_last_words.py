"""What the foreground verbs say before they do anything: a mistake is one line, and one that says what to do next."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate import cli as client_cli
from abliterate.contract.errors import DiskError
from abliterate.contract.recipe import parse_recipe
from abliterated import cli, refuser, run_recipe
from abliterated.cli import VERBS, main
from abliterated.once import absolute_paths, recipe_digest

MODEL = str(refuser.files().model)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own, a home in it, and the signals as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OLLAMA_HOST", "OLLAMA_BIN", "ABLITERATED_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    (tmp_path / "file").write_text("")
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "many.toml").write_text('model = "there.gguf"\n[matrix]\n"edit.strength" = [0.5, 1.0]\n')
    (tmp_path / "gone.toml").write_text('model = "gone.gguf"\n')
    (tmp_path / "good.toml").write_text(f"model = '{MODEL}'\n")
    yield tmp_path
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("chat {model} hi --tokens 0", 2, "counts from 1"),
        ("chat {model} hi --direction none.pt", 2, "abliterated direction MODEL"),
        ("demo --out file/below", 4, "--out"),
        ("demo --export model.bin", 2, "ends in .gguf"),
        ("demo --export file/below.gguf", 4, "another folder"),
        ("direction {model} -o found.bin", 2, "Name it .pt"),
        ("direction {model} -o found.pt --per-layer --layer 3", 2, "Leave --layer"),
        ("direction {model} -o found.pt --layer deep", 2, "a fraction"),
        ("evaluate {model} --prompts 0", 2, "positive number"),
        ("evaluate {model} --answers file/below", 4, "another --answers"),
        ("evaluate {model} --history .", 4, "another --history"),
        ("evaluate ./none.gguf", 7, "Check the path"),
        ("evaluate {model} --refusal-markers none.txt", 2, "one opening a line"),
        ("export {model} -o copy.bin", 2, ".gguf"),
        ("export {model} -o there.gguf", 6, "--force"),
        ("export hf:org/repo -o copy.gguf", 2, "use `work`"),
        ("apply {model} --direction found.pt --out file/below", 4, "another folder"),
        ("work none.toml --out out", 2, "Check the path"),
        ("work many.toml --out out", 2, "once for each"),
        ("work gone.toml --out out", 3, "Check `model`"),
        ("work good.toml --out file/below", 4, "another --out"),
    ],
)
def test_a_mistake_is_named_with_the_next_step(
    line: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.format(model=MODEL).split()) == code
    told = capsys.readouterr()
    assert told.out == ""
    first, arrow, remedy = told.err.partition("\n  → ")
    assert first.startswith("abliterated: ")
    assert arrow
    assert words in told.err, remedy


def test_one_run_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    held = os.open(here / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert main(["work", "good.toml", "--out", "out"]) == 75
    finally:
        os.close(held)
    assert "give another --out" in capsys.readouterr().err


def test_a_folder_for_the_stages_that_can_not_be(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = absolute_paths(parse_recipe((here / "good.toml").read_bytes(), "good.toml"), here)
    (here / "out").mkdir()
    (here / "out" / f".work-{recipe_digest(recipe)[:16]}").write_text("in the way")
    assert main(["work", "good.toml", "--out", "out"]) == 4
    told = capsys.readouterr().err
    assert "can't be made (File exists)" in told and "→ Give another --out" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(("option", "place"), [("--answers", "/proc/answers.jsonl"), ("--history", "/dev/full")])
def test_a_place_that_takes_no_answers_in_the_end(option: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--prompts", "1", "--tokens", "1", "--quiet"]
    assert main(["evaluate", MODEL, *few, option, place]) == 4
    told = capsys.readouterr().err
    assert f"{place}: can't be written" in told and f"→ Give another {option}" in told


def test_a_demo_without_the_ollama_it_was_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLLAMA_BIN", "/nowhere/ollama")
    assert main(["demo", "--engine", "ollama"]) == 2
    assert "→" in capsys.readouterr().err
    monkeypatch.delenv("OLLAMA_BIN")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["demo", "--engine", "ollama"]) == 7
    assert "→" in capsys.readouterr().err


def test_an_installation_for_all_is_root_s_and_none_on_a_mac(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("abliterated.install.machine.is_root", lambda: False)
    assert main(["install", "--system"]) == 2
    assert "sudo abliterated install --system" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["install", "--system"]) == 2
    assert "--user" in capsys.readouterr().err


def test_a_demo_without_the_clients_it_asks_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.contract.errors import NotFound
    from abliterated.demo.asking import ask

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(NotFound) as caught:
        ask("http://127.0.0.1:9", "m", [], lambda _: None)
    assert "pip install" in caught.value.remedy


def test_the_librarys_folder_that_can_not_be(here: Path) -> None:
    with pytest.raises(DiskError) as caught:
        run_recipe({"model": MODEL}, here / "file" / "below")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sevre", "no verb 'sevre'\n  → Did you mean `abliterated serve`?"),
        ("submit qwen3:8b", "no verb 'submit'\n  → Did you mean `abliterate submit`?"),
        ("nothing-like-it", "no verb 'nothing-like-it'\n  → See: abliterated --help"),
        ("direction", "\n  → See: abliterated direction --help"),
        ("demo --engine both", "\n  → See: abliterated demo --help"),
        ("serve --nothing", "unrecognized arguments: --nothing\n  → See: abliterated --help"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_as_any_other(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert told.err.startswith("abliterated: ") and words in told.err and told.err.count("\n") == 2


def test_each_command_knows_the_other_s_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(VERBS) - set(client_cli.VERBS) == client_cli.DAEMON_VERBS
    for verb in set(client_cli.VERBS) - set(VERBS):
        with pytest.raises(SystemExit):
            main([verb])
        assert f"Did you mean `abliterate {verb}`?" in capsys.readouterr().err


def test_ctrl_c_before_a_verb_has_begun_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", pressed)
    assert main(["serve"]) == 130
