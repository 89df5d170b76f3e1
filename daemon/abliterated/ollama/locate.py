"""A model's name in the engine, resolved to what a job needs: the GGUF's file, its digest, and all the base says.

`describe_base` asks the engine only, which may be on another host; `resolve_base` needs the file here.
Does not know recipes, nor what the file holds beyond its first four bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.contract.errors import AbliteratedError, ModelError, NotFound
from abliterate.contract.names import parse_name
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.modelfile import Modelfile, from_show
from abliterated.ollama.request import blob_digest, content_of
from abliterated.ollama.version import Generation

MOST_NAMED = 8  # of the models that are there, in a remedy


@dataclass(frozen=True)
class Base:
    """A model as the engine holds it. Paths are of the engine's own file system; digests are `sha256:…`.

    `content`: the key by which we know models of our making, "" for others'. `parent`: what it was made from, if said.
    """

    name: str
    blob_path: Path
    digest: str
    modelfile: Modelfile
    capabilities: frozenset[str] = frozenset()
    details: Mapping[str, Any] = field(default_factory=dict)
    projectors: tuple[Path, ...] = ()
    content: str = ""

    @property
    def projector(self) -> Path | None:
        """The first projector: what lets the model see images."""
        return self.projectors[0] if self.projectors else None


async def describe_base(client: OllamaClient, name: str) -> Base:
    """All the engine says of `name`. Raises NotFound, or ModelError for a model that has no GGUF."""
    short = parse_name(name).short()
    try:
        show = await client.show(short)
    except NotFound as error:
        raise NotFound(
            f"{short}: the engine at {client.url} has no such model", remedy=await how_to_have(client, short)
        ) from error
    return base_from_show(short, show)


async def how_to_have(client: OllamaClient, short: str) -> str:
    """How the engine comes by a model it lacks, and what it has: a remedy."""
    there: list[str] = []
    embedded = False
    with contextlib.suppress(AbliteratedError):  # what is to be said is that the model isn't there
        there = sorted(str(row.get("name", "")).removesuffix(":latest") for row in await client.tags())
        embedded = (await client.version()).generation is Generation.EMBEDDED
    has = f"; there are {', '.join(there[:MOST_NAMED])}" if there else ""
    if embedded:
        return f"The embedded engine can't fetch models: give a .gguf file or hf:ORG/REPO, or install Ollama{has}"
    return f"`ollama pull {short}` fetches it{has}"


async def resolve_base(client: OllamaClient, name: str) -> Base:
    """The same, and its GGUF is here and readable. Raises ModelError with the remedy."""
    base = await describe_base(client, name)
    await asyncio.to_thread(_check_file, base, client.url)
    return base


def base_from_show(name: str, show: Mapping[str, Any]) -> Base:
    """Read a `/api/show` answer. Raises ModelError for a cloud model or one without a GGUF."""
    if show.get("remote_model") or show.get("remote_host"):
        raise ModelError(
            f"{name}: a cloud model; its weights are on {show.get('remote_host') or 'another host'}, not here",
            remedy="Name a model that `ollama pull` brings onto this machine",
        )
    raw = show.get("details")
    details: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    modelfile = from_show(show)
    first = modelfile.models[0] if modelfile.models else ""
    if details.get("format") == "safetensors" or (first and not blob_digest(first) and "/blobs/" not in first):
        raise ModelError(
            f"{name}: Ollama holds it as safetensors (for MLX), so there is no GGUF to edit",
            remedy="Pull a GGUF variant of it, or name its Hugging Face repository as model = 'hf:ORG/REPO'",
        )
    if not first:
        raise ModelError(f"{name}: the engine names no file for it", remedy=f"`ollama pull {name}` again")
    info = show.get("capabilities")
    return Base(
        name=name,
        blob_path=Path(first),
        digest=blob_digest(first),
        modelfile=modelfile,
        capabilities=frozenset(map(str, info)) if isinstance(info, list) else frozenset(),
        details=details,
        projectors=tuple(Path(path) for path in modelfile.models[1:]),
        content=content_of(show),
    )


def _check_file(base: Base, url: str) -> None:
    path = base.blob_path
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise ModelError(
            f"{base.name}: its file {path} is not on this machine (the engine at {url} is remote or in a container)",
            remedy="Run the daemon where the engine's model folder is, mount that folder at the same path, "
            "or name a .gguf file or hf: repository as model",
        ) from error
    except PermissionError as error:
        raise ModelError(
            f"{base.name}: its file {path} may not be read by this user",
            remedy="Add the user to the engine's group: `sudo usermod -aG ollama USER`, then log in again",
        ) from error
    except OSError as error:
        raise ModelError(f"{base.name}: {path} can't be read ({error.strerror})", remedy="Check that disk") from error
    if start != b"GGUF":
        raise ModelError(
            f"{base.name}: {path} is no GGUF file", remedy=f"Pull it anew: `ollama rm {base.name}`, `ollama pull …`"
        )
