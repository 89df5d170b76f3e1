"""Editing weights: safetensors and GGUF against `cp`, memory against the largest tensor, the projection against the
dense one, and what rounding leaves in every type.

`measure(quick)` returns the figures; as a script it prints them, and with `--markdown` the table of types for the
docs. Every measurement runs in a process of its own, the sides take turns, and medians are told.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.random_llama import Shape, shape_for, write_folder, write_gguf

MIX = "Q4_K_M"


# -- the sides, each in its own process: JSON on stdout --------------------------------------------------------


def side_model(folder: str, quick: str) -> dict[str, float]:
    """Write the models."""
    shape = shape_for(quick == "quick")
    largest = write_folder(Path(folder, "base"), shape)
    write_gguf(Path(folder, "base.gguf"), shape, MIX)
    return {"largest": float(largest), "parameters": float(shape.parameters)}


def side_bake(source: str, target: str) -> dict[str, float]:
    """A folder of safetensors, edited into another."""
    from abliterate.contract.recipe import Edit
    from abliterated.pipeline.checkpoint import edit_checkpoint

    config = json.loads(Path(source, "config.json").read_text())
    return _edited(
        lambda: edit_checkpoint(Path(source), Path(target), _direction(config["hidden_size"]), Edit(), **QUIET)
    )


def side_bake_gguf(source: str, target: str) -> dict[str, float]:
    """A GGUF, edited into another."""
    from abliterate.contract.recipe import Edit
    from abliterated.pipeline.gguf_edit import edit_gguf
    from abliterated.pipeline.gguf_file import read_gguf

    direction = _direction(read_gguf(Path(source)).number("embedding_length"))
    return _edited(lambda: edit_gguf(Path(source), Path(target), direction, Edit(), metadata={}, **QUIET))


def side_requantise(source: str, _: str) -> dict[str, float]:
    """ggml's quantisers alone, on all cores, over the tensors an edit would touch; decoding is not counted."""
    from concurrent.futures import ThreadPoolExecutor

    from abliterate.contract.recipe import Edit
    from abliterated.pipeline.gguf_edit import plan_edit
    from abliterated.pipeline.gguf_file import read_gguf
    from abliterated.pipeline.quantize import dequantize, quantize

    structure = read_gguf(Path(source))
    direction = _direction(structure.number("embedding_length"))
    chosen = plan_edit(structure, direction, Edit(), allow_partial=False).chosen()
    stored, taken = np.memmap(source, dtype=np.uint8, mode="r"), 0.0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tensor in structure.tensors:
            if tensor.name not in chosen:
                continue
            raw = np.array(stored[tensor.start : tensor.start + tensor.size]).reshape(-1, tensor.row_size)
            values, kind = dequantize(raw, tensor.type), tensor.type
            parts = [values[first : first + 128] for first in range(0, len(values), 128)]
            start = time.perf_counter()
            list(pool.map(lambda part, kind=kind: quantize(part, kind), parts))
            taken += time.perf_counter() - start
    return {"seconds": taken}


def side_projection(rows: str, columns: str) -> dict[str, float]:
    """W − v(vᵀW), and with the columns' lengths kept, against (I − vvᵀ)W with the projector at hand."""
    from abliterated.pipeline.edit import edit_matrix

    source = np.random.default_rng(0)
    matrix = source.standard_normal((int(rows), int(columns)), dtype=np.float32)
    vector = source.standard_normal((1, int(rows)), dtype=np.float32)
    vector /= np.linalg.norm(vector)
    out = np.zeros_like(matrix)  # memory that is there already, as in the pipeline
    projector = np.eye(int(rows), dtype=np.float32) - vector.T @ vector
    taken: dict[str, list[float]] = {"dense": [], "plain": [], "columns": []}
    # As the pipeline does it: blocks of rows in threads, one a core. The dense product has BLAS's own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in range(7):
            for name, work in (
                ("dense", lambda: np.matmul(projector, matrix, out=out)),
                ("plain", lambda: edit_matrix(matrix, vector, 1.0, "none", out=out, each=pool.map)),
                ("columns", lambda: edit_matrix(matrix, vector, 1.0, "columns", out=out, each=pool.map)),
            ):
                time.sleep(0.2)  # BLAS's threads wait busily for a while, which the next one would pay for
                start = time.perf_counter()
                work()
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def side_type(name: str, width: str) -> dict[str, Any]:
    """One type: a random matrix in it, edited; what stays along the direction, and the noise."""
    from gguf import GGMLQuantizationType as Type

    from abliterated.pipeline.edit import edit_matrix
    from abliterated.pipeline.quantize import dequantize, quantize
    from abliterated.pipeline.tensor_edit import TOLERANCE, attempts, edit_rows

    kind, size = Type[name], int(width)
    source = np.random.default_rng(0)
    vector = source.standard_normal((1, size), dtype=np.float32)
    vector /= np.linalg.norm(vector)
    raw = quantize(source.standard_normal((size, 2 * size), dtype=np.float32) * np.float32(0.02), kind)
    base = dequantize(raw, kind)
    exact = edit_matrix(base, vector, 1.0, "columns")
    share, length = float(np.linalg.norm(vector @ base)), float(np.linalg.norm(exact))
    plainly = dequantize(quantize(exact, kind), kind)
    start = time.perf_counter()
    for way in attempts(kind, base.shape[1]):
        outcome = edit_rows(raw, kind, way, vector, 1.0, "columns")
        if outcome.rounding <= TOLERANCE * outcome.before:
            break
    taken = time.perf_counter() - start
    written = dequantize(outcome.raw, way.kind)
    return {
        "written": way.kind.name,
        "scales": "fresh" if way.fresh else "own",
        "residual": outcome.after / outcome.before,
        "noise": float(np.linalg.norm(written - exact)) / length,
        "rounded_residual": float(np.linalg.norm(vector @ plainly)) / share,
        "rounded_noise": float(np.linalg.norm(plainly - exact)) / length,
        "nanoseconds": taken / base.size * 1e9,
    }


TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4",
    "Q3_K", "Q2_K", "IQ3_S",
)  # fmt: skip
QUIET: dict[str, Any] = {"allow_partial": False, "progress": lambda done, total: None, "cancelled": lambda: False}


def _direction(width: int) -> Any:
    from abliterated.pipeline.directions import direction

    return direction(np.random.default_rng(1).standard_normal(width), origin={"method": "random"})


def _edited(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, memory above what the loaded runtime had, and what is left along the direction."""
    import psutil

    own = psutil.Process().memory_info().rss
    start, used = time.perf_counter(), _processor(resource.RUSAGE_SELF)
    report = work()
    taken, used = time.perf_counter() - start, _processor(resource.RUSAGE_SELF) - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": taken,
        "processor": used,
        "peak": float(max(0, peak - own)),
        "residual": report.residual,
        "coverage": report.coverage,
        "bytes": float(report.bytes_written),
    }


# -- the measurement -------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    """All figures. About a minute, or five when not quick; up to 6 GB in the temporary folder, removed at the end."""
    rounds, shape = 3 if quick else 5, shape_for(quick)
    with tempfile.TemporaryDirectory(prefix="abliterated-bench-") as name:
        folder = Path(name)
        made = _run("model", folder, "quick" if quick else "whole")
        found: dict[str, Any] = {"parameters": made["parameters"], "largest_tensor_mb": made["largest"] / 1e6}
        found["safetensors"] = _safetensors(folder, rounds, made["largest"])
        found["gguf"] = _gguf(folder, rounds)
    found["projection"] = _projection(shape)
    width = 512 if quick else 2048
    found["types"] = {kind: _run("type", kind, width) for kind in TYPES}
    found["types_width"] = width
    return found


def _safetensors(folder: Path, rounds: int, largest: float) -> dict[str, float]:
    base, out = folder / "base", folder / "out"
    sides = {
        "cp": lambda: _timed(["cp", "-r", str(base), str(out)]),
        "cp_synced": lambda: _timed(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "cp", str(base), str(out)]),
        "bake": lambda: _run("bake", base, out),
    }
    found: dict[str, float] = {}
    cold = hasattr(os, "posix_fadvise")
    for state in ("warm", "cold") if cold else ("warm",):
        taken = _take_turns(sides, rounds, out, base if state == "cold" else None, base)
        for name, runs in taken.items():
            found[f"{name}_{state}_seconds"] = statistics.median(run["seconds"] for run in runs)
            found[f"{name}_{state}_processor"] = statistics.median(run["processor"] for run in runs)
        found[f"ratio_{state}"] = found[f"bake_{state}_seconds"] / found[f"cp_{state}_seconds"]
        found[f"ratio_{state}_synced"] = found[f"bake_{state}_seconds"] / found[f"cp_synced_{state}_seconds"]
        found["peak_mb"] = max(found.get("peak_mb", 0.0), *(run["peak"] / 1e6 for run in taken["bake"]))
        found["residual"], found["coverage"] = taken["bake"][-1]["residual"], taken["bake"][-1]["coverage"]
    found["peak_over_bar"] = found["peak_mb"] / (3 * largest / 1e6 + 300)
    return found


def _gguf(folder: Path, rounds: int) -> dict[str, float]:
    base, out = folder / "base.gguf", folder / "out.gguf"
    sides = {
        "cp": lambda: _timed(["cp", str(base), str(out)]),
        "requantise": lambda: _run("requantise", base, out),
        "bake": lambda: _run("bake-gguf", base, out),
    }
    taken = _take_turns(sides, rounds, out, None, base)
    found = {f"{name}_seconds": statistics.median(run["seconds"] for run in runs) for name, runs in taken.items()}
    found["ratio"] = found["bake_seconds"] / (found["cp_seconds"] + found["requantise_seconds"])
    found["residual"], found["peak_mb"] = taken["bake"][-1]["residual"], taken["bake"][-1]["peak"] / 1e6
    return found


def _projection(shape: Shape) -> dict[str, float]:
    found = _run("projection", shape.width, shape.inner)
    return found | {"times_faster": found["dense"] / found["plain"], "columns_times": found["dense"] / found["columns"]}


def _take_turns(
    sides: dict[str, Callable[[], dict[str, Any]]], rounds: int, out: Path, forget: Path | None, warm: Path
) -> dict[str, list[dict[str, Any]]]:
    """Every side, `rounds` times, one after another; its output removed and the disk at rest between two."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            _page_cache(forget or warm, keep=forget is None)
            taken[name].append(side())
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return taken


def _page_cache(path: Path, *, keep: bool) -> None:
    """Put the files into the page cache, or out of it; no one else's files are touched."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            if keep:
                while opened.read(8 << 20):
                    pass
            else:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(command: list[str]) -> dict[str, Any]:
    start, used = time.perf_counter(), _processor(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    return {"seconds": time.perf_counter() - start, "processor": _processor(resource.RUSAGE_CHILDREN) - used}


def _processor(whose: int) -> float:
    """Seconds of processor, the kernel's included: what a busy machine stretches least."""
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def _run(side: str, *arguments: object) -> dict[str, Any]:
    """A side in a process of its own."""
    command = [sys.executable, "-m", "bench.weights", "--side", side, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- what people read ------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The figures against their bars."""
    tensors, gguf, worst = found["safetensors"], found["gguf"], max(row["residual"] for row in found["types"].values())
    rows = [("baking safetensors, warm: × cp", tensors["ratio_warm"], "≤ 2", tensors["ratio_warm"] <= 2)]
    if "ratio_cold" in tensors:
        rows.append(("baking safetensors, cold: × cp", tensors["ratio_cold"], "≤ 2", tensors["ratio_cold"] <= 2))
    peak, faster = tensors["peak_over_bar"], found["projection"]["times_faster"]
    rows += [
        ("  the same, warm: × cp and sync", tensors["ratio_warm_synced"], "", True),
        ("baking, peak memory: × (3 × largest + 300 MB)", peak, "≤ 1", peak <= 1),
        ("projection: × faster than dense", faster, "≥ 7", faster >= 7),
        ("  the same, lengths of columns kept", found["projection"]["columns_times"], "", True),
        (f"GGUF edit {MIX}: × (cp + requantising)", gguf["ratio"], "≤ 1.3", gguf["ratio"] <= 1.3),
        ("residual, worst of all types: %", 100 * worst, "≤ 1", worst <= 0.01),
    ]
    lines = [f"weights of {found['parameters'] / 1e9:.2f} B parameters"]
    lines += [f"{text:<48}{value:>9.2f} {bar:>7}  {'ok' if fine else 'over'}" for text, value, bar, fine in rows]
    return "\n".join(lines)


def markdown(found: dict[str, Any]) -> str:
    """The table of types, as docs/reference/quantised-weights.md has it."""
    lines = [
        "| type | written as | scales | left along v | noise | left by plain rounding | its noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["types"].items():
        scales = "—" if row["written"] in ("F32", "F16", "BF16") else row["scales"]
        lines.append(
            f"| {name} | {row['written']} | {scales} | {row['residual']:.3%} | {row['noise']:.3%} "
            f"| {row['rounded_residual']:.3%} | {row['rounded_noise']:.3%} |"
        )
    return "\n".join(lines)


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "model": side_model, "bake": side_bake, "bake-gguf": side_bake_gguf, "requantise": side_requantise,
    "projection": side_projection, "type": side_type,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.weights", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the parameters")
    parser.add_argument("--markdown", action="store_true", help="only the table of types, as the docs have it")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        name, *arguments = options.side
        print(json.dumps(SIDES[name](*arguments)))
    elif options.markdown:
        width = 512 if options.quick else 2048
        print(markdown({"types": {kind: _run("type", kind, width) for kind in TYPES}}))
    else:
        found = measure(options.quick)
        print(json.dumps(found, indent=2))
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
