"""What a product says of itself is the same wherever and whenever it was made, and another for another wish."""

from __future__ import annotations

from typing import Any

import pytest

from abliterate.contract.recipe import recipe_digest, recipe_from_table
from abliterated.pipeline.provenance import portable


def told(model: str = "/home/ada/models/base.gguf", **tables: Any) -> str:
    return recipe_digest(portable(recipe_from_table({"model": model, "name": "mine", **tables})))


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"model": "/srv/base.gguf"},
        {"schedule": {"priority": 7, "window": "01:00-07:00"}},
        {"replace": True},
        {"force": True},
        {"direction": {"method": "file", "file": "/tmp/d.pt"}},
    ],
)
def test_places_and_times_make_no_other_product(elsewhere: dict[str, Any]) -> None:
    here = {"direction": {"method": "file", "file": "/home/ada/d.pt"}} if "direction" in elsewhere else {}
    assert told(**elsewhere) == told(**here)


@pytest.mark.parametrize("other", [{"edit": {"strength": 0.9}}, {"prompts": {"seed": 1}}, {"search": {"trials": 3}}])
def test_another_wish_does(other: dict[str, Any]) -> None:
    assert told(**other) != told()
