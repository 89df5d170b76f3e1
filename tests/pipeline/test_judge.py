"""A judge: what it is asked, what its word means, and what happens when it talks nonsense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.errors import EngineUnavailable
from abliterated.pipeline.judge import (
    LONGEST,
    TRIES,
    JudgeUseless,
    judge,
    judge_or_wording,
    parse,
    question,
)
from abliterated.pipeline.served import Reply

PROMPTS = [f"question {number}" for number in range(12)]
ANSWERS = ["Take a lock and turn it."] * 11 + ["I can't help with that."]


@dataclass
class Scripted:
    """Says what it was told to say, and remembers what it was asked."""

    says: Callable[[str, int], str]
    model: str = "judge:latest"
    asked: list[list[dict[str, str]]] = field(default_factory=list)

    def chat(self, messages: Sequence[dict[str, str]], tokens: int, *, seed: int = 0) -> Reply:
        self.asked.append(list(messages))
        return Reply(self.says(messages[-1]["content"], seed), 1, {})


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        ("REFUSAL", "refusal"),
        ("refusal.", "refusal"),
        ("**ANSWER**", "answer"),
        ("The assistant refuses to help: REFUSAL", "refusal"),
        ("<think>is it a refusal or an answer?</think>\nANSWER", "answer"),
        ("It complies.", "answer"),
        ("REFUSAL or ANSWER", None),
        ("", None),
        ("I can't judge that.", None),
        ("Banana", None),
    ],
)
def test_a_word_means_what_it_says_and_nothing_else(reply: str, meant: str | None) -> None:
    assert parse(reply) == meant


@given(st.text(), st.text())
def test_an_answer_can_not_end_its_own_quotation(prompt: str, answer: str) -> None:
    messages = question("a wish", answer)
    text = messages[1]["content"]
    assert text.count("```") == 4
    assert len(text) < LONGEST + 200
    assert messages[0]["role"] == "system"
    assert isinstance(parse(prompt), str | None)


def test_the_judges_word_counts_against_the_wording() -> None:
    # It calls every answer a refusal, whatever it opens with.
    found = judge(Scripted(lambda text, seed: "REFUSAL"), PROMPTS, ANSWERS)
    assert found.verdicts == ("refusal",) * 12
    assert (found.nonsense, found.replies) == (0, 12)


def test_what_needs_no_judge_is_not_asked() -> None:
    asks = Scripted(lambda text, seed: "ANSWER")
    found = judge(asks, PROMPTS[:3], ["", "ha ha ha " * 30, "Take a lock."])
    assert found.verdicts == ("empty", "degenerate", "answer")
    assert len(asks.asked) == 1


def test_a_judge_is_asked_again_when_it_mumbles_and_more_plainly() -> None:
    asks = Scripted(lambda text, seed: "hm" if seed < TRIES - 1 else "ANSWER")
    found = judge(asks, PROMPTS[:1], ANSWERS[:1])
    assert found.verdicts == ("answer",)
    assert (found.nonsense, found.replies) == (TRIES - 1, TRIES)
    assert "Only one word" not in asks.asked[0][1]["content"]
    assert "Only one word" in asks.asked[1][1]["content"]


def test_where_it_says_nothing_of_one_answer_the_wording_decides_and_a_note_says_so() -> None:
    asks = Scripted(lambda text, seed: "?" if "question 11" in text else "ANSWER")
    found = judge(asks, PROMPTS, ANSWERS)
    assert found.verdicts == ("answer",) * 11 + ("refusal",)
    assert found.nonsense == TRIES
    assert "of 1 answers the judge judge:latest said nothing usable" in found.notes[0]


def test_a_judge_that_talks_nonsense_is_dismissed_early_and_said_to_be() -> None:
    asks = Scripted(lambda text, seed: "Lovely weather.")
    with pytest.raises(JudgeUseless, match="said neither REFUSAL nor ANSWER of 8 of 8 answers"):
        judge(asks, PROMPTS, ANSWERS)
    assert len(asks.asked) == 8 * TRIES  # bounded, however many answers there are
    found = judge_or_wording(asks, PROMPTS, ANSWERS)
    assert found.verdicts == ("answer",) * 11 + ("refusal",)
    assert "told by their wording" in found.notes[0]


@contextmanager
def away() -> Iterator[Scripted]:
    def says(text: str, seed: int) -> str:
        raise EngineUnavailable("the engine at http://127.0.0.1:1 does not answer")

    yield Scripted(says)


def test_a_judge_that_goes_away_leaves_the_wording() -> None:
    with away() as asks:
        found = judge_or_wording(asks, PROMPTS, ANSWERS)
    assert found.verdicts.count("refusal") == 1
    assert "does not answer" in found.notes[0]
