"""What a product says about itself: the `abliterated.*` key-values and the JSON beside a folder.

Pure and deterministic: no times, paths or job ids, so that the same inputs give the same bytes. Does not know files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

import msgspec

from abliterate.contract.recipe import Recipe, Schedule, recipe_digest

PREFIX: Final = "abliterated."
VERSION: Final = PREFIX + "version"
# Known only once the tensors are written; the writer keeps room for them in the header and fills them in.
CONTENT: Final = PREFIX + "content"
RESIDUAL: Final = PREFIX + "residual"
COVERAGE: Final = PREFIX + "coverage"
PENDING_DIGEST: Final = "0" * 64


def provenance(
    *,
    version: str,
    recipe: Recipe,
    base: str,
    base_digest: str,
    direction_digest: str,
    direction_rank: int = 1,
    direction_origin: Mapping[str, Any],
    strengths: Sequence[tuple[float, float]],
    prompts_digest: str = "",
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The metadata of a product: what it came from, what was removed, how strongly, by which version.

    `strengths` is (attention, mlp) by layer. Values are strings, numbers and lists of numbers, as GGUF has them.
    """
    edit = recipe.edit
    found: dict[str, Any] = {
        VERSION: version,
        PREFIX + "base.name": placeless(base),
        PREFIX + "base.digest": base_digest,
        PREFIX + "recipe.digest": recipe_digest(portable(recipe)),
        PREFIX + "direction.digest": direction_digest,
        PREFIX + "direction.method": recipe.direction.method,
        PREFIX + "direction.rank": direction_rank,
        PREFIX + "direction.origin": json.dumps(_plain(direction_origin), sort_keys=True, separators=(",", ":")),
        PREFIX + "edit.norm": edit.norm,
        PREFIX + "edit.kernel": edit.kernel,
        PREFIX + "edit.post_norm": edit.post_norm,
        PREFIX + "edit.invert": edit.invert,
        PREFIX + "edit.strength.attention": [float(attention) for attention, _ in strengths],
        PREFIX + "edit.strength.mlp": [float(mlp) for _, mlp in strengths],
    }
    if prompts_digest:
        found[PREFIX + "prompts.digest"] = prompts_digest
    for name, value in sorted((metrics or {}).items()):
        found[PREFIX + "metric." + name] = float(value)
    # Room for what only the written tensors can tell.
    found |= {CONTENT: PENDING_DIGEST, COVERAGE: 0.0, RESIDUAL: 0.0}
    return found


def placeless(name: str) -> str:
    """Of a path the last part alone: where a file lay is nobody's business, and differs between machines."""
    named = name in ("", "builtin") or name.startswith(("ollama:", "hf:"))
    return name if named else PurePath(name).name


def portable(recipe: Recipe) -> Recipe:
    """The recipe without places, and without what changes no byte: the same wish on two machines is one recipe."""

    def each(value: str | list[str]) -> str | list[str]:
        return placeless(value) if isinstance(value, str) else [placeless(one) for one in value]

    replace = msgspec.structs.replace
    asked = recipe.prompts
    return replace(
        recipe,
        model=placeless(recipe.model),
        prompts=replace(asked, harmful=each(asked.harmful), harmless=each(asked.harmless), atoms=each(asked.atoms)),
        direction=replace(recipe.direction, file=placeless(recipe.direction.file)),
        run=replace(recipe.run, from_checkpoint=placeless(recipe.run.from_checkpoint)),
        schedule=Schedule(),
        replace=False,
        force=False,
    )


def _plain(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and words that are no paths: a sidecar by another's hand may hold anything."""
    return {
        name: value
        for name, value in origin.items()
        if value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) <= 200 and "/" not in value and "\\" not in value)
    }
