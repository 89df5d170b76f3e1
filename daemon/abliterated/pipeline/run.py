"""The recipe's story: a model is opened, the direction it refuses along is found, taken out of its weights, and what
was written is asked again.

Does not know jobs, queues or engines: it is given files and leaves files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import Recipe
from abliterated.pipeline.direction_files import read_direction, write_direction, write_json
from abliterated.pipeline.edit import strengths
from abliterated.pipeline.product import DIRECTION_FILE, check_editable, digest, write_product
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.report import report, write_report, write_result
from abliterated.pipeline.session import Found, Session
from abliterated.pipeline.source import Source, open_source
from abliterated.pipeline.watch import Watch, peak_memory


def run(task: Task, emit: Callable[[Progress], None], cancelled: Callable[[], bool]) -> Result:
    """Do what the task's recipe asks; the product and the reports lie in `task.output` when it returns."""
    watch = Watch(emit, cancelled)
    recipe, output = task.recipe, Path(task.output)
    _folders(task)
    with watch.stage("load"):
        source = open_source(_path(task))
        chosen = strengths(recipe.edit, source.layers)
        check_editable(recipe, source)
        prompts = read_prompts(recipe.prompts) if _asks(recipe) else None
    session = Session(task, source, prompts, watch) if prompts else None
    try:
        found = session.direction() if session and recipe.direction.method != "file" else _given(recipe, source)
        before = session.before() if session and _evaluates(recipe) else None
        if session:
            session.close()
        notes = [*found.notes, *_unserved(recipe)]
        with watch.stage("edit"):
            digest_of_prompts = prompts.digest() if prompts else ""
            product = write_product(task, source, found.direction, chosen, digest_of_prompts, watch)
        metrics = {}
        if session and before:
            from abliterated.pipeline.evaluate import asked_prompts, compare, kept_answers

            after = session.after(product.path)
            metrics = compare(before, after)
            if recipe.evaluate.keep_answers:
                asked = asked_prompts(session.prompts, recipe.evaluate.prompts)
                write_json(output / "answers.json", kept_answers(asked, before, after))
            notes += _verdict(recipe, metrics)
    finally:
        if session:
            session.close()
    with watch.stage("report"):
        sha256, written = digest(product.path, watch)
        result = Result(
            product=product.path.name,
            format=recipe.export.format,
            digest=sha256,
            content=product.edited.content if product.edited else "",
            bytes_written=written,
            direction={**found.direction.origin, "digest": found.direction.digest(), "rank": found.direction.rank},
            coverage=product.edited.coverage if product.edited else 1.0,
            residual=round(product.edited.residual, 6) if product.edited else 0.0,
            metrics=metrics,
            seconds=watch.seconds,
            peak_memory=peak_memory(),
            notes=notes,
        )
        write_direction(output / DIRECTION_FILE, found.direction, {})
        write_report(output, report(task, source, result, product.edited, found.candidates, chosen))
    write_result(output, result)
    return result


def _asks(recipe: Recipe) -> bool:
    """Whether the model itself is needed, and not its weights alone."""
    return recipe.direction.method != "file" or _evaluates(recipe)


def _evaluates(recipe: Recipe) -> bool:
    return recipe.evaluate.prompts > 0 and recipe.export.format != "direction"


def _given(recipe: Recipe, source: Source) -> Found:
    return Found(read_direction(Path(recipe.direction.file).expanduser(), source.hidden_size, source.layers))


def _path(task: Task) -> Path:
    if not task.source:
        raise RecipeError(f"{task.base} can't be fetched yet", remedy="Download it, and give the folder")
    return Path(task.source)


def _folders(task: Task) -> None:
    for folder in (task.output, task.work):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"can't make {folder}: {error.strerror}", remedy="Check the path and its rights") from error


def _unserved(recipe: Recipe) -> list[str]:
    """What the recipe asks for and a later version will do; said, never passed over."""
    notes = []
    if recipe.search.trials:
        notes.append("the search over strengths is not built yet: they are the recipe's own")
    if recipe.evaluate.judge:
        notes.append("evaluate.judge is not built yet: refusals were told by their wording")
    if recipe.evaluate.suites:
        notes.append("evaluate.suites are not built yet")
    return notes


def _verdict(recipe: Recipe, metrics: dict[str, float]) -> list[str]:
    after, target = metrics["refusal_after"], recipe.search.refusal_target
    if recipe.edit.invert or after <= target:
        return []
    return [f"{after:.1%} of the harmful prompts are still refused; the target was {target:.1%}"]
