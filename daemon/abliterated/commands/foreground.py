"""What the foreground verbs share: a model's name as a person gives it, and one run of the pipeline from a few options.

No verb itself. Does not know what is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterate.contract.config import load_config, local_path
from abliterate.contract.errors import AbliteratedError, DiskError
from abliterate.contract.messages import Result, Task
from abliterate.contract.recipe import Recipe, recipe_from_table, target_name
from abliterated.commands.work import Bar, absolute_paths, resolve, work_folder

MODEL_HELP = "a name in Ollama, a .gguf file, a folder with safetensors, or hf:ORG/REPO"


def common(parser: argparse.ArgumentParser) -> None:
    """The options all of them take."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:N], mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default auto)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file, for [tools] and [trust]")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def model_reference(text: str) -> str:
    """A recipe's `model` for what a person typed: what looks like a path is one, else it is a name in Ollama."""
    if text.startswith(("ollama:", "hf:")):
        return text
    path = Path(text).expanduser()
    if path.exists() or text.endswith(".gguf") or text.startswith((".", "/", "~")):
        return str(path.absolute())
    return f"ollama:{text}"


def recipe_of(options: argparse.Namespace, **tables: Any) -> Recipe:
    """A recipe of the options: no search, no evaluation, nothing registered, unless `tables` say otherwise."""
    table: dict[str, Any] = {
        "model": model_reference(options.model),
        "search": {"trials": 0},
        "evaluate": {"prompts": 0},
        "run": {"device": options.device, "dtype": options.dtype},
    }
    for name, value in tables.items():
        table[name] = table[name] | value if isinstance(value, dict) and name in table else value
    table["export"] = {"register": False} | table.get("export", {})
    recipe = absolute_paths(recipe_from_table(table, "options"), Path.cwd())
    target_name(recipe)
    return recipe


@contextlib.contextmanager
def ran(
    recipe: Recipe, out: Path, options: argparse.Namespace, *, inside: bool = False
) -> Iterator[tuple[Result, Path]]:
    """Run it; the result and the folder the product lies in: `out`, or, `inside`, a passing one that is gone after."""
    config = load_config(options.config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    make_folder(out)
    source, digest = resolve(recipe)
    with work_folder(out.resolve(), recipe) as work:
        output = work / "out" if inside else out.resolve()
        task = Task(
            recipe=recipe,
            base=recipe.model,
            base_digest=digest,
            source=source,
            work=str(work),
            output=str(output),
            remote_code=config.trust.remote_code,
            converter=converter(recipe, getattr(options, "converter", None), config.tools.converter),
        )
        from abliterated.pipeline.run import run as run_pipeline

        with Bar(quiet=options.quiet) as bar:
            result = run_pipeline(task, bar.tell, stop.is_set)
        yield result, output


def converter(recipe: Recipe, asked: str | None, configured: str) -> str:
    """What makes a GGUF of a folder: the option, the setting, or the Ollama at $OLLAMA_HOST if it has an importer."""
    if asked or configured:
        return str(local_path(asked or configured).absolute())
    if recipe.export.format != "gguf" or recipe.model.startswith("ollama:") or recipe.model.endswith(".gguf"):
        return ""
    from abliterated.ollama.client import OllamaClient
    from abliterated.ollama.importer import converts

    async def ask() -> str:
        async with OllamaClient(os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434") as client:
            return client.url if converts(await client.version()) else ""

    with contextlib.suppress(AbliteratedError):
        return asyncio.run(ask())
    return ""


def make_folder(folder: Path) -> None:
    """DiskError where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: can't be made ({error.strerror})", remedy="Give another folder") from error
