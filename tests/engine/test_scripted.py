"""The scripted model says what its script says, by what the conversation holds; or it can't be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.running import Engine, engine
from engine.scripted_gguf import Model, Script, write

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "%s"}}\n</tool_call>'
PLACE = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": PLACE}}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("talker")
    scripts = [
        Script("Nothing special."),
        Script(CALL % "a red door", when="oncez"),
        Script(f"{CALL % 'the left one'}\n{CALL % 'what is right'}", when="twicez"),
        Script("I saw it at last", when="seenz"),
    ]
    gguf = write(folder / "talker.gguf", Model(scripts=scripts))
    with engine(folder / "models") as running:
        running.create("talker", gguf, parameters={"temperature": 0})
        yield running


def said(talker: Engine, *texts: str) -> Any:
    talk = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
    return talker.ollama.chat("talker", talk, tools=[TOOL]).message


def test_a_marker_chooses_the_answer_and_the_last_script_wins(talker: Engine) -> None:
    assert said(talker, "hello").content == "Nothing special."
    assert said(talker, "now seenz").content == "I saw it at last"
    assert said(talker, "oncez", "hm", "seenz").content == "I saw it at last"
    assert said(talker, "seenz", "hm", "and oncez again").content == "I saw it at last", "wherever it stands"


def test_repeated_control_tokens_are_told_apart(talker: Engine) -> None:
    [call] = said(talker, "oncez").tool_calls
    assert call.function.arguments == {"at": "a red door"}
    calls = said(talker, "twicez").tool_calls
    assert [call.function.arguments["at"] for call in calls] == ["the left one", "what is right"]


def test_a_long_conversation_changes_nothing(talker: Engine) -> None:
    assert said(talker, *["so it goes"] * 60, "twicez").tool_calls


def test_what_no_table_can_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comes twice"):
        write(tmp_path / "no.gguf", Model(scripts=[Script(["<think>", "</think>", "<think>", "<tool_call>"])]))
