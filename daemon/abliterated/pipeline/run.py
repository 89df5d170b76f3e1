"""The recipe's story: a model is opened, the direction it refuses along is found, taken out of its weights, what was
written is asked again, and everything is delivered at once.

Does not know jobs, queues or engines: it is given files and leaves files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import Recipe
from abliterate.contract.report import PromptSource, Report
from abliterated.pipeline.asking import Told, ask_again, check_asking
from abliterated.pipeline.delivery import (
    RESULT_FILE,
    check_folders,
    check_place,
    deliver,
    digest,
    forget_result,
)
from abliterated.pipeline.direction_files import read_direction, write_direction, write_json
from abliterated.pipeline.edit import LayerStrength, strengths
from abliterated.pipeline.fetching import fetched
from abliterated.pipeline.model_card import CARD_FILE, gguf_sidecar, licence_of, model_card
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
from abliterated.pipeline.report import PAGE_FILE, REPORT_FILE, report, write_report, write_result
from abliterated.pipeline.safe_write import Output
from abliterated.pipeline.search_stage import searches, winner
from abliterated.pipeline.search_stage import told as told_of_search
from abliterated.pipeline.session import Found, Session
from abliterated.pipeline.source import Source, check_unchanged, open_source
from abliterated.pipeline.watch import Watch, peak_memory

if TYPE_CHECKING:
    from abliterated.pipeline.directions import RefusalDirection
    from abliterated.pipeline.search import Searched

ANSWERS_FILE = "answers.json"


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
        if _evaluates(recipe):
            check_asking(task)
    session = Session(task, source, prompts, watch) if prompts else None
    try:
        found = None if checkpoint else _found(recipe, source, session)
        searched = session.search(found.direction) if session and found and searches(recipe) else None
        before = session.before() if session and _evaluates(recipe) else None
        if session:
            session.close()
        verified: list[tuple[int, float]] = []
        if found is None:
            assert checkpoint is not None
            with watch.stage("edit"):
                product = from_checkpoint(task, source, checkpoint, watch)
        else:
            for direction in _finalists(found, searched, verified, recipe):
                found, chosen = replace(found, direction=direction), _by_layer(direction.strengths) or chosen
                with watch.stage("edit"):
                    digest_of_prompts = prompts.digest() if prompts else ""
                    product = write_product(task, source, direction, chosen, digest_of_prompts, watch)
                    check_unchanged(source)
                if searched and session and product.edited and product.format != "adapter":
                    verified.append((direction.origin["trial"], session.refuses(product.folder or product.path)))
        asked = ask_again(task, source, session, before, product) if session and before else Told()
    finally:
        if session:
            session.close()
    with watch.stage("report"):
        if product.edited and product.format in ("gguf", "safetensors"):
            staging = Path(task.work) / STAGING
            _write_card(recipe, product, asked.metrics, source.path, prompts.sources if prompts else (), staging)
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
            metrics=asked.metrics | {name: float(count) for name, count in watch.counts.items()},
            short_of_target=_short(recipe, searched, verified, asked.metrics),
            seconds=watch.seconds,
            peak_memory=peak_memory(),
            notes=[*_notes(found, searched), *product.notes, *_let_through(product), *asked.notes],
        )
        facts = report(
            task,
            source,
            result,
            edited,
            found.candidates if found else (),
            chosen,
            licence=licence_of(source.path)[0],
            prompts=prompts.sources if prompts else (),
            separation=found.separation if found else (),
            search=told_of_search(searched, recipe.search.refusal_target, verified, watch) if searched else None,
            suites=asked.suites,
        )
        _deliver(task, product, found, asked, facts)
    write_result(Path(task.output), result)
    return result


def _asks(recipe: Recipe) -> bool:
    """Whether the model itself is needed, and not its weights alone."""
    measures = recipe.direction.method != "file" and not recipe.run.from_checkpoint
    return measures or _evaluates(recipe) or (searches(recipe) and not recipe.run.from_checkpoint)


def _evaluates(recipe: Recipe) -> bool:
    return recipe.evaluate.prompts > 0 and recipe.export.format not in ("direction", "adapter")


def _found(recipe: Recipe, source: Source, session: Session | None) -> Found:
    if session and recipe.direction.method != "file":
        return session.direction()
    given = Path(recipe.direction.file).expanduser()
    if not given.is_file():
        raise RecipeError(f"direction.file: there is no {given}", remedy="Check the path")
    return Found(read_direction(given, source.hidden_size, source.layers))


def _finalists(
    found: Found, searched: Searched | None, verified: list[tuple[int, float]], recipe: Recipe
) -> Iterator[RefusalDirection]:
    """What to write, one after the other until one keeps to the target once it is written (`verified`); the best of
    those that do not is written again, if it was not the last."""
    if searched is None:
        yield found.direction
        return
    for finalist in searched.finalists:
        yield finalist.direction
        if not verified or verified[-1][1] <= recipe.search.refusal_target:
            return
    best = winner(searched, verified)
    if best != verified[-1][0]:
        yield next(one.direction for one in searched.finalists if one.number == best)


def _by_layer(found: tuple[tuple[float, float], ...]) -> tuple[LayerStrength, ...]:
    return tuple(LayerStrength(attention, mlp) for attention, mlp in found)


def _short(
    recipe: Recipe, searched: Searched | None, verified: list[tuple[int, float]], metrics: dict[str, float]
) -> float:
    """How far refusals stay above the target a search was given."""
    if searched is None:
        return 0.0
    told = dict(verified).get(winner(searched, verified), searched.finalists[0].refused)
    return round(max(0.0, metrics.get("refusal_after", told) - recipe.search.refusal_target), 4)


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
    cards = [CARD_FILE] if task.recipe.export.format == "gguf" and not task.recipe.run.from_checkpoint else []
    found = [*names(task, source), REPORT_FILE, PAGE_FILE, RESULT_FILE, *cards, *answers]
    if task.recipe.export.format != "direction" and _is_given(task.recipe, Path(task.output)):
        found.remove(DIRECTION_FILE)
    return found


def _write_card(
    recipe: Recipe,
    product: Product,
    metrics: dict[str, float],
    base: Path,
    prompts: Sequence[PromptSource],
    staging: Path,
) -> None:
    """`MODEL_CARD.md` into an edited folder, or to be delivered beside a GGUF."""
    assert product.edited is not None
    inside = product.format == "safetensors"
    facts = read_sidecar(product.path) if inside else gguf_sidecar(product.path)
    licence = licence_of(base) if inside else (licence_of(base)[0], ())
    text = model_card(product.path.name, recipe, facts, product.edited, metrics, licence, prompts)
    staging.mkdir(exist_ok=True)
    with Output((product.path if inside else staging) / CARD_FILE) as output:
        output.write(text.encode())


def _direction_facts(found: Found | None, told: dict[str, Any]) -> dict[str, Any]:
    if found is None:
        return {"method": "checkpoint", "digest": str(told.get("abliterated.direction.digest", ""))}
    return {**found.direction.origin, "digest": found.direction.digest(), "rank": found.direction.rank}


def _deliver(task: Task, product: Product, found: Found | None, asked: Told, facts: Report) -> None:
    """Everything into the output folder, the product last; the direction's sidecar, which says whose it is, first."""
    staging, output = Path(task.work) / STAGING, Path(task.output)
    staging.mkdir(exist_ok=True)
    write_report(staging, facts)
    parts = [staging / REPORT_FILE, staging / PAGE_FILE]
    if product.edited and product.format == "gguf":
        parts.append(staging / CARD_FILE)
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


def _let_through(product: Product) -> list[str]:
    share = product.edited.let_through if product.edited else 0.0
    if not share:
        return []
    return [
        f"edit.post_norm = false: norms behind the writers let up to {share:.0%} of the direction's share through "
        "to the residual stream"
    ]


def _notes(found: Found | None, searched: Searched | None) -> list[str]:
    return [*(found.notes if found else ()), *(searched.notes if searched else ())]
