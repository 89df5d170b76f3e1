"""Directions as other tools know them: read where they read, and in files that go both ways.

Two conventions are about. One takes the residual stream on its way into layer int(0.6 L), `hidden_states[i]`; the
other on its way out of a layer, `hidden_states[i + 1]`. Both subtract means and make the difference unit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from abliterate.contract.errors import ModelError
from abliterate.contract.messages import Task
from abliterate.contract.recipe import Run, recipe_from_table
from abliterated.pipeline.direction_files import read_direction, write_direction
from abliterated.pipeline.directions import direction
from abliterated.pipeline.loading import Loaded, load
from abliterated.pipeline.prompts import read_prompts
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.run import run
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from abliterated.refuser import files

COUNT = 48


def table(convention: str) -> dict[str, Any]:
    return {
        "model": str(files().model),
        "prompts": {"harmful": str(files().harmful), "harmless": str(files().harmless), "count": COUNT},
        "direction": {"method": "layer", "layer": 0.6, "convention": convention, "orthogonalize": False},
        "export": {"format": "direction"},
        "run": {"dtype": "float32", "device": "cpu"},
    }


@pytest.fixture(scope="module")
def refuser() -> Loaded:
    return load(open_source(files().model), Run(dtype="float32", device="cpu"), Watch())


@pytest.mark.parametrize(("convention", "behind"), [("input", 0), ("output", 1)])
def test_the_direction_is_that_of_a_plain_loop_over_the_same_prompts(
    convention: str, behind: int, refuser: Loaded, tmp_path: Path
) -> None:
    recipe = recipe_from_table(table(convention))
    work, output = str(tmp_path / "work"), str(tmp_path / "out")
    run(Task(recipe=recipe, base="refuser:latest", source=recipe.model, work=work, output=output), print_nothing, never)
    ours = read_direction(tmp_path / "out" / "direction.safetensors", refuser.source.hidden_size, refuser.source.layers)

    prompts, rendered = read_prompts(recipe.prompts), renderer(refuser.tokenizer, 2048)
    layer = int(0.6 * len(refuser.model.model.layers))
    sums = []
    for side in (prompts.harmful.training, prompts.harmless.training):
        assert len(side) == COUNT
        total = torch.zeros(refuser.source.hidden_size, dtype=torch.float64)
        for prompt in side:  # one prompt after another, the whole model for each, all its states kept
            ids = refuser.tokenizer(rendered.text(prompt), add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                states = refuser.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            total += states[layer + behind][0, -1].double()
        sums.append(total / len(side))
    theirs = sums[0] - sums[1]
    theirs /= theirs.norm()

    cosine = float(theirs.numpy() @ ours.for_layer(0)[0].astype(np.float64))
    assert cosine >= 0.9999
    assert ours.origin["convention"] == convention
    assert ours.origin["layer"] == layer


def test_the_two_conventions_are_two_directions(refuser: Loaded, tmp_path: Path) -> None:
    found = []
    for convention in ("input", "output"):
        recipe = recipe_from_table(table(convention))
        folder = tmp_path / convention
        asked = Task(
            recipe=recipe, base="refuser:latest", source=recipe.model, work=str(folder / "work"), output=str(folder)
        )
        run(asked, print_nothing, never)
        path = folder / "direction.safetensors"
        found.append(read_direction(path, refuser.source.hidden_size, refuser.source.layers).for_layer(0)[0])
    assert float(found[0] @ found[1]) < 0.999


def test_a_written_file_is_what_torch_and_safetensors_users_expect(tmp_path: Path) -> None:
    made = direction(np.arange(1.0, 9.0), origin={"method": "layer", "layer": 3.0, "convention": "input"})
    write_direction(tmp_path / "refusal.pt", made, {})
    write_direction(tmp_path / "refusal.safetensors", made, {})
    loaded = torch.load(tmp_path / "refusal.pt", weights_only=True)
    with safe_open(tmp_path / "refusal.safetensors", framework="pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dictionary
    assert len(stored) == 1
    for tensor in (loaded, stored[0]):
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.ndim, tensor.dtype, tensor.device.type) == (1, torch.float32, "cpu")
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert float(tensor.norm()) == pytest.approx(1.0)
        np.testing.assert_array_equal(tensor.numpy(), made.for_layer(0)[0])
        # How such a script uses it: a projection of activations, and of a matrix that writes.
        stream = torch.randn(2, 5, 8)
        assert (stream - (stream @ tensor)[..., None] * tensor).shape == stream.shape
    for suffix in ("pt", "safetensors"):
        sidecar = json.loads((tmp_path / f"refusal.{suffix}.json").read_text())
        assert (sidecar["layer"], sidecar["convention"], sidecar["rank"]) == (3.0, "input", 1)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("shape", ["(H,)", "(1,H)", "(H,1)", "(H,k)", "per layer", "per layer, a name each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_shape_of_a_direction_is_read(shape: str, dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    hidden, layers = 16, 3
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0)).double())[0]
    stored: Any = {
        "(H,)": basis[0],
        "(1,H)": basis[:1],
        "(H,1)": basis[0][:, None],
        "(H,k)": basis[:2].T,
        "per layer": {"per_layer": True, "directions": basis[:layers]},
        "per layer, a name each": {str(layer): basis[layer] for layer in range(layers)},
    }[shape]
    path = tmp_path / f"theirs.{suffix}"
    if isinstance(stored, dict):
        stored = {
            name: value.to(dtype).contiguous() if isinstance(value, torch.Tensor) else value
            for name, value in stored.items()
        }
    else:
        stored = stored.to(dtype).contiguous()
    if suffix == "pt":
        torch.save(stored, path)
    else:
        from safetensors.torch import save_file

        tensors = stored if isinstance(stored, dict) else {"direction": stored}
        facts = {"per_layer": "true"} if "per_layer" in tensors else None
        save_file({name: value for name, value in tensors.items() if name != "per_layer"}, path, facts)
    found = read_direction(path, hidden, layers)
    assert found.per_layer is shape.startswith("per layer")
    assert found.rank == (2 if shape == "(H,k)" else 1)
    for layer in range(layers):
        wanted = basis[layer if found.per_layer else 0].numpy()
        np.testing.assert_allclose(found.for_layer(layer)[0], wanted, atol=1e-2)


def test_a_layer_missing_from_a_dictionary_is_no_direction(tmp_path: Path) -> None:
    torch.save({"0": torch.ones(8), "2": torch.ones(8)}, tmp_path / "gaps.pt")
    with pytest.raises(ModelError, match=r"gaps\.pt"):
        read_direction(tmp_path / "gaps.pt", 8, 3)


def print_nothing(_: object) -> None:
    pass


def never() -> bool:
    return False
