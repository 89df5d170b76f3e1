"""Answers read in whatever pieces they come: nothing of a call in the text, prose untouched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abliterated.proxy.tools import dialects, schema
from abliterated.proxy.tools.dialects import Dialect, all_dialects
from abliterated.proxy.tools.reading import LONGEST_CALL, Reader
from abliterated.shapes.talk import Piece
from proxy.tools.answers import PROSE, READ, THINK, TOOLS, Call, Said

INDEX = schema.index(TOOLS)


def gathered(pieces: Iterable[Piece]) -> tuple[str, str, list[Call]]:
    found = list(pieces)
    calls = [(call.name, call.arguments) for piece in found for call in piece.calls]
    return "".join(piece.content for piece in found), "".join(piece.thinking for piece in found), calls


def read(reader: Reader, parts: Iterable[str], *, cut: bool = False) -> tuple[str, str, list[Call]]:
    pieces: list[Piece] = []
    for part in parts:
        pieces += reader.feed(part)
    return gathered([*pieces, *reader.finish(cut=cut)])


def split(text: str, places: Iterable[int]) -> list[str]:
    cuts = sorted({place % (len(text) + 1) for place in places})
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def reader_of(said: Said) -> Reader:
    return Reader((said.dialect,), said.thoughts, INDEX, thinking=said.opened)


BITS = [
    "<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "{", "}", "[", "]", '"', "name", "x", ":",
    '"name": "get_weather"', "get_weather", "<function=get_weather>", "</function>", "\\", " ", "\n", "```", ",", "<",
    "<|", "<think>", "</think>",
]  # fmt: skip
CUTS = st.lists(st.integers(0, 400), max_size=12)


@pytest.mark.parametrize("said", READ, ids=lambda said: said.name)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_each_dialect_is_read_in_pieces_of_every_size(said: Said, size: int) -> None:
    parts = [said.text[at : at + size] for at in range(0, len(said.text), size)]
    assert read(reader_of(said), parts) == (said.content, said.thinking, said.calls)


@settings(max_examples=200, deadline=None)
@given(said=st.sampled_from(READ), cuts=CUTS)
def test_where_it_is_cut_makes_no_difference(said: Said, cuts: list[int]) -> None:
    assert read(reader_of(said), split(said.text, cuts)) == (said.content, said.thinking, said.calls)


@pytest.mark.parametrize("text", PROSE)
@pytest.mark.parametrize("dialect", all_dialects(), ids=lambda dialect: dialect.name)
def test_what_only_looks_like_a_call_is_text(text: str, dialect: Dialect) -> None:
    for size in (1, 5, 1000):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        assert read(Reader((dialect,), None, INDEX), parts) == (text, "", [])


@settings(max_examples=200, deadline=None)
@given(
    dialect=st.sampled_from(list(all_dialects())),
    text=st.lists(st.sampled_from(BITS), max_size=30).map("".join),
    cuts=CUTS,
)
@example(dialect=dialects.BARE_JSON, text='{"name": "get_weather"', cuts=[1])
def test_whatever_comes_every_split_reads_the_same_and_nothing_is_lost(
    dialect: Dialect, text: str, cuts: list[int]
) -> None:
    whole = read(Reader((dialect,), None, INDEX), [text])
    assert read(Reader((dialect,), None, INDEX), split(text, cuts)) == whole
    if not whole[2]:
        assert whole[0] == text


def test_a_call_in_a_thought_stays_a_thought() -> None:
    said = next(said for said in READ if said.name == "hermes")
    text = f"<think>{said.text}</think>fine"
    assert read(Reader((said.dialect,), THINK, INDEX), [text]) == ("fine", said.text, [])


def test_a_thought_without_end_is_a_thought() -> None:
    assert read(Reader((), THINK, {}), ["<thi", "nk>\nHm", "m"]) == ("", "Hmm", [])


def test_in_a_chat_told_of_tools_the_models_own_dialect_is_understood_too() -> None:
    for said in READ:
        if said.dialect.name not in ("bare-json",):
            reader = Reader(
                (dialects.HERMES, said.dialect, dialects.MARKLESS), said.thoughts, INDEX, thinking=said.opened
            )
            assert read(reader, said.text) == (said.content, said.thinking, said.calls), said.name
    for text in PROSE:
        assert read(Reader((dialects.HERMES, dialects.PARAMETERS, dialects.MARKLESS), None, INDEX), text)[2] == []


def test_text_comes_as_soon_as_it_can_be_no_mark() -> None:
    reader = Reader((dialects.HERMES,), THINK, INDEX)
    assert gathered(reader.feed("Hello"))[0] == "Hello"
    assert gathered(reader.feed(" wor"))[0] == " wor"
    assert gathered(reader.feed("<tool"))[0] == ""
    assert gathered(reader.feed("box>"))[0] == "<toolbox>"


def test_a_call_comes_when_it_is_whole_and_the_first_before_the_second() -> None:
    reader = Reader((dialects.HERMES,), None, INDEX)
    assert gathered(reader.feed('<tool_call>{"name": "now"}</tool_call')) == ("", "", [])
    assert gathered(reader.feed(">"))[2] == [("now", {})]
    assert gathered(reader.feed('<tool_call>{"name": "now"}</tool_call>'))[2] == [("now", {})]


def test_a_call_cut_off_for_want_of_tokens_is_dropped_and_one_the_model_ended_is_text() -> None:
    begun = '<tool_call>\n{"name": "get_weather", "arguments": {"ci'
    assert read(Reader((dialects.HERMES,), None, INDEX), ["So:\n", begun], cut=True) == ("So:", "", [])
    assert read(Reader((dialects.HERMES,), None, INDEX), ["So:\n", begun]) == (f"So:\n{begun}", "", [])


def test_only_one_call_where_no_more_are_wanted() -> None:
    reader = Reader((dialects.BRACKETED,), None, INDEX, several=False)
    said = next(said for said in READ if said.name == "bracketed list")
    assert read(reader, [said.text]) == ("", "", said.calls[:1])
    assert reader.done


def test_without_tools_nothing_is_a_call() -> None:
    said = next(said for said in READ if said.name == "hermes")
    assert read(Reader((dialects.HERMES,), THINK, {}), [said.text]) == (said.text, "", [])


def test_each_call_has_an_id_of_its_own() -> None:
    reader = Reader((dialects.LISTED,), None, INDEX)
    said = next(said for said in READ if said.name == "listed")
    identities = [call.id for piece in reader.feed(said.text) for call in piece.calls]
    assert len(set(identities)) == 2 and all(identity.startswith("call_") for identity in identities)


@pytest.mark.parametrize("dialect", all_dialects(), ids=lambda dialect: dialect.name)
def test_a_call_without_end_costs_bounded_time_and_memory_and_is_text_in_the_end(dialect: Dialect) -> None:
    mark = dialect.opens[0] if dialect.opens else ""
    text = mark + '\n{"name": "get_weather", "arguments": {"city": "' + "a" * LONGEST_CALL
    reader = Reader((dialect,), None, INDEX)
    began = time.process_time()
    parts = [text[at : at + 512] for at in range(0, len(text), 512)]
    content, _, calls = read(reader, parts)
    assert (content, calls) == (text, [])
    assert time.process_time() - began < 5


def test_a_token_costs_a_few_microseconds() -> None:
    words = (("Lorem ipsum dolor sit amet, <b>consectetur</b> elit. " * 20).split(" ")) * 20
    parts = [word + " " for word in words]
    reader = Reader((dialects.HERMES,), THINK, INDEX)
    began = time.process_time()
    read(reader, parts)
    assert (time.process_time() - began) / len(parts) < 50e-6


def test_arguments_are_typed_only_where_there_is_no_doubt() -> None:
    shape = {
        "properties": {
            "n": {"type": "integer"}, "x": {"type": ["number", "null"]}, "s": {"type": "string"},
            "o": {"type": "object"}, "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "any": {},
        }
    }  # fmt: skip
    given_ = {"n": "3", "x": "null", "s": 3, "o": '{"a": 1}', "either": "3", "any": "3", "more": "3"}
    assert schema.typed(given_, shape) == {
        "n": 3, "x": None, "s": "3", "o": {"a": 1}, "either": "3", "any": "3", "more": "3",
    }  # fmt: skip
    assert schema.typed({"n": "three", "o": "[1]"}, shape) == {"n": "three", "o": "[1]"}
    assert json.dumps(schema.typed({"n": "NaN"}, shape)) == '{"n": "NaN"}'
