"""The pipeline from Python: `from abliterated import measure, edit, evaluate`, in a script or a notebook.

Thin: a few arguments become a recipe, and the recipe's own story is run in this process. Importing it loads no torch;
the first call does, and needs the `pipeline` extra. Errors are `abliterate.contract.errors`. Does not know queues,
daemons or registration; Ollama is asked only where a model is given by a name it has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import Progress, Result
from abliterate.contract.recipe import Recipe, parse_recipe, recipe_from_table
from abliterated.once import Tell, absolute_paths, converter_for, plain_recipe, resolve, run_once

if TYPE_CHECKING:
    from abliterated.pipeline.directions import RefusalDirection
    from abliterated.pipeline.source import Source
    from abliterated.pipeline.talking import Talker

Prompts: TypeAlias = str | Path | Sequence[str | Path]
Layer: TypeAlias = int | float


@dataclass(frozen=True)
class Edited:
    """What an edit left behind. `path`: the GGUF, or the folder with safetensors; `result`: everything told of it."""

    path: Path
    result: Result

    @property
    def coverage(self) -> float:
        """Share of the matrices that write to the residual stream that were edited: 1.0, or you asked for less."""
        return self.result.coverage

    @property
    def residual(self) -> float:
        """How much of the direction is left in what was written, 0 to 1, rounding included."""
        return self.result.residual


def measure(
    model: str | Path,
    *,
    harmful: Prompts = "builtin",
    harmless: Prompts = "builtin",
    count: int = 128,
    seed: int = 0,
    system: str = "",
    layer: Layer | Sequence[Layer] | None = None,
    position: int = -1,
    index: float | None = None,
    rank: int = 1,
    per_layer: bool = False,
    convention: Literal["output", "input"] = "output",
    winsorize: float = 1.0,
    device: str = "auto",
    dtype: str = "auto",
    progress: Tell | None = None,
) -> RefusalDirection:
    """The direction `model` refuses along.

    `model`: a name in Ollama, a .gguf, a folder with safetensors, or hf:ORG/REPO. `harmful`, `harmless`: a file of
    prompts, one a line, a folder of them, or several. Without `layer` every layer and position is tried on prompts
    kept back; a float is a share of the depth, an int a layer's number.

    Returns unit vectors: `.vectors` is float32 of (1, rank, hidden size), or (layers, 1, hidden size) with `per_layer`;
    `.for_layer(i)` is (rank, hidden size); `.origin` says how they were found. ModelError where it refuses nothing.
    """
    method = "per-layer" if per_layer else "auto" if layer is None else "layer"
    asked: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "position": position,
        "convention": convention,
        "winsorize": winsorize,
    }
    if layer is not None:
        asked["layer"] = list(layer) if isinstance(layer, Sequence) else layer
    if index is not None:
        asked["index"] = index
    recipe = _recipe(
        model,
        device,
        dtype,
        prompts={
            "harmful": _sources(harmful),
            "harmless": _sources(harmless),
            "count": count,
            "seed": seed,
            "system": system,
        },
        direction=asked,
        export={"format": "direction"},
    )
    with tempfile.TemporaryDirectory(prefix="abliterated-") as folder:
        result = _run(recipe, Path(folder), progress)
        return _read(Path(folder) / result.product, result.direction)


def edit(
    model: str | Path,
    direction: RefusalDirection | str | Path,
    out: str | Path,
    *,
    name: str = "",
    strength: float = 1.0,
    attention: float = 1.0,
    mlp: float = 1.0,
    norm: Literal["columns", "rows", "none"] = "columns",
    layers: str | Sequence[int] = "all",
    kernel: Literal["constant", "linear", "gaussian", "trapezoid"] = "constant",
    center: float = 0.5,
    width: float = 0.4,
    floor: float = 0.0,
    invert: bool = False,
    format: Literal["gguf", "safetensors", "adapter"] | None = None,
    quantize: str = "keep",
    progress: Tell | None = None,
) -> Edited:
    """Write `model` without `direction` into the folder `out`; the base is only read.

    `direction`: what `measure` returned, or a .pt or .safetensors file of (hidden,), (hidden, k) or (layers, hidden).
    `strength` 1 takes out all of it; `attention` and `mlp` are factors on it. `format`: by default a GGUF of a GGUF, a
    folder of a folder. DiskError where there is no room; nothing half-written is ever left.
    """
    from abliterated.pipeline.direction_files import write_direction

    target = Path(out).expanduser().absolute()
    with tempfile.TemporaryDirectory(prefix="abliterated-") as folder:
        if isinstance(direction, (str, Path)):
            file = Path(direction).expanduser().absolute()
        else:
            file = Path(folder) / "direction.safetensors"
            write_direction(file, direction, {})
        recipe = _recipe(
            model,
            "auto",
            "auto",
            name=name,
            direction={"method": "file", "file": str(file)},
            edit={
                "strength": strength,
                "attention": attention,
                "mlp": mlp,
                "norm": norm,
                "layers": layers if isinstance(layers, str) else list(layers),
                "kernel": kernel,
                "center": center,
                "width": width,
                "floor": floor,
                "invert": invert,
            },
            export={
                "format": format or ("safetensors" if Path(model).expanduser().is_dir() else "gguf"),
                "quantize": quantize,
            },
        )
        result = _run(recipe, target, progress)
    return Edited(target / result.product, result)


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    harmful: Prompts = "builtin",
    harmless: Prompts = "builtin",
    prompts: int = 50,
    tokens: int = 128,
    seed: int = 0,
    system: str = "",
    suites: Sequence[str] = (),
    device: str = "auto",
    progress: Tell | None = None,
) -> dict[str, Any]:
    """How often `model` refuses, read from its files; with `against`, how far it strays from the original.

    `prompts`: of each class; `tokens`: the longest answer. The keys are those of `abliterated evaluate --json`:
    `refusal_count`, `total`, `refusal_rate` (0 to 1), `false_refusal`, and with `against` `harmless_exact` (share of
    harmless answers that stayed word for word) and `kl_mean` (nats a token). No answer is kept.
    """
    import msgspec

    from abliterate.contract.recipe import Evaluate
    from abliterate.contract.recipe import Prompts as Wanted
    from abliterated.pipeline import evaluate_alone
    from abliterated.pipeline.evaluate import Asked
    from abliterated.pipeline.prompts import read_prompts
    from abliterated.pipeline.suites import read_suites
    from abliterated.pipeline.watch import Watch

    if prompts < 1 or tokens < 1:
        raise RecipeError("prompts and tokens count from 1", remedy="Give a positive number")
    recipe = _recipe(model, device, "auto")
    wanted = Wanted(harmful=_sources(harmful), harmless=_sources(harmless), seed=seed)
    bad, good = evaluate_alone.all_prompts(read_prompts(wanted), prompts)
    questions = evaluate_alone.Questions(
        Asked(bad, good, read_suites(list(suites))), Evaluate(prompts=prompts, tokens=tokens), recipe.run, system
    )
    watch = Watch(progress or _nobody)
    subjects = [
        evaluate_alone.Subject(source.name, source)
        for source in (_source(_recipe(one, device, "auto")) for one in (against, model) if one is not None)
    ]
    original = evaluate_alone.evaluate_model(subjects[0], questions, watch) if against is not None else None
    one = evaluate_alone.evaluate_model(subjects[-1], questions, watch, original)
    figures, notes = dict(one.figures), list(one.notes)
    if original:
        compared, more = evaluate_alone.against(one, original)
        figures |= compared | {"against": original.figures}
        notes += more
    if found := evaluate_alone.suites(questions, one, original):
        figures["suites"] = msgspec.to_builtins(found)
    return figures | {"notes": list(dict.fromkeys(notes))}


def run_recipe(recipe: str | Path | Mapping[str, Any], out: str | Path, *, progress: Tell | None = None) -> Edited:
    """A whole recipe, a TOML file or its table as a dictionary: measured, searched, edited, evaluated, told about.

    The product, `report.html` and `report.json` lie in the folder `out`. Nothing is registered.
    """
    if isinstance(recipe, Mapping):
        read, folder = recipe_from_table(dict(recipe)), Path.cwd()
    else:
        path = Path(recipe).expanduser().absolute()
        try:
            read, folder = parse_recipe(path.read_bytes(), str(path)), path.parent
        except OSError as error:
            raise RecipeError(f"{path}: can't be read ({error.strerror})", remedy="Check the path") from error
    target = Path(out).expanduser().absolute()
    result = _run(absolute_paths(read, folder), target, progress)
    return Edited(target / result.product, result)


@contextmanager
def talk(
    model: str | Path, direction: RefusalDirection | str | Path | None = None, *, device: str = "auto"
) -> Iterator[Talker]:
    """A model in memory to talk to, with `direction` taken out while it runs; no weight is touched.

    `talker.answer([{"role": "user", "content": "…"}], tokens)` yields the answer piece by piece, greedily.
    """
    from abliterated.pipeline.direction_files import write_direction
    from abliterated.pipeline.talking import Talker
    from abliterated.pipeline.watch import Watch

    recipe = _recipe(model, device, "auto")
    with tempfile.TemporaryDirectory(prefix="abliterated-") as folder:
        file = None if direction is None else Path(folder) / "direction.safetensors"
        if isinstance(direction, (str, Path)):
            file = Path(direction).expanduser()
        elif direction is not None and file is not None:
            write_direction(file, direction, {})
        talker = Talker(_source(recipe), recipe.run, file, Watch())
    yield talker


def save_direction(direction: RefusalDirection, path: str | Path) -> Path:
    """Write it as .pt or .safetensors, which ollama-forge and Sumandora's script read, and PATH.json beside it."""
    from abliterated.pipeline.direction_files import write_direction

    target = Path(path).expanduser().absolute()
    write_direction(target, direction, {})
    return target


