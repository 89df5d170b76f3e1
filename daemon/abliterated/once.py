"""One recipe, run in this process from base to product: what the foreground verbs and the library share.

Imports no torch before a run begins. Does not know what is shown of it, who asked, or what is registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.config import local_path
from abliterate.contract.errors import AbliteratedError, AlreadyRunning, DiskError, ModelError
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.recipe import Recipe, recipe_digest, recipe_from_table

Tell = Callable[[Progress], None]


@contextlib.contextmanager
def run_once(
    recipe: Recipe,
    out: Path,
    progress: AbstractContextManager[Tell],
    cancelled: Callable[[], bool] = lambda: False,
    *,
    converter: str = "",
    remote_code: Sequence[str] = (),
    inside: bool = False,
    called: str = "folder",
) -> Iterator[tuple[Result, Path]]:
    """The result and the folder the product lies in: `out`, or, `inside`, a passing one that is gone after.

    `progress` is entered for the run alone; `called` is what whoever asked calls `out`. Raises AbliteratedError.
    """
    make_folder(out, called)
    source, digest = resolve(recipe)
    with work_folder(out.resolve(), recipe, called) as work:
        output = work / "out" if inside else out.resolve()
        task = Task(
            recipe=recipe,
            base=recipe.model,
            base_digest=digest,
            source=source,
            work=str(work),
            output=str(output),
            remote_code=list(remote_code),
            converter=converter,
        )
        from abliterated.pipeline.run import run

        with progress as tell:
            result = run(task, tell, cancelled)
        yield result, output


def plain_recipe(model: str, device: str, dtype: str, tables: Mapping[str, Any], source: str) -> Recipe:
    """Nothing searched, evaluated or registered, unless `tables` say otherwise. `source` names who gave them."""
    table: dict[str, Any] = {
        "model": model_reference(model),
        "search": {"trials": 0},
        "evaluate": {"prompts": 0},
        "run": {"device": device, "dtype": dtype},
    }
    for name, value in tables.items():
        table[name] = table[name] | value if isinstance(value, dict) and name in table else value
    table["export"] = {"register": False} | table.get("export", {})
    return absolute_paths(recipe_from_table(table, source), Path.cwd())


def model_reference(text: str) -> str:
    """A recipe's `model` for what a person typed: what looks like a path is one, else it is a name in Ollama."""
    if text.startswith(("ollama:", "hf:")):
        return text
    path = Path(text).expanduser()
    if path.exists() or text.endswith(".gguf") or text.startswith((".", "/", "~")):
        return str(path.absolute())
    return f"ollama:{text}"


def absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every path absolute, read from `folder`."""

    def whole(value: str) -> str:
        named = value in ("", "builtin") or value.startswith(("hf:", "ollama:"))
        return value if named else str(folder / local_path(value))

    def each(value: str | list[str]) -> str | list[str]:
        return whole(value) if isinstance(value, str) else [whole(one) for one in value]

    prompts = msgspec.structs.replace(
        recipe.prompts,
        harmful=each(recipe.prompts.harmful),
        harmless=each(recipe.prompts.harmless),
        atoms=each(recipe.prompts.atoms),
    )
    return msgspec.structs.replace(
        recipe,
        model=whole(recipe.model),
        prompts=prompts,
        direction=msgspec.structs.replace(recipe.direction, file=whole(recipe.direction.file)),
        run=msgspec.structs.replace(recipe.run, from_checkpoint=whole(recipe.run.from_checkpoint)),
    )


def resolve(recipe: Recipe) -> tuple[str, str]:
    """Path and digest of the base. An `ollama:` name is asked of the Ollama at $OLLAMA_HOST."""
    if recipe.model.startswith("hf:"):
        return "", ""
    if not recipe.model.startswith("ollama:"):
        if not Path(recipe.model).exists():
            raise ModelError(f"{recipe.model}: no such file or folder", remedy="Check `model` in the recipe")
        return recipe.model, ""
    from abliterated.ollama.client import OllamaClient
    from abliterated.ollama.locate import resolve_base

    host = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"

    async def ask() -> tuple[str, str]:
        async with OllamaClient(host if "://" in host else f"http://{host}") as client:
            base = await resolve_base(client, recipe.model.removeprefix("ollama:"))
            return str(base.blob_path), base.digest

    return asyncio.run(ask())


def converter_for(recipe: Recipe, configured: str = "") -> str:
    """What makes a GGUF of a folder: what is configured, or the Ollama at $OLLAMA_HOST if it has an importer."""
    if configured:
        return str(local_path(configured).absolute())
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


def make_folder(folder: Path, called: str = "folder") -> None:
    """DiskError where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: can't be made ({error.strerror})", remedy=f"Give another {called}") from error


@contextlib.contextmanager
def work_folder(out: Path, recipe: Recipe, called: str = "folder") -> Iterator[Path]:
    """Where the stages lie: hidden beside the product, on the same filesystem, gone when the run ends.

    A run that was killed leaves it, and the next of the same recipe goes on there. One run a folder at a time.
    """
    import fcntl

    folder = out / f".work-{recipe_digest(recipe)[:16]}"
    held = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(
                f"{out}: another run works there now", remedy=f"Wait for it, or give another {called}"
            ) from None
        for other in out.glob(".work-*"):
            if other != folder:  # of a run that was killed, and that nobody goes on with
                shutil.rmtree(other, ignore_errors=True)
        try:
            folder.mkdir(exist_ok=True, mode=0o750)
        except OSError as error:
            raise DiskError(f"{folder}: can't be made ({error.strerror})", remedy=f"Give another {called}") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)
