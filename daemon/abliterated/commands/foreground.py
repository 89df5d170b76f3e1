"""What the foreground verbs share: a model's name as a person gives it, and one run of the pipeline from a few options.

No verb itself. Does not know what is printed.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from abliterate.contract.config import load_config
from abliterate.contract.messages import Result
from abliterate.contract.recipe import Recipe, target_name
from abliterated.commands.work import Bar, stop_on_signals
from abliterated.once import converter_for, plain_recipe, run_once

MODEL_HELP = "a name in Ollama, a .gguf file, a folder with safetensors, or hf:ORG/REPO"


def common(parser: argparse.ArgumentParser) -> None:
    """The options all of them take."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:N], mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default auto)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file, for [tools] and [trust]")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def recipe_of(options: argparse.Namespace, **tables: Any) -> Recipe:
    """A recipe of the options: no search, no evaluation, nothing registered, unless `tables` say otherwise."""
    recipe = plain_recipe(options.model, options.device, options.dtype, tables, "options")
    target_name(recipe)
    return recipe


def ran(
    recipe: Recipe, out: Path, options: argparse.Namespace, *, inside: bool = False
) -> AbstractContextManager[tuple[Result, Path]]:
    """Run it; the result and the folder the product lies in: `out`, or, `inside`, a passing one that is gone after."""
    config = load_config(options.config)
    return run_once(
        recipe,
        out,
        Bar(quiet=options.quiet),
        stop_on_signals(),
        converter=converter_for(recipe, getattr(options, "converter", None) or config.tools.converter),
        remote_code=config.trust.remote_code,
        inside=inside,
    )
