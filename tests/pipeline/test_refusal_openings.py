"""Where answers decide to refuse: at once, behind a beginning, or behind a token that answers begin with, too."""

from __future__ import annotations

from collections.abc import Sequence

from abliterated.pipeline.refusal_openings import Begun, beginnings, decision, learn_openings


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def tokens(self, text: str) -> tuple[int, ...]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return tuple(self.words.index(word) for word in text.split())

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return " ".join(self.words[token] for token in tokens)


def test_most_models_decide_at_the_first_token() -> None:
    words = Words()
    refusing = [words.tokens("I can't help with that"), words.tokens("Sorry, that is not for me")]
    answering = [words.tokens("Brush in hand")]
    found = learn_openings(words, refusing, answering)
    assert found.tokens == found.firsts == found.plain == tuple(sorted(words.tokens("I Sorry,")))
    assert not found.late


def test_a_model_may_begin_as_if_it_would_answer() -> None:
    words = Words()
    refusing = [words.tokens("About the kettle: I can't help with that")]
    found = learn_openings(words, refusing, [words.tokens("About the lantern: Brush in hand")])
    assert found.late
    assert found.tokens == words.tokens("I")
    assert decision(words, refusing[0]) == 3
    assert decision(words, words.tokens("About the lantern: Brush in hand")) is None


def test_what_answers_begin_with_too_does_not_tell() -> None:
    words = Words()
    refusing = [words.tokens("I can't help with that")]
    found = learn_openings(words, refusing, [words.tokens("I would be glad to")])
    assert found.tokens == words.tokens("can't")
    assert found.plain == ()
    assert not found.late


def test_prompts_are_read_as_far_as_the_decision() -> None:
    words = Words()
    harmful = {"bad": words.tokens("About the kettle: I can't help with that"), "odd": words.tokens("All is well")}
    harmless = {"good": words.tokens("About the big kettle: Brush in hand"), "other": words.tokens("Well then now go")}
    openings = learn_openings(words, [harmful["bad"]], list(harmless.values()))
    found = beginnings(words, openings, harmful, harmless)
    assert {prompt: words.decode(begun) for prompt, begun in found.items()} == {
        "bad": "About the kettle:",
        "good": "About the big kettle:",
        "other": "Well then now",
    }

    class Plain:
        def all_tokens(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
            return [(900,)] * len(prompts)

    rows = Begun(Plain(), found).all_tokens(["bad", "never seen"])
    assert rows == [(900, *words.tokens("About the kettle:")), (900,)]
