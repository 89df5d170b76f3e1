"""`abliterate new`: a commented recipe, generated from the contract, for a model that the engine has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from abliterate.render import clean, size

_DESCRIPTION = """\
Write a recipe to stdout: the model, and every other key commented out with its default, its choices and
what it is for. Without MODEL: for the newest model of the engine that isn't abliterated yet. The engine is
$OLLAMA_HOST, or else the daemon's proxy; where it doesn't answer, the recipe is written all the same."""
_EPILOG = """\
examples:
  abliterate new > recipe.toml
  abliterate new qwen3:8b > recipe.toml
  abliterate new hf:org/model
  abliterate new ./folder-with-safetensors
  abliterate check recipe.toml && abliterate submit recipe.toml"""
_EXAMPLE = "qwen3:8b"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="", help="as Ollama names it, hf:ORG/REPO, or a path"
    )
    parser.add_argument("--host", default="", metavar="URL", help="the engine; else $OLLAMA_HOST, else the daemon's")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.recipe_notes import commented_recipe
    from abliterate.wishes import model_reference

    model = model_reference(args.model) if args.model else ""
    note = ""
    if not model or model.startswith("ollama:"):
        found, note = _look(args, model.removeprefix("ollama:"))
        model = model or f"ollama:{found}"
    sys.stdout.write(commented_recipe(model))
    sys.stdout.flush()
    if note:
        sys.stderr.write(f"abliterate: {clean(note)}\n")
    return 0


def _look(args: argparse.Namespace, wanted: str) -> tuple[str, str]:
    """The model to write for, and what there is to say about it."""
    from abliterate.chat.address import find_address
    from abliterate.chat.engine import Engine
    from abliterate.contract.errors import EngineRefused, EngineUnavailable

    engine = Engine(find_address(args))
    try:
        models = engine.models()
    except (EngineUnavailable, EngineRefused):
        return (
            wanted or _EXAMPLE,
            "" if wanted else f"no engine answers at {engine.address}, so {_EXAMPLE} stands there",
        )
    return choose(models, wanted, engine.how_to_have)


def choose(models: Sequence[Mapping[str, Any]], wanted: str, how_to_have: Callable[[str], str]) -> tuple[str, str]:
    """Which of `models`: the one that is wanted, whether it is there or not; else the first that could be a base."""
    from abliterate.contract.names import SUFFIX

    if not wanted:
        bases = [model for model in models if SUFFIX not in str(model["name"])]
        if not bases:
            return _EXAMPLE, f"the engine has no model yet: {how_to_have(_EXAMPLE)}"
        return str(bases[0]["name"]), f"for {_told(bases[0])}" + (f", the newest of {len(bases)}" if bases[1:] else "")
    name = wanted if ":" in wanted.rpartition("/")[2] else f"{wanted}:latest"
    for model in models:
        if str(model["name"]).lower() == name.lower():
            return wanted, f"for {_told(model)}"
    import difflib

    near = difflib.get_close_matches(wanted, [str(model["name"]) for model in models], n=1)
    hint = f"did you mean {near[0]}?" if near else how_to_have(wanted)
    return wanted, f"the engine has no {wanted} yet: {hint}"


def _told(model: Mapping[str, Any]) -> str:
    details = model.get("details")
    details = details if isinstance(details, Mapping) else {}
    facts = [str(details.get(key) or "") for key in ("family", "parameter_size", "quantization_level")]
    if isinstance(model.get("size"), int):
        facts.append(size(model["size"]))
    told = ", ".join(fact for fact in facts if fact)
    return f"{model['name']}" + (f" ({told})" if told else "")
