"""`abliterated direction`: find the direction a model refuses along, and write it to a file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from abliterate.contract.errors import RecipeError
from abliterated.commands.foreground import MODEL_HELP, common, ran, recipe_of

HELP = "find the direction a model refuses along, and write it to a file"
EXAMPLES = """\
examples:
  abliterated direction qwen3:8b -o refusal.pt
  abliterated direction ./model.gguf --harmful bad.txt --harmless good.txt -o refusal.pt
  abliterated direction ./folder --layer 0.4 --layer 0.6 --convention input -o refusal.safetensors
  abliterated apply qwen3:8b --direction refusal.pt --out result/

Prompt files hold one prompt a line; # begins a comment; a folder means all its *.txt. Without --layer every layer and
position is tried on prompts kept back, and the one that stops refusing with the least harm is taken. The file is one
float32 vector (hidden,), or (hidden, k), or a dictionary by layer: Sumandora's script and ollama-forge read it. Beside
it lies FILE.json, which says how it was found.
stdout: one line of JSON: layer_frac, layer_index, gap_norm (ollama-forge's keys) and more.
exit codes: 0 done; 2 an option is wrong; 3 the model can't be used, or refuses nothing; 4 no room; 70 out of memory;
75 Ollama is away; 86 stopped."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .pt or .safetensors file")
    for kind in ("harmful", "harmless"):
        parser.add_argument(
            f"--{kind}",
            f"--{kind}-dir",
            action="append",
            metavar="F",
            help="a file or folder of prompts; repeatable (default: builtin)",
        )
    parser.add_argument(
        "--count", "--num-instructions", type=int, default=128, metavar="N", help="prompts of each kind (default 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts (default 0)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt while measuring")
    parser.add_argument(
        "--layer",
        "--layer-frac",
        "--layer-fracs",
        dest="layers",
        action="append",
        nargs="+",
        metavar="L",
        help="a fraction of the depth (0.6) or a layer's number (12); several are tried in turn (default: all)",
    )
    parser.add_argument("--position", type=int, metavar="P", help="token read, from the end (default -1)")
    parser.add_argument("--index", type=float, metavar="X", help="between two layers' directions, as 14.5")
    parser.add_argument(
        "--rank", "--num-directions", type=int, default=1, metavar="K", help="number of directions (default 1)"
    )
    parser.add_argument("--per-layer", "--per-layer-directions", action="store_true", help="one direction a layer")
    parser.add_argument(
        "--convention", choices=("output", "input"), default="output", help="side of the layer read (default output)"
    )
    parser.add_argument("--winsorize", type=float, default=1.0, metavar="Q", help="clip activations at that quantile")
    parser.add_argument("--keep-mean", action="store_true", help="leave the harmless mean's component in it")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)  # it is JSON anyway
    common(parser)


def run(options: argparse.Namespace) -> int:
    if options.output.suffix not in (".pt", ".safetensors"):
        raise RecipeError(f"--output {options.output}: no direction file", remedy="Name it .pt or .safetensors")
    prompts = {
        "harmful": _sources(options.harmful),
        "harmless": _sources(options.harmless),
        "count": options.count,
        "seed": options.seed,
        "system": options.system,
    }
    asked = {"export": {"format": "direction"}, "prompts": prompts, "direction": _direction(options)}
    with ran(recipe_of(options, **asked), options.output.absolute().parent, options, inside=True) as (result, folder):
        facts = json.loads((folder / f"{result.product}.json").read_text(encoding="utf-8"))
        from abliterated.pipeline.direction_files import read_direction, write_direction
        from abliterated.pipeline.directions import RefusalDirection

        layers = int(facts.get("layers", 0)) or 1
        found = read_direction(folder / result.product, int(facts["hidden_size"]), layers)
        write_direction(options.output, RefusalDirection(found.vectors, found.per_layer, result.direction), {})
    sys.stdout.write(json.dumps(_told(options, facts, layers), ensure_ascii=False) + "\n")
    for note in result.notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def _told(options: argparse.Namespace, facts: dict[str, Any], layers: int) -> dict[str, Any]:
    """The summary: ollama-forge's keys first."""
    layer = facts.get("layer")
    kept = ("gap_norm", "position", "rank", "per_layer", "convention", "method", "hidden_size", "bypass", "kl")
    more = ("induce", "refused_harmful", "refused_harmless", "harmful_prompts", "harmless_prompts", "digest")
    return {
        "layer_frac": None if layer is None else round(layer / layers, 4),
        "layer_index": layer if layer is None or layer != int(layer) else int(layer),
        **{name: facts[name] for name in (*kept, *more) if name in facts},
        "layers": layers,
        "model": options.model,
        "output": str(options.output),
    }


def _sources(given: list[str] | None) -> str | list[str]:
    return given or "builtin"


def _direction(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's `[direction]`."""
    if options.per_layer and (options.layers or options.index is not None):
        raise RecipeError("--per-layer takes every layer", remedy="Leave --layer and --index out")
    found: dict[str, Any] = {
        "method": "per-layer" if options.per_layer else "layer" if options.layers else "auto",
        "rank": options.rank,
        "convention": options.convention,
        "winsorize": options.winsorize,
        "orthogonalize": not options.keep_mean,
    }
    if options.layers:
        found["layer"] = [_layer(text) for group in options.layers for text in group]
    if options.index is not None:
        found["index"] = options.index
    if options.position is not None:
        found["position"] = options.position
    return found


def _layer(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise RecipeError(f"--layer {text}: no number", remedy="Give a fraction, as 0.6, or a layer, as 12") from None
