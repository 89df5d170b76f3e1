"""Direction files: what other tools write is read, and what we write they read.

Read: `.pt` (never unpickled beyond tensors) and `.safetensors` of (H,), (1, H), (H, 1) or (H, k), a dictionary with
`per_layer` and `directions` (L, H), and one of tensors by layer number. Written: one float32 vector (H,), or (H, k), or
per layer (L, H), with a JSON sidecar that says how it was found. Does not know models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.contract.errors import ModelError, RecipeError
from abliterated.pipeline.directions import Float64, RefusalDirection, direction
from abliterated.pipeline.safe_write import Output

ONE, MANY = "direction", "directions"


def read_direction(path: Path, hidden_size: int, layers: int) -> RefusalDirection:
    """The direction in `path`, for a model so wide and so deep. RecipeError, or ModelError where it does not fit."""
    if path.suffix == ".safetensors":
        tensors, facts = _read_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        tensors, facts = _read_torch(path)
    else:
        raise RecipeError(f"{path.name} is no direction file", remedy="Give a .pt or .safetensors file")
    per_layer = bool(facts.get("per_layer", False)) and str(facts["per_layer"]).lower() != "false"
    if tensors and all(name.isdecimal() for name in tensors):
        tensors, per_layer = {MANY: _by_number(path, tensors, layers)}, True
    name = next((name for name in (ONE, MANY, *tensors) if name in tensors), None)
    if name is None or (len(tensors) > 1 and name not in (ONE, MANY)):
        held = "no tensor" if name is None else f"{len(tensors)} tensors, and none is called {ONE}"
        raise ModelError(f"{path.name} holds {held}", remedy="Give a file with one direction")
    origin = {"method": "file", **_sidecar(path)}
    origin["method"] = "file"
    shaped = _shaped(path, tensors[name], hidden_size, layers, per_layer)
    _check_numbers(path, shaped, per_layer)
    return direction(shaped, origin=origin, per_layer=per_layer)


def write_direction(path: Path, found: RefusalDirection, facts: Mapping[str, Any]) -> None:
    """Write `path` (.safetensors or .pt) and beside it `path.json`, each whole or not at all."""
    vectors = np.ascontiguousarray(found.vectors[:, 0] if found.per_layer else found.vectors[0].T, dtype=np.float32)
    if found.per_layer and found.rank > 1:
        vectors = found.vectors
    if not found.per_layer and found.rank == 1:
        vectors = vectors[:, 0].copy()
    name = MANY if found.per_layer else ONE
    sidecar = {
        **found.origin,
        "per_layer": found.per_layer,
        "rank": found.rank,
        "hidden_size": found.hidden_size,
        "digest": found.digest(),
        **facts,
    }
    data = _torch_bytes(name, vectors, found.per_layer) if path.suffix == ".pt" else _safetensors(name, vectors, found)
    with Output(path) as output:
        output.write(data)
    write_json(path.with_name(path.name + ".json"), sidecar)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with Output(path) as output:
        output.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _shaped(path: Path, found: Float64, hidden_size: int, layers: int, per_layer: bool) -> Float64:
    """The tensor as (hidden,), (rank, hidden), or per layer (layers, [rank,] hidden)."""
    if per_layer:
        if found.ndim not in (2, 3) or found.shape[-1] != hidden_size or len(found) != layers:
            raise _misfit(path, found, f"({layers}, {hidden_size})")
        return found
    if found.ndim == 1 and len(found) == hidden_size:
        return found
    if found.ndim == 2 and found.shape[0] == hidden_size and found.shape[1] < hidden_size:
        return found.T
    if found.ndim == 2 and found.shape == (1, hidden_size):
        return found
    raise _misfit(path, found, f"({hidden_size},)")


def _check_numbers(path: Path, found: Float64, per_layer: bool) -> None:
    """ModelError where a vector is no direction: zeros, NaN, Inf."""
    lengths = np.linalg.norm(found, axis=-1).reshape(-1)
    broken, empty = np.flatnonzero(~np.isfinite(lengths)), np.flatnonzero(lengths == 0)
    if broken.size or empty.size:
        which = int(broken[0] if broken.size else empty[0]) // (found.shape[1] if found.ndim == 3 else 1)
        where = f" for layer {which}" if per_layer else f" in column {which}" if lengths.size > 1 else ""
        raise ModelError(
            f"{path.name} holds {'NaN or Inf' if broken.size else 'a vector of zeros'}{where}: that is no direction",
            remedy="Measure it again, in float32",
        )


def _by_number(path: Path, tensors: Mapping[str, Float64], layers: int) -> Float64:
    """Tensors named by their layers, 0 … , as one."""
    numbered = {int(name): tensor.reshape(-1) for name, tensor in tensors.items()}
    missing = sorted(set(range(layers)) - set(numbered))
    if missing or len({len(tensor) for tensor in numbered.values()}) > 1:
        what = f"no direction for layer {missing[0]}" if missing else "directions of different widths"
        raise ModelError(f"{path.name} holds {what}", remedy="Measure the directions on this model")
    return np.stack([numbered[layer] for layer in sorted(numbered)])


def _misfit(path: Path, found: Float64, wanted: str) -> ModelError:
    return ModelError(
        f"{path.name} holds a direction of shape {found.shape}, the model needs {wanted}",
        remedy="Measure the direction on this model; several directions stand as columns, (hidden, k)",
    )


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kept = ("convention", "layer", "position", "orthogonalized", "bypass", "kl", "induce")
    return {name: found[name] for name in kept if name in found} if isinstance(found, dict) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Float64], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = dict(file.metadata() or {})
            names = list(file.keys())
            halves = any(file.get_slice(name).get_dtype() == "BF16" for name in names)
            if not halves:
                return {name: np.asarray(file.get_tensor(name), dtype=np.float64) for name in names}, facts
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            return {name: file.get_tensor(name).double().numpy() for name in names}, facts
    except Exception as error:  # the reader is Rust: its errors are its own
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> tuple[dict[str, Float64], dict[str, Any]]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        raise _unreadable(path, error, "it is no PyTorch file of tensors alone") from error
    entries = found if isinstance(found, dict) else {ONE: found}
    try:
        tensors = {
            str(name): value.detach().double().numpy()
            for name, value in entries.items()
            if isinstance(value, torch.Tensor) and not value.is_complex()
        }
    except (TypeError, RuntimeError) as error:  # sparse, quantised
        raise _unreadable(path, error) from error
    return tensors, {str(name): value for name, value in entries.items() if isinstance(value, bool | int | str)}


def _unreadable(path: Path, error: Exception, what: str = "") -> RecipeError:
    line = what or str(error).strip().partition("\n")[0][:160] or type(error).__name__
    return RecipeError(
        f"can't read the direction in {path.name}: {line}", remedy="Give a .pt or .safetensors of tensors"
    )


def _safetensors(name: str, vectors: Any, found: RefusalDirection) -> bytes:
    from safetensors.numpy import save

    data: bytes = save({name: np.ascontiguousarray(vectors)}, {"per_layer": "true" if found.per_layer else "false"})
    return data


def _torch_bytes(name: str, vectors: Any, per_layer: bool) -> bytes:
    import io

    import torch

    tensor = torch.from_numpy(np.array(vectors, dtype=np.float32))
    buffer = io.BytesIO()
    torch.save({"per_layer": True, name: tensor} if per_layer else tensor, buffer)
    return buffer.getvalue()
