"""Model names, as Ollama reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.errors import RecipeError
from abliterate.contract.names import SUFFIX, abliterated_name, name_from_stem, parse_name


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("qwen3", "registry.ollama.ai/library/qwen3:latest", "qwen3:latest"),
        ("qwen3:8b", "registry.ollama.ai/library/qwen3:8b", "qwen3:8b"),
        ("someone/Qwen3:8B", "registry.ollama.ai/someone/Qwen3:8B", "someone/Qwen3:8B"),
        ("hf.co/org/model:Q4_K_M", "hf.co/org/model:Q4_K_M", "hf.co/org/model:Q4_K_M"),
        ("localhost:5000/ns/m:t", "localhost:5000/ns/m:t", "localhost:5000/ns/m:t"),
        ("https://example.com/ns/m:t", "example.com/ns/m:t", "example.com/ns/m:t"),
    ],
)
def test_a_name_is_read_in_all_its_parts(text: str, full: str, short: str) -> None:
    assert parse_name(text).full() == full
    assert parse_name(text).short() == short
    assert parse_name(short).key() == parse_name(text).key()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":",
        "a:",
        "-a",
        ".a",
        "a b",
        "a:b c",
        "a/b/c/d",
        "n.s/m",
        "ä",
        "a" * 81,
        "a:" + "b" * 81,
        "a\n",
        "a\x1b",
    ],
)
def test_a_name_ollama_would_refuse_is_refused(text: str) -> None:
    if text == "a\n":
        assert parse_name(text).model == "a"  # surrounding space is trimmed
        return
    with pytest.raises(RecipeError) as caught:
        parse_name(text)
    assert caught.value.remedy


def test_the_suffix_goes_on_the_name_part_once() -> None:
    once = abliterated_name(parse_name("a/qwen3:8b"))
    assert once.short() == "a/qwen3-abliterated:8b"
    assert abliterated_name(once) == once


@given(st.text(max_size=120))
def test_any_stem_becomes_a_name_ollama_takes(stem: str) -> None:
    name = abliterated_name(name_from_stem(stem))
    assert parse_name(name.short()) == name
    assert name.model.endswith(SUFFIX)


@given(st.text(max_size=60))
def test_a_name_is_read_or_refused_and_reading_it_again_changes_nothing(text: str) -> None:
    try:
        name = parse_name(text)
    except RecipeError:
        return
    assert parse_name(name.full()) == name
    assert parse_name(abliterated_name(name).short()) == abliterated_name(name)
