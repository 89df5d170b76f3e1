"""The pieces of a chat that need no model: addresses, options, the calculator, the tools, the conversation."""

from __future__ import annotations

import contextlib
import json
import math
from argparse import Namespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abliterate.chat.address import find_address, parse_address
from abliterate.chat.calculator import NotArithmetic, calculate
from abliterate.chat.conversation import Conversation, command, is_command
from abliterate.chat.options import parse_options
from abliterate.chat.screen import printable, speed_text
from abliterate.chat.tools import TOOLS, call_tool
from abliterate.contract.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("example.com", "http://example.com:11434"),
        ("example.com:1", "http://example.com:1"),
        (":1234", "http://127.0.0.1:1234"),
        ("0.0.0.0:1", "http://127.0.0.1:1"),
        ("[::]:1", "http://[::1]:1"),
        ("[fe80::1]", "http://[fe80::1]:11434"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:8443/ollama/", "https://example.com:8443/ollama"),
        (' "example.com" ', "http://example.com:11434"),
    ],
)
def test_an_address_is_read_as_ollama_reads_it(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


def test_a_host_that_is_named_goes_before_the_environment_and_that_before_the_daemon() -> None:
    nowhere = Namespace(host="", config=None, socket=None)
    assert str(find_address(Namespace(**vars(nowhere) | {"host": "h:1"}), {"OLLAMA_HOST": "e:2"})) == "http://h:1"
    assert str(find_address(nowhere, {"OLLAMA_HOST": "e:2"})) == "http://e:2"


@pytest.mark.parametrize("text", ["x:99999", "x:port", "[::1"])
def test_no_address_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_address(text)


def test_options_get_the_types_an_engine_wants() -> None:
    assert parse_options(["num_ctx=4096", "temperature=0", "use_mmap=no", "stop=a", "stop=b=c"]) == {
        "num_ctx": 4096,
        "temperature": 0.0,
        "use_mmap": False,
        "stop": ["a", "b=c"],
    }


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_option_breaks_the_reader(key: str, value: str) -> None:
    for name in (key, "num_ctx", "temperature", "use_mmap"):
        with contextlib.suppress(RecipeError):
            json.dumps(parse_options([f"{name}={value}"]), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * (3 + 4) ** 2", 98),
        ("2^10", 1024),
        ("7 // 2 + 7 % 2", 4),
        ("-5 + abs(-3)", -2),
        ("sqrt(2) ** 2", 2.0000000000000004),
        ("12.5 / 100 * 1880", 235.0),
        ("2 ** -1", 0.5),
        ("round(pi, 2)", 3.14),
        ("log(8, 2)", 3.0),
        ("max(1, 2, 3)", 3),
        ("3 × 4 ÷ 2", 6.0),
    ],
)
def test_the_calculator_calculates(text: str, value: float) -> None:
    assert calculate(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "__import__('os')", "x", "().__class__", "9**9**9", "2**99999", "1e308*10", "1/0", "'a'*9", "[1]", "True",
        "lambda: 1", "1 if 1 else 2", "round(5, -10**9)", "(-1)**0.5", "sqrt(-1)", "9" * 600, "(" * 300 + ")" * 300,
        "-" * 400 + "1", "exp(99999)", "floor(1e308)**9", "print(1)", "log()", "min(1)", "1if 2else 3", "\x00", "0**-1",
    ],
)  # fmt: skip
def test_whatever_is_no_arithmetic_is_said_to_be_none(text: str) -> None:
    with pytest.raises(NotArithmetic):
        calculate(text)


@given(st.one_of(st.text(max_size=80), st.text("0123456789+-*/%().e^ ,sqrtlognd", max_size=80)))
@example("1if 2")
def test_the_calculator_gives_a_finite_number_or_says_no(text: str) -> None:
    try:
        assert math.isfinite(calculate(text)) or isinstance(calculate(text), int)
    except NotArithmetic as error:
        assert str(error)
    except OverflowError:
        pytest.fail("an int too large to be asked whether it is finite")


def ask_tool(name: str, arguments: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call_tool({"function": {"name": name, "arguments": arguments}})[2])
    return answer


def test_the_tools_answer_and_say_what_was_wrong() -> None:
    assert ask_tool("calculate", {"expression": "6*7"}) == {"result": 42}
    assert ask_tool("calculate", '{"expression": "6*7"}') == {"result": 42}
    assert ask_tool("calculate", {"expression": "1/0"}) == {"error": "a division by zero"}
    assert ask_tool("count_words", {"text": "one two"})["result"]["words"] == 2
    assert len(ask_tool("roll_dice", {"sides": 6, "count": 3})["result"]) == 3
    assert "T" in ask_tool("current_time", {})["result"]
    assert "no time zone" in ask_tool("current_time", {"timezone": "/etc/passwd"})["error"]
    assert "no tool 'rm'" in ask_tool("rm", {})["error"]
    assert "takes no 'x'" in ask_tool("calculate", {"x": 1})["error"]
    assert "needs 'expression'" in ask_tool("calculate", None)["error"]
    assert "1000 sides" in ask_tool("roll_dice", {"sides": 10**9})["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([tool.name for tool in TOOLS]), json_values)
def test_no_call_breaks_a_tool(name: str, arguments: Any) -> None:
    keys = next(tool for tool in TOOLS if tool.name == name).parameters
    for given_ in (arguments, dict.fromkeys(keys, arguments)):
        _, shown, answer = call_tool({"function": {"name": name, "arguments": given_}})
        assert shown.startswith(name)
        assert set(json.loads(answer)) <= {"result", "error"}


def test_a_conversation_is_asked_as_the_api_wants_it() -> None:
    talk = Conversation("m", system="s", options={"num_ctx": 1}, think="low", tools=True, keep_alive="5m")
    talk.ask("hi")
    talk.answered("", "why", [{"function": {"name": "calculate", "arguments": {}}}])
    talk.told("calculate", "{}")
    body = talk.request()
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert (body["think"], body["keep_alive"], body["options"]) == ("low", "5m", {"num_ctx": 1})
    assert {tool["function"]["name"] for tool in body["tools"]} == {tool.name for tool in TOOLS}
    talk.take_back()
    assert talk.messages == []


def test_a_slash_begins_a_command_and_a_path_does_not() -> None:
    assert is_command("/clear")
    assert is_command("/?")
    assert not is_command("/usr/bin is what?")
    assert not is_command("what is /clear?")
    assert not is_command("  ")


@given(st.text(max_size=40))
def test_no_command_breaks_the_conversation(text: str) -> None:
    for line in (f"/{text}", f"/set {text}", f"/set parameter {text}", f"/set system {text}"):
        if is_command(line):
            try:
                command(Conversation("m"), line)
            except RecipeError as error:
                assert error.remedy


def test_signs_that_belong_together_stay_together_and_orders_are_spelt_out() -> None:
    assert printable("a\u00a0b\n👩\u200d🚀\t") == "a\u00a0b\n👩\u200d🚀\t"
    assert printable("\x1b[2J\u202e\r\x9b") == "\\x1b[2J\\u202e\\x0d\\x9b"


def test_speed_is_told_as_far_as_it_is_known() -> None:
    numbers = {"prompt_eval_count": 10, "eval_count": 50, "eval_duration": 500_000_000, "load_duration": 2_000_000_000}
    assert speed_text(numbers) == "prompt 10 tokens · answer 50 tokens, 100.0/s · loaded in 2.0 s"
    assert speed_text({"eval_count": "x"}) == ""
