"""A folder of safetensors becomes a GGUF through an Ollama whose version still converts: a program of its own, called
as the llama.cpp converter is (`URL FOLDER --outfile FILE`), so the pipeline may start it where none is configured.

The files go up as blobs, a model of a passing name is created from them, its GGUF is linked or copied out of the
engine's store, and the passing model is deleted. Does not know the edit, jobs or provenance.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from abliterate.contract.errors import AbliteratedError, DiskError, EngineRefused, ModelError, NotFound
from abliterated.ollama import store
from abliterated.ollama.client import OllamaClient, hash_file
from abliterated.ollama.modelfile import from_show
from abliterated.ollama.request import blob_digest
from abliterated.ollama.version import Generation, Version

# What the engine reads beside the weights; reports and model cards stay here.
READ: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "model.safetensors.index.json",
)  # fmt: skip
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
PASSING: Final = "abliterated-import-"
CONVERTS: Final = (Generation.LEGACY, Generation.REWRITING, Generation.DEVELOPMENT)


def converts(version: Version) -> bool:
    """Whether an engine of that version may make a GGUF of safetensors (a development build: it is tried)."""
    return version.generation in CONVERTS and not version.too_old


@dataclass
class _Sent:
    """What went into the engine's store for this import and was not there before."""

    digests: list[str] = field(default_factory=list)


async def import_folder(client: OllamaClient, folder: Path, outfile: Path) -> None:
    """Write `outfile`: the folder as the GGUF the engine makes of it; nothing of it stays in the engine.

    Raises EngineRefused (the architecture, the version), ModelError (a store that can't be read), EngineUnavailable,
    DiskError.
    """
    version = await client.version()
    if not converts(version):
        raise EngineRefused(
            f"Ollama {version.text} has no importer for safetensors",
            remedy="Set [tools] converter to llama.cpp's convert_hf_to_gguf.py",
        )
    sent = _Sent()
    with tempfile.TemporaryDirectory(prefix="abliterated-") as scratch:
        files = await asyncio.to_thread(_files, folder, Path(scratch))
        digests = {}
        for name, path in files.items():
            digests[name] = await _sent(client, path, sent)
        async with _created(client, digests, sent) as blob:
            await asyncio.to_thread(_out, blob, outfile)


async def _sent(client: OllamaClient, path: Path, sent: _Sent) -> str:
    digest = await asyncio.to_thread(hash_file, path)
    if not await client.has_blob(digest):
        await client.push_blob(path, digest)
        sent.digests.append(digest)
    return digest


@contextlib.asynccontextmanager
async def _created(client: OllamaClient, digests: dict[str, str], sent: _Sent) -> AsyncIterator[Path]:
    """The blob the engine made of these files; while open, a model of a passing name holds it."""
    listed = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    name = PASSING + hashlib.sha256(listed.encode()).hexdigest()[:12]
    blob: Path | None = None
    try:
        await client.create({"model": name, "files": digests})
        show = await client.show(name)
        models = from_show(show).models
        if not models or not blob_digest(models[0]):
            raise EngineRefused(
                f"the engine at {client.url} made something else than a GGUF of it",
                remedy="Set [tools] converter to llama.cpp's convert_hf_to_gguf.py",
            )
        blob = Path(models[0])
        yield blob
    finally:
        with contextlib.suppress(NotFound):
            await client.delete(name)
        # Ollama has no request that removes a blob; a model's worth of them would lie there until it starts again.
        folder = blob.parent if blob is not None else await _store(client)
        if folder is not None and folder.name == "blobs":
            for digest in sent.digests:
                with contextlib.suppress(OSError):
                    store.blob_path(folder, digest).unlink()


async def _store(client: OllamaClient) -> Path | None:
    """The engine's own folder of blobs, as any of its models shows it."""
    with contextlib.suppress(AbliteratedError):
        for row in (await client.tags())[:8]:
            models = from_show(await client.show(str(row.get("name", "")))).models
            if models and blob_digest(models[0]):
                return Path(models[0]).parent
    return None


def _files(folder: Path, scratch: Path) -> dict[str, Path]:
    """What the engine shall read, by its name there."""
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    found |= {name: folder / name for name in READ if (folder / name).is_file()}
    template = folder / "chat_template.jinja"
    if template.is_file():
        # The engine looks for the template where older transformers wrote it.
        try:
            config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
            config.setdefault("chat_template", template.read_text(encoding="utf-8"))
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder.name}/{TOKENIZER_CONFIG} can't be read", remedy="Download it again") from error
        found[TOKENIZER_CONFIG] = scratch / TOKENIZER_CONFIG
        found[TOKENIZER_CONFIG].write_text(json.dumps(config), encoding="utf-8")
    return found


def _out(blob: Path, outfile: Path) -> None:
    """The blob under our own name: the same bytes where the file system has links, else a copy."""
    if not blob.is_file():
        raise ModelError(
            f"the engine's store {blob.parent} can't be read from here",
            remedy="Run on the engine's own machine, as a user of its group; or set [tools] converter",
        )
    try:
        outfile.unlink(missing_ok=True)
        try:
            outfile.hardlink_to(blob)
        except OSError:
            shutil.copyfile(blob, outfile)
    except OSError as error:
        raise DiskError(
            f"{outfile}: can't be written ({error.strerror})", remedy="Make room on that disk, or give another place"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the program: the exit code, and the reason as the last line of stderr."""
    parser = argparse.ArgumentParser(prog="abliterated-import", description="a folder of safetensors → GGUF, by Ollama")
    parser.add_argument("url", help="address of the Ollama")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", help="taken for the sake of likeness; Ollama chooses")
    options = parser.parse_args(arguments)

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with OllamaClient(options.url) as client:
            await import_folder(client, options.folder, options.outfile)

    try:
        asyncio.run(run())
    except AbliteratedError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    except asyncio.CancelledError:
        return 86
    return 0


if __name__ == "__main__":
    sys.exit(main())
