"""A few giant activations own a mean: `direction.winsorize` clips them before the means are taken, and is off else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import recipe_from_table
from abliterated.pipeline.directions import winsorise
from abliterated.pipeline.measure import _clipped
from abliterated.pipeline.run import run
from pipeline.folders import task
from pipeline.planted import plant


def test_each_prompts_stream_is_clipped_by_itself_and_the_ordinary_ones_hardly() -> None:
    streams = torch.randn(3, 2, 1, 400, generator=torch.Generator().manual_seed(0))
    streams[1, 0, 0, 7] = 5000.0
    clipped = _clipped(streams, 0.995)
    np.testing.assert_allclose(clipped.numpy(), winsorise(streams.double().numpy(), 0.995))
    assert float(clipped.abs().max()) < 10
    untouched = (clipped - streams).abs().flatten(1).gt(1e-6).sum(1)
    assert int(untouched.max()) <= 2 * 2 + 1
    assert _clipped(streams, 1.0) is streams


def found(folder: Path, **direction: Any) -> dict[str, Any]:
    folder.mkdir()
    asked = task(plant(folder), direction={"method": "layer", "layer": 2, **direction}, export={"format": "direction"})
    run(asked, lambda _: None, lambda: False)
    told: dict[str, Any] = json.loads((folder / "out" / "direction.safetensors.json").read_text())
    return told


def test_the_recipe_asks_for_it_and_the_sidecar_says_so(tmp_path: Path) -> None:
    off, on = found(tmp_path / "off"), found(tmp_path / "on", winsorize=0.9)
    assert "winsorized" not in off
    assert on["winsorized"] == 0.9
    assert on["digest"] != off["digest"]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.01])
def test_a_quantile_that_leaves_nothing_is_refused(value: float) -> None:
    with pytest.raises(RecipeError, match=r"direction\.winsorize"):
        recipe_from_table({"model": "./m.gguf", "direction": {"winsorize": value}})
