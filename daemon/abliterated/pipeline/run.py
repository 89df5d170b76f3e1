"""The recipe's story: a model is opened, the direction it refuses along is found, taken out of its weights, what was
written is asked again, and everything is delivered at once.

Does not know jobs, queues or engines: it is given files and leaves files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import Recipe
from abliterated.pipeline.delivery import (
    RESULT_FILE,
    check_folders,
    check_place,
    deliver,
    digest,
    forget_result,
)
from abliterated.pipeline.direction_files import read_direction, write_direction, write_json
from abliterated.pipeline.edit import strengths
from abliterated.pipeline.fetching import fetched
from abliterated.pipeline.kept import inputs_digest
from abliterated.pipeline.model_card import CARD_FILE, licence_of, model_card
from abliterated.pipeline.product import (
    DIRECTION_FILE,
    STAGING,
    Product,
    check_editable,
    from_checkpoint,
    names,
    read_sidecar,
    write_product,
)
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.report import REPORT_FILE, report, write_report, write_result
from abliterated.pipeline.safe_write import Output
from abliterated.pipeline.session import Found, Session
from abliterated.pipeline.source import Source, open_source
from abliterated.pipeline.watch import Watch, peak_memory

if TYPE_CHECKING:
    from abliterated.pipeline.evaluate import Answers

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True)
class Asked:
    """What asking before and after told."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def run(task: Task, emit: Callable[[Progress], None], cancelled: Callable[[], bool]) -> Result:
    """Do what the task's recipe asks; the product and the reports lie in `task.output` when it returns, or nothing."""
    watch, recipe = Watch(emit, cancelled), task.recipe
    check_folders(Path(task.work), Path(task.output))
    task = fetched(task, watch)
    with watch.stage("load"):
        source, checkpoint = open_source(Path(task.source)), _checkpoint(recipe)
        chosen = strengths(recipe.edit, source.layers)
        check_editable(task, source)
        check_place(Path(task.output), _delivered(task, source), source.path)
        prompts = read_prompts(recipe.prompts) if _asks(recipe) else None
    session = Session(task, source, prompts, watch) if prompts else None
    try:
        found = None if checkpoint else _found(recipe, source, session)
        before = session.before() if session and _evaluates(recipe) else None
        if session:
            session.close()
        with watch.stage("edit"):
            if found is None:
                assert checkpoint is not None
                product = from_checkpoint(task, source, checkpoint, watch)
            else:
                digest_of_prompts = prompts.digest() if prompts else ""
                product = write_product(task, source, found.direction, chosen, digest_of_prompts, watch)
        asked = _asked(task, source, session, before, product) if session and before else Asked()
    finally:
        if session:
            session.close()
    with watch.stage("report"):
        if product.path.is_dir() and product.format == "safetensors":
            _write_card(recipe, product, asked.metrics, source.path)
        sha256, written = digest(product.path, watch)
        edited = product.edited
        told = read_sidecar(product.folder) if product.folder and not edited else {}
        result = Result(
            product=product.path.name,
            format=product.format,
            digest=sha256,
            content=edited.content if edited else str(told.get("abliterated.content", "")),
            bytes_written=written,
            direction=_direction_facts(found, told),
            coverage=edited.coverage if edited else float(told.get("abliterated.coverage", 1.0)),
            residual=round(edited.residual if edited else float(told.get("abliterated.residual", 0.0)), 6),
            metrics=asked.metrics,
            seconds=watch.seconds,
            peak_memory=peak_memory(),
            notes=[*(found.notes if found else ()), *_unserved(recipe), *product.notes, *asked.notes],
        )
        candidates = found.candidates if found else ()
        facts = report(task, source, result, edited, candidates, chosen)
        _deliver(task, product, found, asked, facts)
    write_result(Path(task.output), result)
    return result


def _asks(recipe: Recipe) -> bool:
    """Whether the model itself is needed, and not its weights alone."""
    measures = recipe.direction.method != "file" and not recipe.run.from_checkpoint
    return measures or _evaluates(recipe)


def _evaluates(recipe: Recipe) -> bool:
    return recipe.evaluate.prompts > 0 and recipe.export.format not in ("direction", "adapter")


