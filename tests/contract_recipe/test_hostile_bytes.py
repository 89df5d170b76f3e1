"""A recipe is hostile until proven: whatever the bytes, the answer is a recipe or a RecipeError, and quickly."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from abliterate.contract.config import Config, parse_config
from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Recipe, parse_recipe, recipe_from_table, target_name
from abliterate.contract.toml_source import MAX_BYTES, line_of
from contract_recipe.design_examples import RECIPE

QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = [line.split("=")[0].strip() for line in RECIPE.splitlines() if "=" in line]
TABLES = ["prompts", "direction", "edit", "search", "evaluate", "export", "run", "schedule", "matrix"]


def only_a_recipe_error(data: bytes) -> None:
    try:
        recipe = parse_recipe(data, "r")
    except RecipeError as error:
        assert error.message
        assert error.remedy
    else:
        assert isinstance(recipe, Recipe)
        target_name(recipe)


@QUICK
@given(st.binary(max_size=400))
@example(b"\xff\xfe")
@example(b"\x00")
@example(b"model = '\\x1b'")
def test_any_bytes(data: bytes) -> None:
    only_a_recipe_error(data)


@QUICK
@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    only_a_recipe_error(text.encode("utf-8", "surrogatepass"))


@QUICK
@given(st.data())
def test_a_good_recipe_with_bytes_changed(data: st.DataObject) -> None:
    good = bytearray(RECIPE.encode())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(good) - 1))
        match data.draw(st.sampled_from(["set", "drop", "add", "cut"])):
            case "set":
                good[at] = data.draw(st.integers(0, 255))
            case "drop":
                del good[at : at + data.draw(st.integers(1, 20))]
            case "add":
                good[at:at] = data.draw(st.sampled_from([b"[", b'"', b"\n", b".", b"=", b"{", b"'''", b"\\", b"1e999"]))
            case _:
                del good[at + 1 :]
        if not good:
            break
    only_a_recipe_error(bytes(good))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "all", "ollama:x", "hf:a/b", "file", "adapter", "2-", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(st.dictionaries(st.sampled_from(KEYS + TABLES) | st.text(max_size=8), VALUES, max_size=6))
@example({"model": "ollama:x", "edit": {"layers": []}})
@example({"model": "ollama:x", "direction": {"layer": 10**400}})
@example({"model": "ollama:x", "direction": {"index": 10**400}})
@example({"model": "ollama:x", "matrix": {"": []}})
@example({"model": "\x00"})
@example({"model": "/"})
@example({"model": ".."})
@example({"model": "hf:a/.."})
def test_any_table(table: dict[str, object]) -> None:
    try:
        target_name(recipe_from_table(table))
    except RecipeError as error:
        assert error.message


@QUICK
@given(st.binary(max_size=300))
def test_a_configuration_of_any_bytes(data: bytes) -> None:
    try:
        assert isinstance(parse_config(data), Config)
    except RecipeError as error:
        assert error.message


@QUICK
@given(st.text(max_size=200), st.text(max_size=20))
def test_looking_for_a_line_never_fails(text: str, path: str) -> None:
    line = line_of(text, path)
    assert line is None or 1 <= line <= text.count("\n") + len(text) + 1


BOMBS = {
    "one long dotted key": b"a" + b".a" * 30_000 + b"=1",
    "a long dotted header": b"[" + b"a." * 30_000 + b"a]",
    "quoted parts": b'"a"' + b'."a"' * 15_000 + b"=1",
    "spaced parts": b"a" + b" . a" * 15_000 + b" = 1",
    "carriage returns between dotted keys": b"\r".join([b"a" + b".a" * 190 + b"=1"] * 300),
    "nested arrays": b"a=" + b"[" * 60_000,
    "nested tables": b"a=" + b"{a=" * 20_000,
    "nested inline keys": b"a=" + b"{a.a.a=" * 9_000,
    "a long number": b"a=" + b"9" * 60_000,
    "a long float": b"a=0." + b"9" * 60_000,
    "many headers": b"\n".join(b"[a%d.b.c.d]" % number for number in range(4500)),
    "many dotted headers": b"\n".join(b"[" + b"a." * 150 + b"a%d]" % number for number in range(200)),
    "many unknown keys": b"\n".join(b"a%d=1" % number for number in range(7000)),
    "unknown keys like known ones": b"\n".join(b"replace%d=1" % number for number in range(4000)),
    "a long string": b'model="' + b"a" * 60_000 + b'"',
    "a long name": b'model="ollama:' + b"a:" * 2000 + b'"',
    "a long hf name": b'model="hf:' + b"a." * 2000 + b'"',
    "backtracking layers": b'model="ollama:a"\n[edit]\nlayers="' + b"1" * 4000 + b'x"',
    "many arrays of tables": b"[[a]]\n" * 10_000,
    "a line of quotes": b'"' * 60_000,
    "spaces": b" " * 60_000 + b"=",
    "a header of spaces": b"[" + b" " * 60_000,
    "a key of spaces": b'"a"' + b" " * 60_000,
    "headers of spaces": (b"[" + b" " * 600 + b"\n") * 100,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly_and_without_much_memory(name: str) -> None:
    data = BOMBS[name][:MAX_BYTES]
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(RecipeError):
            parse_recipe(data, "r")
        spent, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spent < 3.0, f"{spent:.2f} s"  # tracing costs several times what the verdict does
    assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(RecipeError, match="too many"):
        parse_recipe(b"#" * (MAX_BYTES + 1))
    parse_recipe(b'model = "ollama:a"\n#' + b"x" * (MAX_BYTES - 21))


def test_bytes_that_are_no_utf_8_name_their_line() -> None:
    with pytest.raises(RecipeError, match="r, line 3: not UTF-8"):
        parse_recipe(b'model = "a"\n\n\xff', "r")
