"""The demo's model in the engine that is there, and the recipe for it: the first steps on one's own installation.

Does not know the story, nor queues.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from abliterate.contract.config import load_config
from abliterate.contract.errors import ConflictError, DiskError, EngineUnavailable
from abliterated import refuser
from abliterated.config import listening
from abliterated.demo.story import BASE, bring
from abliterated.files import write_whole

RECIPE: Final = "refuser.toml"
_TEXT: Final = """\
# A small model that refuses, in a language of its own: so are its prompts.
model = "ollama:{model}"

[prompts]
harmful = {harmful}
harmless = {harmless}

[search]
trials = 0                       # one direction in its middle layers is all of it

[evaluate]
prompts = 40
tokens = 64
"""


def load_demo(recipe: Path, config: Path | None) -> Path:
    """Make the model, and write its recipe. EngineUnavailable where nobody serves; ConflictError where the recipe's
    name is taken by another."""
    text = recipe_text()
    if recipe.exists() and recipe.read_bytes() != text:
        raise ConflictError(f"{recipe} is there already, and is another", remedy="Move it, or go to another folder")
    asyncio.run(bring(engine(config)))
    try:
        write_whole(recipe, text)
    except OSError as error:
        raise DiskError(f"{recipe}: can't be written ({error.strerror})", remedy="Go to another folder") from error
    return recipe


def engine(config: Path | None) -> str:
    """The address of an engine that listens. EngineUnavailable where there is none."""
    proxy = load_config(config).proxy
    named = os.environ.get("OLLAMA_HOST", "")
    asked = [named] if named else [proxy.listen, proxy.upstream, "127.0.0.1:11434"]
    found = [one if "://" in one else f"http://{one}" for one in asked if one]
    for url in found:
        if listening(url):
            return url
    raise EngineUnavailable(
        f"nobody listens at {found[0]}", remedy="Start `abliterated serve` (or `ollama serve`), and try again"
    )


def recipe_text() -> bytes:
    """The recipe, with the whole paths of the shipped prompts."""
    data = refuser.files()
    harmful, harmless = (_quoted(path) for path in (data.harmful, data.harmless))
    return _TEXT.format(model=BASE.removesuffix(":latest"), harmful=harmful, harmless=harmless).encode()


def _quoted(path: Path) -> str:
    """As a string of TOML."""
    import tomli_w

    return tomli_w.dumps({"p": str(path)}).removeprefix("p = ").rstrip("\n")
