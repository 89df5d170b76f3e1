"""`abliterated apply`: take a direction at hand out of a model's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from abliterate.contract.recipe import Recipe
from abliterated.commands.foreground import MODEL_HELP, common, ran, recipe_of
from abliterated.commands.work import print_result

HELP = "take a direction from a file out of a model's weights"
EXAMPLES = """\
examples:
  abliterated apply qwen3:8b --direction refusal.pt --out result/
  abliterated apply ./model.gguf --direction refusal.pt --out result/ --layers 4-28 --mlp 0.7
  abliterated apply ./folder --direction refusal.safetensors --out result/ --format gguf --quantize Q4_K_M
  abliterated apply ./model.gguf --direction refusal.pt --out result/ --format adapter --norm none

A GGUF gives a GGUF, tensor by tensor in its own types; a folder gives a folder, or with --format gguf a GGUF by
llama.cpp's converter ([tools] converter, or --converter). The direction is one that `abliterated direction`,
ollama-forge or Sumandora's script wrote. Nothing is measured, asked or registered. A product abliterated made in DIR
under that name is replaced; anything else is left alone.
stdout: the product's path, or with --json the whole result.
exit codes: 0 done; 2 an option or the direction file is wrong; 3 the model can't be used; 4 no room; 6 the name is
taken in DIR; 75 Ollama is away; 86 stopped."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--direction", required=True, metavar="FILE", help="a .pt or .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the product and the reports")
    parser.add_argument("--name", default="", help="the product's name (default: the model's + -abliterated)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="1 removes all of it (default)")
    parser.add_argument(
        "--attention", "--atten-strength", type=float, default=1.0, metavar="X", help="factor for attention writers"
    )
    parser.add_argument("--mlp", "--mlp-strength", type=float, default=1.0, metavar="X", help="factor for MLP writers")
    parser.add_argument(
        "--norm", choices=("columns", "rows", "none"), default="columns", help="what keeps its length (default columns)"
    )
    parser.add_argument(
        "--no-norm-preserving", dest="norm", action="store_const", const="none", help="the same as --norm none"
    )
    parser.add_argument("--layers", default="all", metavar="A-B", help='as in "all", "2-30", "1-", "-30"')
    parser.add_argument(
        "--kernel", choices=("constant", "linear", "gaussian", "trapezoid"), default="constant", help="over the depth"
    )
    parser.add_argument("--center", type=float, default=0.5, metavar="X", help="of the kernel, 0 to 1")
    parser.add_argument("--width", type=float, default=0.4, metavar="X", help="of the kernel")
    parser.add_argument("--floor", type=float, default=0.0, metavar="X", help="of the kernel")
    parser.add_argument("--no-post-norm", action="store_true", help="don't correct for norms behind the writers")
    parser.add_argument("--embeddings", action="store_true", help="edit the embedding too")
    parser.add_argument("--invert", action="store_true", help="strengthen the refusal instead")
    parser.add_argument(
        "--format", choices=("gguf", "safetensors", "adapter"), help="of the product (default: the model's own)"
    )
    parser.add_argument("--quantize", default="keep", metavar="TYPE", help="keep, Q8_0, Q4_K_M … (default keep)")
    parser.add_argument("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, for a folder")
    parser.add_argument("--allow-partial", action="store_true", help="leave writers that can't be edited as they are")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common(parser)


def run(options: argparse.Namespace) -> int:
    with ran(recipe(options), options.out, options) as (result, _):
        print_result(result, options)
    return 0


def recipe(options: argparse.Namespace) -> Recipe:
    """What the options ask for, as a recipe."""
    edit = {name: getattr(options, name) for name in ("strength", "attention", "mlp", "norm", "layers", "kernel")}
    edit |= {name: getattr(options, name) for name in ("center", "width", "floor", "embeddings", "invert")}
    export: dict[str, Any] = {
        "format": options.format or ("safetensors" if Path(options.model).expanduser().is_dir() else "gguf"),
        "quantize": options.quantize,
        "allow_partial": options.allow_partial,
    }
    return recipe_of(
        options,
        name=options.name,
        direction={"method": "file", "file": options.direction},
        edit={**edit, "post_norm": not options.no_post_norm},
        export=export,
    )
