"""What a run asks of what it made: the questions the original answered, a judge's word where one is named, and the
figures of both.

Does not know how the product came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.contract.errors import ModelError
from abliterate.contract.messages import Task
from abliterate.contract.recipe import Recipe
from abliterate.contract.report import Suite
from abliterated.pipeline.kept import inputs_digest
from abliterated.pipeline.product import Product
from abliterated.pipeline.served import Served, engine_url
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

if TYPE_CHECKING:
    from abliterated.pipeline.evaluate import Answers, Asked
    from abliterated.pipeline.evaluation import Verdicts
    from abliterated.pipeline.session import Session

FEW = "there are no more that were not measured; name more prompts, or a smaller prompts.count, to have more"


@dataclass(frozen=True)
class Told:
    """What asking before and after told."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    suites: tuple[Suite, ...] = ()


def check_asking(task: Task) -> None:
    """What would fail at the end fails now: a judge nobody serves, a suite that is none. Raises NotFound,
    EngineUnavailable, RecipeError."""
    from abliterated.pipeline.suites import read_suites

    read_suites(task.recipe.evaluate.suites)
    if task.recipe.evaluate.judge:
        _judge(task).check()


def ask_again(task: Task, source: Source, session: Session, before: Answers, product: Product) -> Told:
    """Ask the product what the original was asked: now, or in an earlier attempt at the same."""
    from abliterated.pipeline.evaluate import compare, kept_answers, saved_answers
    from abliterated.pipeline.evaluation import suite_figures

    recipe, saved, notes = task.recipe, Path(task.work) / "after.npz", []
    content = product.edited.content if product.edited else ""
    facts = [product.path.name, content, session.prompts.digest(), recipe.evaluate, recipe.run]
    inputs = inputs_digest(task, source, "after", facts)
    after = saved_answers(saved, inputs)
    if after is None:
        try:
            after = session.after(product.path, before)
        except ModelError as error:
            if product.folder is None:
                raise
            # The converter knows more architectures than can be read back from a GGUF here.
            notes.append(f"the edited folder was asked, not the GGUF made of it: {error.message}")
            after = session.after(product.folder, before)
        after.save(saved, inputs)
    asked = session.asked()
    judged, more, figures = judged_answers(task, asked, before, after, session.watch)
    metrics = compare(before, after, judged) | figures
    answers = kept_answers(asked, before, after) if recipe.evaluate.keep_answers else []
    suites = tuple(suite_figures(asked.suites, before, after))
    few = fewer_asked(asked, recipe.evaluate.prompts, FEW)
    return Told(metrics, answers, (*notes, *few, *more, *_short_of(recipe, metrics)), suites)


def judged_answers(
    task: Task, asked: Asked, before: Answers, after: Answers, watch: Watch
) -> tuple[tuple[Verdicts, Verdicts] | None, tuple[str, ...], dict[str, float]]:
    """The judge's verdicts where the recipe names one, its notes, and how often it made no sense."""
    if not task.recipe.evaluate.judge:
        return None, (), {}
    from abliterated.pipeline.evaluation import Verdicts
    from abliterated.pipeline.judge import judge_or_wording

    served, found, notes = _judge(task), [], []
    nonsense = replies = done = 0
    total = 2 * (len(asked.harmful) + len(asked.harmless))
    with watch.stage("evaluate"):
        for answers in (before, after):
            classes = []
            for prompts, texts in ((asked.harmful, answers.harmful), (asked.harmless, answers.harmless)):

                def step(number: int, behind: int = done) -> None:
                    watch.step(behind + number, total, "answers", f"asking the judge {served.model}")

                one = judge_or_wording(served, prompts, texts, step)
                nonsense, replies, done = nonsense + one.nonsense, replies + one.replies, done + len(prompts)
                notes += [note for note in one.notes if note not in notes]
                classes.append(one.verdicts)
            found.append(Verdicts(*classes))
    figures = {"judge_replies": float(replies), "judge_nonsense": float(nonsense)}
    return (found[0], found[1]), tuple(notes), figures


def fewer_asked(asked: Asked, wanted: int, why: str) -> list[str]:
    """A note where there were fewer prompts than an evaluation was asked for."""
    found = {"harmful": len(asked.harmful), "harmless": len(asked.harmless)}
    short = [f"{count} {kind}" for kind, count in found.items() if count < wanted]
    return [f"the evaluation asked {' and '.join(short)} prompts and not {wanted}: {why}"] if short else []


def _judge(task: Task) -> Served:
    return Served(engine_url(task.engine), task.recipe.evaluate.judge.removeprefix("ollama:"))


def _short_of(recipe: Recipe, metrics: dict[str, float]) -> list[str]:
    after, target = metrics["refusal_after"], recipe.search.refusal_target
    if recipe.edit.invert or after <= target:
        return []
    return [f"{after:.1%} of the harmful prompts are still refused; the target was {target:.1%}"]
