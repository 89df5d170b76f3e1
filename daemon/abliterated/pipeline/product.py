"""What a run delivers: an edited GGUF, an edited folder of safetensors, or the direction alone.

Joins the recipe to the editors. Does not know how a direction was found or what the product answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abliterate import __version__
from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import Task
from abliterate.contract.recipe import Recipe, target_name
from abliterated.pipeline.direction_files import write_direction, write_json
from abliterated.pipeline.directions import RefusalDirection, direction
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.provenance import provenance
from abliterated.pipeline.source import Source
from abliterated.pipeline.watch import Watch

DIRECTION_FILE = "direction.safetensors"
PROVENANCE_FILE = "abliterated.json"
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Product:
    """What was written, and what was done to it; no `edited` where it is the direction alone."""

    path: Path
    edited: EditReport | None


def check_editable(recipe: Recipe, source: Source) -> None:
    """What would fail after an hour of measuring fails now: formats, writers nobody knows, widths."""
    wanted = recipe.export.format
    if wanted == "direction":
        return
    if wanted == "adapter":
        raise RecipeError('export.format = "adapter" is not built yet', remedy='Set export.format = "gguf"')
    if recipe.run.from_checkpoint:
        raise RecipeError("run.from_checkpoint is not built yet", remedy="Leave it out")
    if wanted == "gguf" and source.kind == "safetensors":
        raise RecipeError(
            f"{source.name} is a folder with safetensors, and can't become a GGUF here yet",
            remedy='Set export.format = "safetensors", or convert it with llama.cpp first and give the .gguf',
        )
    if wanted == "safetensors" and source.kind == "gguf":
        raise RecipeError(f"{source.name} is a GGUF and stays one", remedy='Set export.format = "gguf"')
    if source.kind == "safetensors":
        if recipe.export.quantize != "keep":
            raise RecipeError("safetensors are not quantised here", remedy='Set export.quantize = "keep"')
        from abliterated.pipeline.checkpoint_writers import checkpoint_census
        from abliterated.pipeline.safetensors_file import read_config, read_shards

        shapes = {tensor.name: tensor.shape for shard in read_shards(source.path) for tensor in shard.tensors}
        checkpoint_census(
            read_config(source.path),
            shapes,
            embeddings=recipe.edit.embeddings,
            post_norm=recipe.edit.post_norm,
            allow_partial=recipe.export.allow_partial,
        )
        return
    from abliterated.pipeline.gguf_edit import plan_edit
    from abliterated.pipeline.gguf_file import read_gguf

    any_direction = direction(np.eye(1, source.hidden_size)[0], origin={})
    plan_edit(read_gguf(source.path), any_direction, recipe.edit, allow_partial=recipe.export.allow_partial)


def write_product(
    task: Task,
    source: Source,
    found: RefusalDirection,
    strengths: Sequence[tuple[float, float]],
    prompts: str,
    watch: Watch,
) -> Product:
    """Write it beside the reports, under its own name; `prompts` is their digest, "" for none."""
    recipe, output = task.recipe, Path(task.output)
    if recipe.export.format == "direction":
        write_direction(output / DIRECTION_FILE, found, {})
        return Product(output / DIRECTION_FILE, None)
    metadata = provenance(
        version=__version__,
        recipe=recipe,
        base=task.base,
        base_digest=task.base_digest,
        direction_digest=found.digest(),
        direction_origin=found.origin,
        strengths=strengths,
        prompts_digest=prompts,
    )

    def progress(done: int, total: int) -> None:
        watch.step(done, total, "bytes", "editing the weights")

    name = target_name(recipe).model
    common: dict[str, Any] = {
        "allow_partial": recipe.export.allow_partial,
        "progress": progress,
        "cancelled": watch.cancelled,
    }
    if source.kind == "safetensors":
        from abliterated.pipeline.checkpoint import edit_checkpoint

        edited = edit_checkpoint(source.path, output / name, found, recipe.edit, **common)
        metadata |= {"abliterated.content": edited.content, "abliterated.coverage": edited.coverage}
        write_json(output / name / PROVENANCE_FILE, metadata | {"abliterated.residual": edited.residual})
        return Product(output / name, edited)
    from abliterated.pipeline.gguf_edit import edit_gguf

    target = output / f"{name}.gguf"
    edited = edit_gguf(
        source.path, target, found, recipe.edit, quantize=recipe.export.quantize, metadata=metadata, **common
    )
    return Product(target, edited)


def digest(path: Path, watch: Watch) -> tuple[str, int]:
    """sha256 (hex) and bytes of a product; of a folder, over its files' names and digests."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total, done, found = sum(file.stat().st_size for file in files), 0, []
    for one in files:
        content = hashlib.sha256()
        with one.open("rb") as file:
            while chunk := file.read(_CHUNK):
                content.update(chunk)
                done += len(chunk)
                watch.step(done, total, "bytes", "reading it back")
        found.append(content.hexdigest())
    if path.is_file():
        return found[0], total
    listed = "".join(f"{one.name} {content}\n" for one, content in zip(files, found, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest(), total
