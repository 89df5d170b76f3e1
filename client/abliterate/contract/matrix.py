"""`[matrix]`: one recipe, many jobs, one for every combination of its lists. Pure. Does not know jobs or queues."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

import msgspec

from abliterate.contract.errors import RecipeError
from abliterate.contract.names import parse_name
from abliterate.contract.recipe import Recipe, recipe_with, target_name

MOST_JOBS = 64


def expand(recipe: Recipe, source: str = "recipe") -> list[Recipe]:
    """The recipes a recipe stands for, each without a matrix; itself where it has none.

    Combinations come in the order of the lists, the last list turning fastest. Where no `name` tells the products
    apart, the values go into the tag. Raises RecipeError for a key that isn't one, a bad value, or two equal names.
    """
    if not recipe.matrix:
        return [recipe]
    axes = [(key, values) for key, values in recipe.matrix.items()]
    count = 1
    for key, values in axes:
        if not values:
            raise RecipeError(f"{source}: matrix.{key}: an empty list makes no job", remedy="Give it values")
        count *= len(values)
    if count > MOST_JOBS:
        raise RecipeError(f"{source}: the matrix makes {count} jobs", remedy=f"Keep it to {MOST_JOBS}")
    plain = msgspec.structs.replace(recipe, matrix={})
    made = [
        _one(plain, dict(zip((key for key, _ in axes), values, strict=True)), source)
        for values in itertools.product(*(values for _, values in axes))
    ]
    names: set[str] = set()
    for one in made:
        name = target_name(one)
        if name.key() in names:
            raise RecipeError(
                f"{source}: two of the matrix's jobs make {name.short()}", remedy="Put the names into the matrix"
            )
        names.add(name.key())
    return made


def part_id(job_id: str, number: int) -> str:
    """The id of a matrix's job `number`: the first has the recipe's own, the others follow from it."""
    if number == 0:
        return job_id
    from abliterate.contract.ids import encoded, time_of

    random = int.from_bytes(hashlib.sha256(f"{job_id}/{number}".encode()).digest()[:10], "big")
    return encoded(time_of(job_id) << 80 | random)


def _one(plain: Recipe, values: dict[str, Any], source: str) -> Recipe:
    for key in values:
        if (head := key.partition(".")[0]) in ("matrix", "schedule"):
            raise RecipeError(f"{source}: matrix.{key}: {head} can't be varied", remedy="Leave it out")
    made = recipe_with(plain, values, f"{source}, matrix {_told(values)}")
    varied = {key: value for key, value in values.items() if key not in ("model", "name")}
    marks = [f"{key.rpartition('.')[2]}-{_mark(value)}" for key, value in varied.items()]
    if "name" in values or not marks:
        return made
    base = target_name(made)
    tag = "-".join([base.tag, *marks])[:80]
    name = base.short().removesuffix(f":{base.tag}")
    return msgspec.structs.replace(made, name=parse_name(f"{name}:{tag}").short())


def _mark(value: Any) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", str(value).lower()).strip("-._")[:32] or "x"


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value)[:60]}" for key, value in values.items())
