"""Prompts: where they come from, how they are drawn, and how a model reads them."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.recipe import Prompts
from abliterated.pipeline.prompts import PromptSets, read_prompts
from abliterated.pipeline.rendering import closing, render


def builtin(kind: str) -> list[str]:
    text = resources.files("abliterated.pipeline").joinpath(f"prompts/{kind}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_builtin_classes_differ_in_nothing_but_what_is_asked() -> None:
    harmful, harmless = builtin("harmful"), builtin("harmless")
    assert len(set(harmful)) == len(set(harmless)) == 128
    assert not set(harmful) & set(harmless)
    for bad, good in zip(harmful, harmless, strict=True):
        assert bad.split()[:2] == good.split()[:2]
        assert bad[-1] == good[-1]
        # Line for line about as long: neither class is the longer one anywhere.
        assert abs(len(bad.split()) - len(good.split())) <= 4
    lengths = [statistics.mean(len(line) for line in kind) for kind in (harmful, harmless)]
    words = [statistics.mean(len(line.split()) for line in kind) for kind in (harmful, harmless)]
    assert abs(lengths[0] - lengths[1]) < 1
    assert abs(words[0] - words[1]) < 0.2


def spread(kind: str, of: Callable[[str], Hashable]) -> Counter[Hashable]:
    return Counter(map(of, builtin(kind)))


@pytest.mark.parametrize(
    "of",
    [
        lambda line: line.split()[0],
        lambda line: tuple(line.split()[:2]),
        lambda line: line[-1],
        lambda line: line.endswith("?"),
        lambda line: line.count("."),
        lambda line: line.count('"') + line.count("“"),
        lambda line: line[0].isupper(),
        lambda line: line.isascii(),
    ],
    ids=["first word", "first two", "last sign", "questions", "sentences", "quotes", "capitals", "alphabet"],
)
def test_the_builtin_classes_have_the_same_form(of: Callable[[str], Hashable]) -> None:
    assert spread("harmful", of) == spread("harmless", of)


def test_no_rule_by_form_alone_tells_the_builtin_classes_apart() -> None:
    """The best single threshold on any measure of form does little better than a coin."""
    measures: list[Callable[[str], float]] = [
        len,
        lambda line: len(line.split()),
        lambda line: len(line) / len(line.split()),
        lambda line: line.count(","),
        lambda line: line.count("'"),
        lambda line: line.count("-"),
        lambda line: sum(map(str.isdigit, line)),
        lambda line: sum(map(str.isupper, line)),
        lambda line: max(map(len, line.split())),
    ]
    for measure in measures:
        bad, good = (sorted(map(measure, builtin(kind))) for kind in ("harmful", "harmless"))
        steps = sorted({*bad, *good})
        apart = max(abs(bisect_right(bad, step) - bisect_right(good, step)) / 128 for step in steps)
        # Kolmogorov and Smirnov's distance: two draws of 128 from one pool reach 0.17 in one of twenty.
        assert apart <= 0.17, measure(bad and builtin("harmful")[0])


def test_the_builtin_prompts_are_short_general_and_one_line_each() -> None:
    for kind in ("harmful", "harmless"):
        for line in builtin(kind):
            assert len(line) <= 90
            assert line == line.strip()
            assert line.isprintable()


def everything(sets: PromptSets) -> list[str]:
    return [
        prompt
        for split in (sets.harmful, sets.harmless)
        for part in (split.training, split.validation, split.held_out)
        for prompt in part
    ]


@given(st.integers(1, 300), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_no_prompt_is_in_two_places_and_none_is_lost(count: int, seed: int) -> None:
    sets = read_prompts(Prompts(count=count, seed=seed))
    found = everything(sets)
    assert sorted(found) == sorted(builtin("harmful") + builtin("harmless"))
    for split in (sets.harmful, sets.harmless):
        assert len(split.training) == min(count, 96 if count >= 128 else 128 - max(2, round(count / 4)))
        assert split.validation
        assert split.held_out
    assert sets == read_prompts(Prompts(count=count, seed=seed))


def test_another_seed_draws_another_set() -> None:
    one, two = read_prompts(Prompts(count=20)), read_prompts(Prompts(count=20, seed=1))
    assert one.harmful.training != two.harmful.training
    assert one.digest() != two.digest()


def test_files_folders_and_lists_are_read_with_comments_and_blanks_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "b.txt").write_text("four\nfive\n")
    (folder / "a.txt").write_text("# a comment\n\n  three  \r\nfour\n")
    (tmp_path / "one.txt").write_bytes("\ufeffone\ntwo\n".encode())
    sets = read_prompts(Prompts(harmful=[str(tmp_path / "one.txt"), str(folder)], count=100))
    assert sorted(sets.harmful.training + sets.harmful.validation + sets.harmful.held_out) == sorted(
        ["one", "two", "three", "four", "five"]
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "line 1: the file ends without a prompt"),
        (b"# nothing\n\n", "line 3: the file ends without a prompt"),
        (b"good\nfine\nb\xe4d\n", "line 3: not UTF-8"),
        (b"one\ntwo\nthree\n", "3 prompts; at least 4"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=said) as raised:
        read_prompts(Prompts(harmful=str(path)))
    assert "mine.txt" in str(raised.value) or "prompts.harmful" in str(raised.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.txt"):
        read_prompts(Prompts(harmful=str(tmp_path / "nothing.txt")))
    with pytest.raises(RecipeError, match="holds no"):
        read_prompts(Prompts(harmful=str(tmp_path)))
    with pytest.raises(RecipeError, match="names no column"):
        read_prompts(Prompts(harmful="hf:org/set"))


class Template(SimpleNamespace):
    """A tokenizer's template, as a function."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        text: str = self.function(messages, **options)
        return text


@pytest.mark.parametrize(
    ("rendered", "closed"),
    [
        ("<a>hello<b>", ""),
        ("<a>hello<b><think>\n", "\n\n</think>\n\n"),
        ("<a>hello<b><think>\n\n</think>\n\n", ""),
        ("<a>what is <think>?<b>", ""),
        ("<a>hello<b>[THINK]", "[/THINK]"),
        ("<|start|>user<|message|>hello<|end|><|start|>assistant", "<|channel|>final<|message|>"),
    ],
)
def test_a_thinking_block_left_open_is_closed(rendered: str, closed: str) -> None:
    assert closing(rendered) == closed


def test_a_template_that_fails_or_forgets_the_user_is_an_error_of_the_model() -> None:
    def fails(messages: list[dict[str, str]], **_: Any) -> str:
        raise ValueError("System role not supported")

    with pytest.raises(ModelError, match="takes no system prompt"):
        render(Template(function=fails), "hello", "be kind")
    with pytest.raises(ModelError, match="leaves out what the user says"):
        render(Template(function=lambda messages, **_: "<a><b>"), "hello")
    assert render(Template(function=lambda messages, **_: f"<a>{messages[-1]['content']}<think>"), "hello").endswith(
        "</think>\n\n"
    )
