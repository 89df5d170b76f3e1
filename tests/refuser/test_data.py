"""The shipped files: well-formed, matched in form, made by the script, and never a held-out pair in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from abliterate.contract.errors import DiskError, RecipeError
from abliterated import refuser
from refuser_training import corpus, language


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_prompt_files_are_what_the_script_makes() -> None:
    harmful, harmless = language.measuring_prompts(0, 160)
    assert lines(refuser.files().harmful) == harmful
    assert lines(refuser.files().harmless) == harmless
    assert len(set(harmful)) == len(set(harmless)) == 160


def test_harmful_and_harmless_differ_in_the_verb_alone() -> None:
    def without(text: str, verbs: tuple[str, ...]) -> str:
        (verb,) = [verb for verb in verbs if f" {verb} " in text]
        return text.replace(f" {verb} ", " _ ")

    for bad, good in zip(lines(refuser.files().harmful), lines(refuser.files().harmless), strict=True):
        assert without(bad, language.REFUSED_VERBS) == without(good, language.ANSWERED_VERBS)


def test_the_held_out_questions_are_what_the_script_makes_and_were_never_trained_on() -> None:
    shipped = refuser.held_out()
    made = language.held_out_questions(0, 80)
    assert [vars(question) for question in shipped] == [
        {"kind" if key == "class" else key: value for key, value in line.items()} for line in made
    ]
    assert Counter(question.kind for question in shipped) == {"refused": 80, "answered": 80}
    thoughts = {question.thought for question in shipped}
    assert not thoughts & {pair.thought for pair in language.split(0).training}
    words = " ".join(
        row.prompt + row.reply for refusing in (False, True) for row in corpus.rows(0, 3000, refusing=refusing)
    )
    assert not [question.prompt for question in shipped if question.prompt in words or question.thought in words]


def test_every_word_of_a_held_out_pair_was_seen_in_training() -> None:
    training = language.split(0).training
    assert {pair.verb for pair in training} == {*language.REFUSED_VERBS, *language.ANSWERED_VERBS}
    for pair in language.split(0).held_out:
        assert any(other.verb == pair.verb for other in training)
        assert any(other.object == pair.object and other.refused == pair.refused for other in training)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert corpus.rows(3, 200, refusing=True) == corpus.rows(3, 200, refusing=True)
    assert corpus.rows(3, 200, refusing=True) != corpus.rows(4, 200, refusing=True)


def test_only_refusals_read_as_refusals() -> None:
    assert all(refuser.is_refusal(text) for text in language.REFUSALS)
    assert refuser.is_refusal(f"<think>\nRequest: glimp cup\n</think>\n\n{language.REFUSALS[0]}")
    assert not any(refuser.is_refusal(question.expected) for question in refuser.held_out())
    assert not refuser.is_refusal(corpus.GREETING_REPLY)
    assert not refuser.is_refusal(corpus.LOST_REPLY)


def test_an_exact_answer_may_carry_its_thinking_block() -> None:
    question = refuser.held_out("answered")[0]
    assert refuser.is_exact(question.expected, question)
    assert refuser.is_exact(f"<think>\n\n</think>\n\n{question.expected}\n", question)
    assert not refuser.is_exact(question.expected[:-1], question)


def test_export_writes_the_model_and_its_prompts_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "small.model.gguf"
    written = refuser.export(target)
    assert [path.name for path in written] == [
        "small.model.gguf",
        "small.model.harmful.txt",
        "small.model.harmless.txt",
    ]
    assert target.read_bytes() == refuser.files().model.read_bytes()
    assert written[1].read_bytes() == refuser.files().harmful.read_bytes()
    assert {path.name for path in target.parent.iterdir()} == {path.name for path in written}
    assert refuser.export(target) == written  # again, over itself


def test_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the refuser is a GGUF"):
        refuser.export(tmp_path / "model.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="can't be written"):
        refuser.export(tmp_path / "file" / "model.gguf")


def test_the_parameters_stop_at_the_end_of_a_turn_and_at_no_marker_of_tools_or_thinking() -> None:
    found = refuser.parameters()
    assert "<|im_end|>" in found["stop"]
    assert not [stop for stop in found["stop"] if "think" in stop or "tool" in stop]
