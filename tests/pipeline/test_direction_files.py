"""Direction files of every shape other tools use, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from abliterate.contract.errors import ModelError, RecipeError
from abliterated.pipeline.direction_files import read_direction, write_direction
from abliterated.pipeline.directions import direction

HIDDEN, LAYERS = 12, 3
VECTOR = torch.linspace(-1, 2, HIDDEN)
UNIT = (VECTOR / VECTOR.norm()).numpy()


@pytest.mark.parametrize(
    "stored", [VECTOR, VECTOR[None, :], VECTOR[:, None], VECTOR.to(torch.bfloat16), VECTOR.double() * 7]
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_one_direction_in_any_shape_and_precision(tmp_path: Path, stored: torch.Tensor, suffix: str) -> None:
    path = tmp_path / f"direction.{suffix}"
    torch.save(stored, path) if suffix == "pt" else save_file({"direction": stored.contiguous()}, path)
    found = read_direction(path, HIDDEN, LAYERS)
    assert found.vectors.shape == (1, 1, HIDDEN)
    np.testing.assert_allclose(found.for_layer(1)[0], UNIT, atol=3e-3)
    assert found.origin["method"] == "file"


def test_several_directions_stand_as_columns(tmp_path: Path) -> None:
    torch.save(torch.eye(HIDDEN)[:, [4, 7]] * 3, tmp_path / "two.pt")
    found = read_direction(tmp_path / "two.pt", HIDDEN, LAYERS)
    assert found.rank == 2
    assert found.for_layer(0)[1, 7] == 1


def test_a_dictionary_by_layer(tmp_path: Path) -> None:
    torch.save({"per_layer": True, "directions": torch.eye(HIDDEN)[:LAYERS] * 2}, tmp_path / "layers.pt")
    found = read_direction(tmp_path / "layers.pt", HIDDEN, LAYERS)
    assert found.per_layer
    assert found.for_layer(2)[0, 2] == 1
    with pytest.raises(ModelError, match="shape"):
        read_direction(tmp_path / "layers.pt", HIDDEN, LAYERS + 1)


@pytest.mark.parametrize("shape", [(HIDDEN + 1,), (2, HIDDEN), (HIDDEN, HIDDEN), (1, 1, HIDDEN)])
def test_a_direction_of_the_wrong_width_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save(torch.ones(shape), tmp_path / "wide.pt")
    with pytest.raises(ModelError, match=r"wide\.pt"):
        read_direction(tmp_path / "wide.pt", HIDDEN, LAYERS)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(RecipeError, match=r"evil\.pt"):
        read_direction(tmp_path / "evil.pt", HIDDEN, LAYERS)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "direction.npy"])
def test_what_can_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "direction.npy").write_bytes(b"")
    with pytest.raises(RecipeError, match=name):
        read_direction(tmp_path / name, HIDDEN, LAYERS)


@pytest.mark.parametrize("values", [torch.zeros(HIDDEN), torch.full((HIDDEN,), torch.nan)])
def test_a_direction_of_nothing_is_refused(tmp_path: Path, values: torch.Tensor) -> None:
    torch.save(values, tmp_path / "none.pt")
    with pytest.raises(ModelError, match=r"none\.pt holds (a vector of zeros|NaN or Inf)"):
        read_direction(tmp_path / "none.pt", HIDDEN, LAYERS)


def test_a_layer_or_column_of_zeros_is_named(tmp_path: Path) -> None:
    rows = torch.eye(HIDDEN)[:LAYERS].clone()
    rows[1] = 0
    torch.save({"per_layer": True, "directions": rows}, tmp_path / "layers.pt")
    with pytest.raises(ModelError, match=r"layers\.pt holds a vector of zeros for layer 1"):
        read_direction(tmp_path / "layers.pt", HIDDEN, LAYERS)
    torch.save(torch.stack([torch.ones(HIDDEN), torch.zeros(HIDDEN)], dim=1), tmp_path / "columns.pt")
    with pytest.raises(ModelError, match="zeros in column 1"):
        read_direction(tmp_path / "columns.pt", HIDDEN, LAYERS)


@pytest.mark.parametrize("junk", [b"", b"junk" * 99, b"PK\x03\x04" + bytes(99)])
def test_a_file_of_junk_is_named_as_such(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.pt").write_bytes(junk)
    with pytest.raises(RecipeError, match=r"junk\.pt: it is no PyTorch file"):
        read_direction(tmp_path / "junk.pt", HIDDEN, LAYERS)


@pytest.mark.parametrize("value", [[1.0, 2.0], torch.ones(HIDDEN, dtype=torch.complex64), {"a": 1}])
def test_a_file_without_a_vector_is_named(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"odd\.pt holds no tensor"):
        read_direction(tmp_path / "odd.pt", HIDDEN, LAYERS)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(("rank", "per_layer"), [(1, False), (2, False), (1, True), (2, True)])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, rank: int, per_layer: bool) -> None:
    source = np.random.default_rng(0)
    values = source.normal(size=(LAYERS, rank, HIDDEN) if per_layer else (rank, HIDDEN))
    made = direction(values, origin={"method": "auto", "layer": 2.0, "convention": "output"}, per_layer=per_layer)
    path = tmp_path / f"direction.{suffix}"
    write_direction(path, made, {"inputs": "abc"})
    found = read_direction(path, HIDDEN, LAYERS)
    assert found.digest() == made.digest()
    assert found.origin["layer"] == 2.0
    sidecar = json.loads((tmp_path / f"direction.{suffix}.json").read_text())
    assert sidecar["digest"] == made.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name, path.name + ".json"]


def test_one_direction_is_written_as_the_scripts_expect_it(tmp_path: Path) -> None:
    write_direction(tmp_path / "direction.pt", direction(VECTOR.numpy(), origin={}), {})
    found = torch.load(tmp_path / "direction.pt", weights_only=True)
    assert found.dtype == torch.float32
    assert found.shape == (HIDDEN,)
    assert found.device.type == "cpu"
