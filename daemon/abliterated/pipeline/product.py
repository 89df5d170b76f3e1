"""What a run makes: an edited GGUF, an edited folder of safetensors, that folder converted to a GGUF, or the direction
alone.

Joins the recipe to the editors and the converter, in the work folder; every step that has ended is kept for an attempt
after this one. Does not know how a direction was found, what the product answers or where it is delivered.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from abliterate import __version__
from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.messages import Task
from abliterate.contract.recipe import target_name
from abliterated.pipeline.chat_template import template_keys
from abliterated.pipeline.delivery import PROVENANCE_FILE
from abliterated.pipeline.direction_files import write_direction, write_json
from abliterated.pipeline.directions import RefusalDirection, direction
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.kept import inputs_digest, keep, recall
from abliterated.pipeline.provenance import CONTENT, COVERAGE, PREFIX, RESIDUAL, VERSION, portable, provenance
from abliterated.pipeline.safe_write import need_space
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

DIRECTION_FILE: Final = "direction.safetensors"
ADAPTER_SUFFIX: Final = "-adapter.gguf"
ADAPTER_NOTE: Final = (
    "the adapter is for llama.cpp (--lora); an Ollama before 0.34.1 takes it too (ADAPTER in a Modelfile), one before "
    "0.30 for some architectures only"
)
STAGING: Final = "product"  # below the work folder: what will be delivered

Way = Literal["gguf", "folder", "convert", "adapter", "direction"]


@dataclass(frozen=True)
class Product:
    """What was made, and what was done to it; no `edited` where it is the direction alone. `folder`: the edited folder
    a GGUF was converted from."""

    path: Path
    format: str
    edited: EditReport | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def way(task: Task, source: Source) -> Way:
    """How the recipe's format comes out of this base. RecipeError where it can't."""
    export = task.recipe.export
    if task.recipe.run.from_checkpoint:
        return _from_checkpoint(task)
    if export.format == "direction":
        return "direction"
    if export.format == "adapter":
        if source.kind != "gguf":
            raise RecipeError(
                f"{source.name} is a folder with safetensors, and an adapter belongs to a GGUF",
                remedy="Give the GGUF the adapter is for",
            )
        return "adapter"
    if source.kind == "gguf":
        if export.format == "safetensors":
            raise RecipeError(f"{source.name} is a GGUF and stays one", remedy='Set export.format = "gguf"')
        return "gguf"
    if export.format == "safetensors" and export.quantize.strip().upper() != "KEEP":
        raise RecipeError("safetensors are not quantised here", remedy='Set export.quantize = "keep"')
    if export.format == "gguf" and task.converter:
        return "convert"
    return "folder"


def names(task: Task, source: Source) -> list[str]:
    """What the product may be called: a folder, where no GGUF could be made of it."""
    name = target_name(task.recipe).model
    gguf = name if stays_split(task, source) else f"{name}.gguf"
    found = {"gguf": [gguf], "folder": [name], "direction": [], "convert": [f"{name}.gguf", name]}
    found["adapter"] = [f"{name}{ADAPTER_SUFFIX}"]
    return [*found[way(task, source)], *([] if task.recipe.run.from_checkpoint else [DIRECTION_FILE])]


def stays_split(task: Task, source: Source) -> bool:
    """Whether a GGUF that came in parts leaves in parts, in a folder of their own: only where no engine shall take it,
    for engines take one file."""
    return source.kind == "gguf" and len(source.parts) > 1 and not task.recipe.export.register


def check_editable(task: Task, source: Source) -> None:
    """What would fail after an hour of measuring fails now: formats, writers nobody knows, types, a full disk."""
    from abliterated.pipeline.mixes import known_mix

    recipe, how, work = task.recipe, way(task, source), Path(task.work)
    if how == "direction":
        return
    known_mix(recipe.export.quantize)
    if how == "adapter":
        from abliterated.pipeline.adapter import check_adapter

        check_adapter(recipe.edit)
    if how == "convert":
        from abliterated.pipeline.convert import check_converter

        check_converter(task.converter)
    if recipe.run.from_checkpoint:
        return
    if source.kind == "safetensors":
        from abliterated.pipeline.checkpoint_writers import checkpoint_census
        from abliterated.pipeline.safetensors_file import read_config, read_shards
        from abliterated.pipeline.streamed_edit import make_plan

        stored = {tensor.name: tensor for shard in read_shards(source.path) for tensor in shard.tensors}
        found = checkpoint_census(
            read_config(source.path),
            {name: tensor.shape for name, tensor in stored.items()},
            embeddings=recipe.edit.embeddings,
            post_norm=recipe.edit.post_norm,
            allow_partial=recipe.export.allow_partial,
        )
        any_direction = direction(np.eye(1, found.width)[0], origin={})
        plan = make_plan(source.name, found.width, found.layers, found.census, any_direction, recipe.edit)
        for name in plan.chosen():
            stored[name].tensor()
        # With a converter: the edited folder, what it writes, and the same with our keys.
        need_space(work / target_name(recipe).model, source.size * (3 if how == "convert" else 1))
        return
    from abliterated.pipeline.gguf_edit import plan_edit
    from abliterated.pipeline.split_gguf import read_model

    any_direction = direction(np.eye(1, source.hidden_size)[0], origin={})
    plan_edit(read_model(source.path).whole, any_direction, recipe.edit, allow_partial=recipe.export.allow_partial)
    if how == "gguf":
        need_space(work / f"{target_name(recipe).model}.gguf", _size(source, recipe.export.quantize))


def write_product(
    task: Task,
    source: Source,
    found: RefusalDirection,
    strengths: Sequence[tuple[float, float]],
    prompts: str,
    watch: Watch,
) -> Product:
    """Make it, or find what an earlier attempt made; `prompts` is their digest, "" for none."""
    recipe, how = task.recipe, way(task, source)
    staging = _staging(task)
    if how == "direction":
        write_direction(staging / DIRECTION_FILE, found, {})
        return Product(staging / DIRECTION_FILE, "direction")
    metadata = provenance(
        version=__version__,
        recipe=recipe,
        base=task.base,
        base_digest=task.base_digest,
        direction_digest=found.digest(),
        direction_rank=found.rank,
        direction_origin=found.origin,
        strengths=strengths,
        prompts_digest=prompts,
    )
    name = target_name(recipe).model
    if how == "adapter":
        return _adapter(task, source, staging / f"{name}{ADAPTER_SUFFIX}", found, metadata, watch)
    if how == "gguf":
        target = staging / (name if stays_split(task, source) else f"{name}.gguf")
        keys, notes = template_keys(task, source.parts[0])
        made = _edited_gguf(task, source, target, found, metadata | keys, watch)
        return replace(made, notes=(*made.notes, *notes))
    folder = _edited_folder(task, source, staging / name, found, metadata, watch)
    if how == "convert":
        return converted(task, source, folder, watch)
    if recipe.export.format == "gguf":
        return replace(folder, notes=(_no_converter(name),))
    return folder


def from_checkpoint(task: Task, source: Source, checkpoint: Source, watch: Watch) -> Product:
    """Begin at the export: a folder that was edited before becomes a GGUF. ModelError where it is another model."""
    if (checkpoint.hidden_size, checkpoint.layers) != (source.hidden_size, source.layers):
        raise ModelError(
            f"{checkpoint.name} is {checkpoint.hidden_size} wide and {checkpoint.layers} layers deep, "
            f"{source.name} {source.hidden_size} and {source.layers}",
            remedy="Set `model` to what the folder was made from",
        )
    product = Product(checkpoint.path, "safetensors")
    return converted(task, checkpoint, product, watch)


def _edited_gguf(
    task: Task, source: Source, target: Path, found: RefusalDirection, metadata: dict[str, Any], watch: Watch
) -> Product:
    from abliterated.pipeline.gguf_edit import edit_gguf

    inputs = inputs_digest(task, source, "gguf", [metadata, *_asked(task)])
    if kept := recall(Path(task.work), "gguf", inputs, (target.parent, Path(task.output))):
        return Product(kept[0], "gguf", kept[1], notes=_in_parts(kept[0], stays_split(task, source)))
    split = stays_split(task, source)
    if split:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
    edited = edit_gguf(
        source.path,
        target / f"{target.name}.gguf" if split else target,
        found,
        task.recipe.edit,
        quantize=task.recipe.export.quantize,
        metadata=metadata,
        allow_partial=task.recipe.export.allow_partial,
        progress=lambda done, total: watch.step(done, total, "bytes", "editing the weights"),
        cancelled=watch.cancelled,
        keep_split=split,
    )
    if split:
        _write_sidecar(target, metadata, edited)
    keep(Path(task.work), "gguf", inputs, target, edited)
    return Product(target, "gguf", edited, notes=_in_parts(target, split))


def _adapter(
    task: Task, source: Source, target: Path, found: RefusalDirection, metadata: dict[str, Any], watch: Watch
) -> Product:
    from abliterated.pipeline.adapter import export_adapter

    inputs = inputs_digest(task, source, "adapter", [metadata, *_asked(task)])
    if kept := recall(Path(task.work), "adapter", inputs, (target.parent, Path(task.output))):
        return Product(kept[0], "adapter", kept[1], notes=(ADAPTER_NOTE,))
    edited = export_adapter(
        source.path,
        target,
        found,
        task.recipe.edit,
        allow_partial=task.recipe.export.allow_partial,
        metadata=metadata,
        progress=lambda done, total: watch.step(done, total, "bytes", "reading the weights"),
        cancelled=watch.cancelled,
    )
    keep(Path(task.work), "adapter", inputs, target, edited)
    return Product(target, "adapter", edited, notes=(ADAPTER_NOTE,))


def _edited_folder(
    task: Task, source: Source, target: Path, found: RefusalDirection, metadata: dict[str, Any], watch: Watch
) -> Product:
    from abliterated.pipeline.checkpoint import edit_checkpoint

    inputs = inputs_digest(task, source, "folder", [metadata, *_asked(task)])
    if kept := recall(Path(task.work), "folder", inputs, (target.parent, Path(task.output))):
        return Product(kept[0], "safetensors", kept[1])
    shutil.rmtree(target, ignore_errors=True)
    edited = edit_checkpoint(
        source.path,
        target,
        found,
        task.recipe.edit,
        allow_partial=task.recipe.export.allow_partial,
        progress=lambda done, total: watch.step(done, total, "bytes", "editing the weights"),
        cancelled=watch.cancelled,
    )
    _write_sidecar(target, metadata, edited)
    keep(Path(task.work), "folder", inputs, target, edited)
    return Product(target, "safetensors", edited)


def converted(task: Task, source: Source, folder: Product, watch: Watch) -> Product:
    """The edited folder as a GGUF. Where the converter can't, the folder is the product, and a note says why; one that
    was edited before is none: ModelError."""
    from abliterated.pipeline.convert import convert, stamp

    work, name = Path(task.work), target_name(task.recipe).model
    target, raw = _staging(task) / f"{name}.gguf", work / "converted.gguf"
    told = read_sidecar(folder.path)
    inputs = inputs_digest(task, source, "convert", [told, *_asked(task), task.converter])
    edited = folder.edited or EditReport((), 0, 0, str(told.get(CONTENT, "")))
    if kept := recall(work, "convert", inputs, (target.parent, Path(task.output))):
        return Product(kept[0], "gguf", folder.edited, folder.path)
    if recall(work, "raw", inputs, (work,)) is None:
        try:
            convert(task.converter, folder.path, raw, watch)
        except ModelError as error:
            if folder.edited is None:
                raise
            return Product(folder.path, "safetensors", folder.edited, None, (_no_gguf(error, folder.path.name),))
        keep(work, "raw", inputs, raw, edited)
    keys, notes = template_keys(task, raw)
    stamp(
        raw,
        target,
        told | keys,
        quantize=task.recipe.export.quantize,
        progress=lambda done, total: watch.step(done, total, "bytes", "writing the GGUF"),
        cancelled=watch.cancelled,
    )
    keep(work, "convert", inputs, target, edited)
    raw.unlink(missing_ok=True)
    return Product(target, "gguf", folder.edited, folder.path, notes)


def _write_sidecar(folder: Path, metadata: dict[str, Any], edited: EditReport) -> None:
    told = {CONTENT: edited.content, COVERAGE: edited.coverage, RESIDUAL: edited.residual}
    write_json(folder / PROVENANCE_FILE, metadata | told)


def read_sidecar(folder: Path) -> dict[str, Any]:
    """The provenance beside an edited folder, or the little that is known of one that another made."""
    try:
        found = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        return {key: value for key, value in found.items() if key.startswith(PREFIX)}
    except (OSError, ValueError, AttributeError):
        return {VERSION: __version__, PREFIX + "base.name": folder.name}


def _asked(task: Task) -> list[Any]:
    """What the recipe says of edit and export, as plain values."""
    recipe = portable(task.recipe)
    return [msgspec.to_builtins(recipe.edit), msgspec.to_builtins(recipe.export)]


def _staging(task: Task) -> Path:
    folder = Path(task.work) / STAGING
    folder.mkdir(exist_ok=True)
    return folder


def _from_checkpoint(task: Task) -> Way:
    if task.recipe.export.format != "gguf":
        raise RecipeError(
            f'run.from_checkpoint can\'t give export.format = "{task.recipe.export.format}"',
            remedy='It makes a GGUF of an edited folder: set export.format = "gguf"',
        )
    if not task.converter:
        raise RecipeError(
            "run.from_checkpoint needs a converter from safetensors to GGUF",
            remedy="Set [tools] converter in config.toml to the path of llama.cpp's convert_hf_to_gguf.py",
        )
    return "convert"


def _no_converter(name: str) -> str:
    return (
        f"no GGUF was made, for no converter is configured: {name}/ holds the edited safetensors. Next: set [tools] "
        "converter in config.toml to llama.cpp's convert_hf_to_gguf.py and run the recipe again with "
        f"run.from_checkpoint naming that folder; or, with an Ollama before 0.34.1, `ollama create` from it"
    )


def _in_parts(target: Path, split: bool) -> tuple[str, ...]:
    if not split:
        return ()
    first = next((part.name for part in sorted(target.glob("*.gguf"))), target.name)
    return (
        f"the base came in parts and so does the product: give llama.cpp {target.name}/{first}, it finds the others; "
        "for an engine that takes one file, set export.register = true",
    )


def _no_gguf(error: ModelError, name: str) -> str:
    return (
        f"{error.message}: no GGUF was made, {name}/ holds the edited safetensors. Next: {error.remedy}, and run the "
        "recipe again with run.from_checkpoint naming that folder"
    )


def _size(source: Source, quantize: str) -> int:
    """About what the GGUF will need."""
    from abliterated.pipeline.gguf_file import read_gguf, row_bytes
    from abliterated.pipeline.mixes import known_mix, wanted_type

    mix = known_mix(quantize)
    return sum(
        row_bytes(wanted_type(mix, tensor, source.layers), math.prod(tensor.shape))
        for part in source.parts
        for tensor in read_gguf(part).tensors
    )
