"""Evaluates any model by itself, or against another: from its files, or through the API of the engine that serves it.

From files everything is told that a run tells. Through the API: what it answers, and, where the engine gives log
probabilities, how far the first token's likeliest ones stray. Does not know the command line, nor recipes' jobs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from abliterate.contract.recipe import Evaluate, Run
from abliterate.contract.report import Suite
from abliterated.pipeline.asking import fewer_asked
from abliterated.pipeline.evaluate import Answers, Asked, ask
from abliterated.pipeline.evaluation import Verdicts, by_wording, closeness, rates, suite_figures
from abliterated.pipeline.judge import judge_or_wording
from abliterated.pipeline.loading import Loaded, load
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.provenance import COVERAGE, RESIDUAL
from abliterated.pipeline.refusals import normalise
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

if TYPE_CHECKING:
    from abliterated.pipeline.served import Served

FIRST_TOKENS: Final = 20  # the most an Ollama tells
OTHER_TOKENS: Final = "no KL: the two models cut text into other tokens, so that nothing can be compared token by token"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: its files, or, without, the engine that serves it."""

    name: str
    source: Source | None
    served: Served | None = None


@dataclass(frozen=True)
class Evaluated:
    """One model's figures and its answers. `first`: log probabilities of its first tokens, by harmless prompt, where
    only an engine's API was asked."""

    figures: dict[str, Any]
    answers: Answers
    verdicts: Verdicts
    first: tuple[Mapping[str, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """What is asked, and how. `markers`: openings that count as refusals too; `judge`: who reads the answers."""

    asked: Asked
    evaluate: Evaluate
    run: Run = field(default_factory=Run)
    system: str = ""
    markers: tuple[str, ...] = ()
    judge: Served | None = None


def all_prompts(prompts: PromptSets, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """At most `count` of each class, those first that a run of the same recipe would not have measured."""
    every = [
        (*split.held_out, *split.validation, *split.training)[:count] for split in (prompts.harmful, prompts.harmless)
    ]
    return every[0], every[1]


def evaluate_model(
    subject: Subject, questions: Questions, watch: Watch, original: Evaluated | None = None
) -> Evaluated:
    """Ask one model; with an `original`, also how far it strays from it."""
    watch.seconds.clear()
    first: tuple[Mapping[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    with watch.stage("evaluate"):
        if subject.source is not None:
            answers, notes = _from_files(subject.source, questions, watch, original.answers if original else None)
        else:
            answers, first = _through_api(subject, questions, watch)
        verdicts = _verdicts(answers, questions.markers)
        if questions.judge:
            verdicts, more = _judged(questions.judge, questions.asked, answers, watch)
            notes += more
    figures = _figures(subject, questions.asked, answers, verdicts)
    figures["seconds"] = watch.seconds["evaluate"]
    few = fewer_asked(questions.asked, questions.evaluate.prompts, "the sets hold no more")
    return Evaluated(figures, answers, verdicts, first, (*few, *notes))


def against(one: Evaluated, original: Evaluated) -> tuple[dict[str, float], list[str]]:
    """What the model is beside the original, and what could not be told."""
    same = [old == new for old, new in zip(original.answers.harmless, one.answers.harmless, strict=True)]
    figures: dict[str, float] = {"harmless_exact": sum(same) / max(1, len(same))} if same else {}
    figures |= closeness(original.answers, one.answers)
    notes = []
    if "kl_mean" not in figures and same:
        pairs = [(old, new) for old, new in zip(original.first, one.first, strict=False) if old and new]
        if pairs:
            figures["kl_first_likeliest"] = sum(_first_kl(old, new) for old, new in pairs) / len(pairs)
            notes.append(
                f"KL over {FIRST_TOKENS} likeliest first tokens alone: the engine's API tells no more. "
                "Give files to have it over whole answers"
            )
        elif OTHER_TOKENS not in one.notes:
            notes.append("no KL: the engine tells no log probabilities of both; give files to have it")
    return {name: round(value, 7) for name, value in figures.items()}, notes


def suites(questions: Questions, one: Evaluated, original: Evaluated | None) -> list[Suite]:
    """The probes' counts: as before and after where there are two models."""
    before = original.answers if original else one.answers
    return suite_figures(questions.asked.suites, before, one.answers if original else None)


def _from_files(
    source: Source, questions: Questions, watch: Watch, original: Answers | None
) -> tuple[Answers, tuple[str, ...]]:
    loaded = load(source, questions.run, watch)
    rendering = renderer(loaded.tokenizer, source.context, questions.system)
    notes: tuple[str, ...] = ()
    if original and original.expected and not _same_tokens(loaded, original):
        original, notes = None, (OTHER_TOKENS,)
    try:
        return ask(loaded, rendering, questions.asked, questions.evaluate, watch, source.name, original), notes
    finally:
        del loaded, rendering
        gc.collect()


def _same_tokens(loaded: Loaded, original: Answers) -> bool:
    """Whether what the original answered, token by token, says the same in this model's tokens."""
    assert original.expected is not None
    begun = original.expected.answers
    if max((max(answer, default=0) for answer in begun), default=0) >= loaded.model.config.get_text_config().vocab_size:
        return False
    read = [loaded.tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd") for answer in begun]
    alike = sum(whole.startswith(text) for whole, text in zip(original.harmless, read, strict=True))
    return 2 * alike > len(begun)  # a tokenizer that tidies up may do so otherwise where an answer is cut


def _through_api(
    subject: Subject, questions: Questions, watch: Watch
) -> tuple[Answers, tuple[Mapping[str, float], ...]]:
    """Every prompt, one after the other: an engine has no batches to offer."""
    assert subject.served is not None
    asked, system = questions.asked, questions.system
    head = [{"role": "system", "content": system}] if system else []
    plain = [[*head, {"role": "user", "content": prompt}] for prompt in (*asked.harmful, *asked.harmless)]
    conversations: list[Sequence[Mapping[str, str]]] = [*plain]
    conversations += [probe.messages for some in asked.suites.values() for probe in some]
    cut, end = len(asked.harmful), len(plain)
    texts, first, tokens = [], [], 0
    for number, messages in enumerate(conversations):
        watch.step(number, len(conversations), "answers", f"asking {subject.name}")
        wanted = FIRST_TOKENS if cut <= number < end else 0
        reply = subject.served.chat(messages, questions.evaluate.tokens, logs=wanted)
        texts.append(reply.text)
        tokens += reply.tokens
        if wanted:
            first.append(reply.first)
    told, place = {}, end
    for name, some in asked.suites.items():
        told[name] = tuple(texts[place : place + len(some)])
        place += len(some)
    return Answers(tuple(texts[:cut]), tuple(texts[cut:end]), tokens, told), tuple(first)


def _verdicts(answers: Answers, markers: Sequence[str]) -> Verdicts:
    found = by_wording(answers)
    if not markers:
        return found
    wanted = tuple(normalise(marker).casefold() for marker in markers)

    def marked(text: str) -> bool:
        return normalise(text).casefold().startswith(wanted)

    both = [
        tuple("refusal" if marked(text) else one for text, one in zip(texts, verdicts, strict=True))
        for texts, verdicts in ((answers.harmful, found.harmful), (answers.harmless, found.harmless))
    ]
    return Verdicts(*both)


def _judged(judge: Served, asked: Asked, answers: Answers, watch: Watch) -> tuple[Verdicts, tuple[str, ...]]:
    found, notes = [], []
    done, total = 0, len(asked.harmful) + len(asked.harmless)
    for prompts, texts in ((asked.harmful, answers.harmful), (asked.harmless, answers.harmless)):

        def step(number: int, behind: int = done) -> None:
            watch.step(behind + number, total, "answers", "asking the judge")

        one = judge_or_wording(judge, prompts, texts, step)
        found.append(one.verdicts)
        done += len(prompts)
        notes += [note for note in one.notes if note not in notes]
    return Verdicts(*found), tuple(notes)


def _figures(subject: Subject, asked: Asked, answers: Answers, verdicts: Verdicts) -> dict[str, Any]:
    """ollama-forge's keys first, then ours."""
    told = {f"{key}{end}": round(value, 4) for (key, end), value in rates(verdicts).items()}
    refused = verdicts.harmful.count("refusal")
    figures: dict[str, Any] = {
        "model": subject.name,
        "refusal_count": refused,
        "total": len(asked.harmful),
        "refusal_rate": told.pop("refusal"),
        "false_refusal_count": verdicts.harmless.count("refusal"),
        "harmless_total": len(asked.harmless),
        "via": "files" if subject.source else "api",
        "tokens_decoded": answers.tokens,
        **told,
    }
    if subject.source is not None and subject.source.kind == "gguf":
        from abliterated.pipeline.gguf_file import read_gguf

        values = read_gguf(subject.source.path).values
        made = {"coverage": values.get(COVERAGE), "residual": values.get(RESIDUAL)}
        figures |= {name: round(float(value), 6) for name, value in made.items() if isinstance(value, int | float)}
    return figures


def _first_kl(old: Mapping[str, float], new: Mapping[str, float]) -> float:
    """KL over the tokens both list, and everything else as one: a lower bound."""
    both = [token for token in old if token in new]
    rest = [max(1e-9, 1 - sum(math.exp(told[token]) for token in both)) for told in (old, new)]
    parts = sum(math.exp(old[token]) * (old[token] - new[token]) for token in both)
    return max(0.0, parts + rest[0] * math.log(rest[0] / rest[1]))