def _found(recipe: Recipe, source: Source, session: Session | None) -> Found:
    if session and recipe.direction.method != "file":
        return session.direction()
    given = Path(recipe.direction.file).expanduser()
    if not given.is_file():
        raise RecipeError(f"direction.file: there is no {given}", remedy="Check the path")
    return Found(read_direction(given, source.hidden_size, source.layers))


def _asked(task: Task, source: Source, session: Session, before: Answers, product: Product) -> Asked:
    """Ask the product what the original was asked: now, or in an earlier attempt at the same."""
    from abliterated.pipeline.evaluate import asked_prompts, compare, kept_answers, saved_answers

    recipe, saved, notes = task.recipe, Path(task.work) / "after.npz", []
    content = product.edited.content if product.edited else ""
    facts = [product.path.name, content, session.prompts.digest(), recipe.evaluate, recipe.run]
    inputs = inputs_digest(task, source, "after", facts)
    after = saved_answers(saved, inputs)
    if after is None:
        try:
            after = session.after(product.path)
        except ModelError as error:
            if product.folder is None:
                raise
            # The converter knows more architectures than can be read back from a GGUF here.
            notes.append(f"the edited folder was asked, not the GGUF made of it: {error.message}")
            after = session.after(product.folder)
        after.save(saved, inputs)
    metrics = compare(before, after)
    asked = asked_prompts(session.prompts, recipe.evaluate.prompts)
    answers = kept_answers(asked, before, after) if recipe.evaluate.keep_answers else []
    return Asked(metrics, answers, (*notes, *_verdict(recipe, metrics)))


def _checkpoint(recipe: Recipe) -> Source | None:
    """The folder edited before, where the recipe begins with one."""
    if not recipe.run.from_checkpoint:
        return None
    found = open_source(Path(recipe.run.from_checkpoint).expanduser())
    if found.kind != "safetensors":
        raise RecipeError(
            f"run.from_checkpoint: {found.name} is a GGUF already", remedy="Give a folder with edited safetensors"
        )
    return found


def _delivered(task: Task, source: Source) -> list[str]:
    """Every name the run may put into the output folder."""
    answers = [ANSWERS_FILE] if task.recipe.evaluate.keep_answers else []
    found = [*names(task, source), REPORT_FILE, RESULT_FILE, *answers]
    if task.recipe.export.format != "direction" and _is_given(task.recipe, Path(task.output)):
        found.remove(DIRECTION_FILE)
    return found


def _write_card(recipe: Recipe, product: Product, metrics: dict[str, float], base: Path) -> None:
    """`MODEL_CARD.md` into an edited folder."""
    assert product.edited is not None
    sidecar = read_sidecar(product.path)
    text = model_card(product.path.name, recipe, sidecar, product.edited, metrics, licence_of(base))
    with Output(product.path / CARD_FILE) as output:
        output.write(text.encode())


def _direction_facts(found: Found | None, told: dict[str, Any]) -> dict[str, Any]:
    if found is None:
        return {"method": "checkpoint", "digest": str(told.get("abliterated.direction.digest", ""))}
    return {**found.direction.origin, "digest": found.direction.digest(), "rank": found.direction.rank}


def _deliver(task: Task, product: Product, found: Found | None, asked: Asked, facts: dict[str, Any]) -> None:
    """Everything into the output folder, the product last; the direction's sidecar, which says whose it is, first."""
    staging, output = Path(task.work) / STAGING, Path(task.output)
    staging.mkdir(exist_ok=True)
    write_report(staging, facts)
    parts = [staging / REPORT_FILE]
    if found is not None and not _is_given(task.recipe, output):
        write_direction(staging / DIRECTION_FILE, found.direction, {})
        parts += [staging / f"{DIRECTION_FILE}.json", staging / DIRECTION_FILE]
    if asked.answers:
        write_json(staging / ANSWERS_FILE, asked.answers)
        parts.append(staging / ANSWERS_FILE)
    forget_result(output)
    deliver([*parts, *([] if product.path in parts else [product.path])], output)


def _is_given(recipe: Recipe, output: Path) -> bool:
    """Whether the direction was read from the very file it would be written to."""
    given, target = Path(recipe.direction.file).expanduser(), output / DIRECTION_FILE
    return bool(recipe.direction.file) and given.exists() and target.exists() and given.samefile(target)


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
