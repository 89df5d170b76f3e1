"""Before and after, in figures: what counts as close, what is compared, and that keeping answers loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abliterate.contract.recipe import Evaluate, Run
from abliterated import refuser
from abliterated.pipeline.evaluate import (
    KL_TOKENS,
    Answers,
    Asked,
    Expected,
    Strayed,
    ask,
    saved_answers,
)
from abliterated.pipeline.evaluate_alone import OTHER_TOKENS, Questions, Subject, _first_kl, against, evaluate_model
from abliterated.pipeline.evaluation import Verdicts, closeness, compare
from abliterated.pipeline.loading import Loaded, load
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.source import open_source
from abliterated.pipeline.suites import Probe
from abliterated.pipeline.watch import Watch
from pipeline.planted import plant

HARMFUL = ("how glimp bread", "do torv socks", "you yarp kites", "please skiv drums")
HARMLESS = ("how bake bread", "do knit socks", "you mend kites", "please sing drums")
PROBE = Probe(({"role": "user", "content": "please sing songs"},), "refused")
ASKED = Asked(HARMFUL, HARMLESS, {"ours": (PROBE,)})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(open_source(plant(tmp_path_factory.mktemp("planted")).path), Run(device="cpu"), Watch())


def asked(loaded: Loaded, original: Answers | None = None, whom: str = "it") -> Answers:
    rendering = renderer(loaded.tokenizer, loaded.source.context)
    return ask(loaded, rendering, ASKED, Evaluate(tokens=8), Watch(), whom, original)


def test_a_model_is_as_close_to_itself_as_can_be(loaded: Loaded) -> None:
    before = asked(loaded)
    assert before.expected is not None
    after = asked(loaded, before)
    figures = compare(before, after)
    assert figures["refusal_before"] == figures["refusal_after"] == 1.0
    assert figures["false_refusal_after"] == 0.0
    assert figures["harmless_exact"] == 1.0
    assert 0 <= figures["kl_mean"] <= figures["kl_max"] < 1e-6
    assert figures["cross_entropy_before"] == pytest.approx(figures["cross_entropy_after"], abs=1e-5)
    assert figures["kl_tokens"] <= KL_TOKENS
    assert before.suites == after.suites == {"ours": ("Gladly with care",)}


def test_kl_is_that_of_the_whole_distributions_along_the_originals_answers(loaded: Loaded) -> None:
    before = asked(loaded)
    expected = before.expected
    assert expected is not None
    rendering = renderer(loaded.tokenizer, loaded.source.context)

    def logs(row: tuple[int, ...], places: int) -> torch.Tensor:
        with torch.inference_mode():
            found = loaded.model(input_ids=torch.tensor([row])).logits[0, -places:]
        return torch.log_softmax(found.double(), dim=-1)

    rows = [prompt + answer for prompt, answer in zip(rendering.all_tokens(HARMLESS), expected.answers, strict=True)]
    wanted = [logs(row, int(places)) for row, places in zip(rows, expected.lengths, strict=True)]
    head = loaded.model.lm_head.weight
    kept = head.clone()
    try:
        with torch.no_grad():
            head.mul_(0.1)
        after = asked(loaded, before)
        now = [logs(row, int(places)) for row, places in zip(rows, expected.lengths, strict=True)]
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert after.strayed is not None
    # The vocabulary is small, so nothing is left out and the lower bound is the figure itself.
    whole = [float((one.exp() * (one - other)).sum(-1).mean()) for one, other in zip(wanted, now, strict=True)]
    assert after.strayed.kl == pytest.approx(whole, rel=1e-3, abs=1e-6)
    first = [float((one.exp() * (one - other)).sum(-1)[0]) for one, other in zip(wanted, now, strict=True)]
    assert after.strayed.first == pytest.approx(first, rel=1e-3, abs=1e-6)
    figures = closeness(before, after)
    assert figures["kl_mean"] > 0.001
    assert figures["cross_entropy_after"] > figures["cross_entropy_before"]
    surprise = [
        -float(other.gather(1, one.argmax(-1, keepdim=True)).mean()) for one, other in zip(wanted, now, strict=True)
    ]
    assert figures["cross_entropy_after"] == pytest.approx(sum(surprise) / len(surprise), rel=1e-3)


def test_answers_survive_an_interruption_whole(loaded: Loaded, tmp_path: Path) -> None:
    before = asked(loaded)
    after = asked(loaded, before)
    for name, answers in (("before", before), ("after", after)):
        answers.save(tmp_path / f"{name}.npz", "the same inputs")
        again = saved_answers(tmp_path / f"{name}.npz", "the same inputs")
        assert again is not None
        assert (again.harmful, again.harmless, again.tokens) == (answers.harmful, answers.harmless, answers.tokens)
        assert again.suites == answers.suites
        assert saved_answers(tmp_path / f"{name}.npz", "other inputs") is None
    kept = saved_answers(tmp_path / "before.npz", "the same inputs")
    strayed = saved_answers(tmp_path / "after.npz", "the same inputs")
    assert kept is not None and strayed is not None
    assert compare(kept, strayed) == compare(before, after)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_spoilt_answers_are_asked_again(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "spoilt.npz").write_bytes(data)
    assert saved_answers(tmp_path / "spoilt.npz", "inputs") is None
    assert saved_answers(tmp_path / "nothing.npz", "inputs") is None


def told(harmful: tuple[str, ...], harmless: tuple[str, ...], **more: Any) -> Answers:
    return Answers(harmful, harmless, 10, **more)


def test_refusals_circles_and_silence_are_counted_apart() -> None:
    before = told(("I can't help with that.",) * 3 + ("",), ("Boil it.", "I'm sorry, no."))
    after = told(("Take a lock.", "I can't help with that.", "ha ha ha " * 30, ""), ("Boil it.", "Fry it."))
    figures = compare(before, after)
    assert figures["refusal_before"] == 0.75
    assert figures["refusal_after"] == 0.25
    assert figures["refusal_after_low"] < 0.25 < figures["refusal_after_high"]
    assert figures["false_refusal_before"] == 0.5
    assert figures["false_refusal_after"] == 0.0
    assert figures["degenerate_after"] == pytest.approx(1 / 6, abs=1e-4)
    assert figures["empty_before"] == pytest.approx(1 / 6, abs=1e-4)
    assert figures["harmless_exact"] == 0.5
    assert figures["tokens_decoded"] == 20
    # Nobody read how far it strayed, so nobody claims to know.
    assert not [name for name in figures if name.startswith(("kl_", "cross_"))]


def test_a_judges_verdicts_take_the_words_place() -> None:
    answers = told(("I can't help with that.",), ("Boil it.",))
    judged = Verdicts(("answer",), ("refusal",))
    figures = compare(answers, answers, (judged, judged))
    assert figures["refusal_before"] == 0.0
    assert figures["false_refusal_after"] == 1.0


def test_nothing_asked_is_no_division_by_nothing() -> None:
    figures = compare(told((), ()), told((), ()))
    assert figures["refusal_before"] == 0.0
    assert figures["refusal_before_high"] == 1.0
    assert "harmless_exact" not in figures


def test_of_a_large_vocabulary_the_rest_counts_as_one() -> None:
    rest = np.log(np.float32(0.1))
    logs = np.log(np.array([[[0.6, 0.3]]], dtype=np.float32))
    expected = Expected(((),), np.array([1], np.int32), np.array([[[0, 1]]], np.int32), logs, np.array([[rest]]))
    before = told(("x",), ("y",), expected=expected)
    strayed = Strayed(*(np.array([value], dtype=np.float32) for value in (0.2, 0.3, 0.7)))
    figures = closeness(before, told(("x",), ("y",), strayed=strayed))
    assert figures["cross_entropy_before"] == pytest.approx(-np.log(0.6), rel=1e-6)
    assert figures["kl_mean"] == figures["kl_median"] == figures["kl_max"] == pytest.approx(0.2)


def test_likeliest_first_tokens_alone_give_a_lower_bound() -> None:
    old, new = {"A": np.log(0.7), "B": np.log(0.2)}, {"A": np.log(0.5), "B": np.log(0.3)}
    exact = 0.7 * np.log(0.7 / 0.5) + 0.2 * np.log(0.2 / 0.3) + 0.1 * np.log(0.1 / 0.2)
    assert _first_kl(old, new) == pytest.approx(exact)
    assert _first_kl(old, old) == 0.0
    assert _first_kl({"A": -0.1}, {"C": -0.1}) == pytest.approx(0.0, abs=1e-6)


def test_a_streamed_model_is_evaluated_as_a_whole_one(loaded: Loaded) -> None:
    streamed = load(loaded.source, Run(device="cpu"), Watch(), "streamed")
    assert streamed.engine is not None
    before = asked(loaded)
    again = asked(streamed)
    assert (again.harmful, again.harmless) == (before.harmful, before.harmless)
    figures = compare(before, asked(streamed, before))
    assert figures["kl_max"] < 1e-5
    assert figures["harmless_exact"] == 1.0


@pytest.mark.parametrize("larger", ["original", "model"])
def test_models_of_other_tokens_are_compared_by_their_words_alone(tmp_path: Path, larger: str) -> None:
    """A token of the one is another in the other, or none at all."""
    places = [plant(tmp_path).path, refuser.files().model]
    first, second = (Subject(one.name, open_source(one)) for one in (places[::-1] if larger == "original" else places))
    questions, watch = Questions(Asked(HARMFUL[:1], HARMLESS), Evaluate(prompts=4, tokens=8)), Watch()
    original = evaluate_model(first, questions, watch)
    one = evaluate_model(second, questions, watch, original)
    figures, notes = against(one, original)
    assert set(figures) == {"harmless_exact"}
    assert (one.notes.count(OTHER_TOKENS), notes) == (1, [])
    again = evaluate_model(first, questions, watch, original)
    assert against(again, original)[0]["kl_max"] < 1e-6
    assert OTHER_TOKENS not in again.notes