def _recipe(model: str | Path, device: str, dtype: str, **tables: Any) -> Recipe:
    return plain_recipe(str(model), device, dtype, tables, "arguments")


def _sources(given: Prompts) -> str | list[str]:
    return str(given) if isinstance(given, (str, Path)) else [str(one) for one in given]


def _nobody(_: Progress) -> None:
    """Nobody wants to know."""


def _run(recipe: Recipe, out: Path, progress: Tell | None) -> Result:
    told = nullcontext(progress or _nobody)
    with run_once(recipe, out, told, converter=converter_for(recipe)) as (result, _):
        return result


def _source(recipe: Recipe) -> Source:
    from abliterated.pipeline.source import open_source

    path, _ = resolve(recipe)
    if not path:
        from abliterated.pipeline.hub import fetch

        path = str(fetch(recipe.model, progress=lambda done, total: None, cancelled=lambda: False).folder)
    return open_source(Path(path))


def _read(path: Path, facts: Mapping[str, Any]) -> RefusalDirection:
    import json

    from abliterated.pipeline.direction_files import read_direction
    from abliterated.pipeline.directions import RefusalDirection

    told = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    found = read_direction(path, int(told["hidden_size"]), int(told.get("layers", 0)) or 1)
    return RefusalDirection(found.vectors, found.per_layer, dict(facts))
