"""Measuring: streamed, layer by layer, against one prompt at a time through `generate`, and against the whole model in
memory.

A random-weight Llama in bf16 made on the spot; 128 + 128 prompts of 12–40 tokens behind a shared beginning of 30;
streams of the layers below 0.8 L. Each side runs in a process of its own. The reference way runs on a sample of the
prompts, and its time is scaled to all of them; its loading is not counted, ours (reading every layer) is. As a script
it prints the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.random_llama import shape_for, write_folder

PROMPTS, SHARED, SHORTEST, LONGEST = 256, 30, 12, 40
BELOW = 0.8
POSITIONS = (-1, -2, -3, -4, -5)
SAMPLE = {True: 32, False: 16}
FASTER, SMALLER = 3.0, 0.35


def measure(quick: bool) -> dict[str, float]:
    """The figures: seconds, megabytes, ratios."""
    shape = shape_for(quick)
    with tempfile.TemporaryDirectory(prefix="bench-measuring-") as place:
        folder = Path(place) / "llama"
        write_folder(folder, shape)
        streamed = _side("streamed", folder, quick)
        scored = _side("scored", folder, quick)
        reference = _side("reference", folder, quick)
        whole = _side("whole", folder, quick)
    return {
        "parameters": float(shape.parameters),
        "prompts": float(PROMPTS),
        "layers_read": streamed["layers"],
        "streamed_s": streamed["seconds"],
        "streamed_with_scores_s": scored["seconds"],
        "reference_s": reference["seconds"],
        "reference_sample": float(SAMPLE[quick]),
        "faster": reference["seconds"] / streamed["seconds"],
        "faster_with_scores": reference["seconds"] / scored["seconds"],
        "streamed_mb": streamed["peak"] / 2**20,
        "streamed_with_scores_mb": scored["peak"] / 2**20,
        "whole_mb": whole["resident"] / 2**20,
        "memory_ratio": streamed["peak"] / whole["resident"],
        "memory_ratio_with_scores": scored["peak"] / whole["resident"],
    }


def table(figures: dict[str, float]) -> str:
    """The figures against their bars."""
    faster, share = figures["faster"], figures["memory_ratio"]
    size, sample = figures["parameters"] / 1e9, int(figures["reference_sample"])
    return "\n".join(
        [
            f"measuring {int(figures['prompts'])} prompts, Llama of {size:.2f} B in bf16, computed in float32",
            f"  {'':<44}{'seconds':>9}{'peak MB':>9}",
            f"  {'streamed, layers below 0.8 L':<44}{figures['streamed_s']:>9.1f}{figures['streamed_mb']:>9.0f}",
            f"  {'streamed, all layers and refusal scores':<44}{figures['streamed_with_scores_s']:>9.1f}"
            f"{figures['streamed_with_scores_mb']:>9.0f}",
            f"  {f'one by one, generate ({sample} timed, scaled)':<44}{figures['reference_s']:>9.1f}",
            f"  {'whole model in memory, bf16':<44}{'':>9}{figures['whole_mb']:>9.0f}",
            f"  faster: {faster:.1f}× (bar ≥ {FASTER:.0f}×) {_said(faster >= FASTER)}; "
            f"with refusal scores {figures['faster_with_scores']:.1f}×",
            f"  memory: {share:.2f}× (bar ≤ {SMALLER:.2f}×) {_said(share <= SMALLER)}; "
            f"with refusal scores {figures['memory_ratio_with_scores']:.2f}×",
        ]
    )


def _said(kept: bool) -> str:
    return "ok" if kept else "over"


def _side(name: str, folder: Path, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.measuring", "--side", name, "--folder", str(folder)]
    done = subprocess.run(
        command + ["--quick"] * quick, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rows(vocabulary: int) -> list[tuple[int, ...]]:
    source = random.Random(0)
    beginning = [source.randrange(vocabulary) for _ in range(SHARED)]
    lengths = [source.randint(SHORTEST, LONGEST) for _ in range(PROMPTS)]
    return [(*beginning, *(source.randrange(vocabulary) for _ in range(length))) for length in lengths]


def _stream(folder: Path, rows: list[tuple[int, ...]], *, scores: bool) -> dict[str, float]:
    """The mean streams as the pipeline reads them; with `scores`, the next token's probabilities too."""

    from abliterate.contract.recipe import Run
    from abliterated.pipeline.activations import read_streams, streams_alone, sum_streams
    from abliterated.pipeline.loading import Loaded, open_engine
    from abliterated.pipeline.source import open_source
    from abliterated.pipeline.watch import Watch

    resident = _runtime()
    start = time.perf_counter()
    source = open_source(folder)
    engine = open_engine(source, Run(device="cpu"))
    loaded = Loaded(source, engine.skeleton.model, None, engine.skeleton.device, engine)
    depth, total = math.ceil(BELOW * source.layers), None
    if scores:
        for reading in read_streams(loaded, rows, POSITIONS, "output", Watch(), "", depth=depth):
            total = sum_streams(total, reading.streams)
    else:
        for _, streams in streams_alone(loaded, rows, POSITIONS, ("output", depth), Watch(), ""):
            total = sum_streams(total, streams)
    assert total is not None
    taken = time.perf_counter() - start
    return {"seconds": taken, "peak": _memory("VmHWM") - resident, "layers": float(engine.layers_read)}


def _reference(folder: Path, rows: list[tuple[int, ...]], sample: int) -> dict[str, float]:
    """Seconds for all rows, one by one through `generate`; in float32, which a CPU computes fastest in."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def ask(row: tuple[int, ...]) -> Any:
        ids = torch.tensor([row])
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            use_cache=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        ).hidden_states

    with torch.inference_mode():
        ask(rows[-1])
        start = time.perf_counter()
        for row in rows[:sample]:
            ask(row)
    return {"seconds": (time.perf_counter() - start) / sample * len(rows)}


def _whole(folder: Path) -> dict[str, float]:
    """What the loaded model holds, in the type its file has."""
    import torch
    from transformers import AutoModelForCausalLM

    resident = _runtime()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    return {"resident": _memory("VmRSS") - resident}


def _runtime() -> float:
    """Bytes the libraries take up before there is a model, everything imported that either side needs."""
    import importlib

    import torch

    for name in ("accelerate", "transformers.core_model_loading", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    assert torch.isfinite(torch.ones(64, 64) @ torch.ones(64, 64)).all()
    return _memory("VmRSS")


def _memory(what: str) -> float:
    """Bytes, as the kernel counts them for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return float(line.split()[1]) * 1024
    raise SystemExit("only Linux says how much memory a process held at most")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--side", choices=("streamed", "scored", "reference", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        print(table(measure(options.quick)))
        return 0
    rows = _rows(shape_for(options.quick).vocabulary)
    if options.side == "whole":
        found = _whole(options.folder)
    elif options.side == "reference":
        found = _reference(options.folder, rows, SAMPLE[options.quick])
    else:
        found = _stream(options.folder, rows, scores=options.side == "scored")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
