"""The model a recipe starts from: a .gguf file or a folder with safetensors, looked at without loading it.

Says what it is, how deep and how wide, and whether the file can be whole; every fault is named. Imports neither torch
nor transformers: with a direction from a file, nothing more than this is needed. Does not know prompts or devices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from abliterate.contract.errors import ModelError
from abliterated.pipeline.checkpoint_writers import depth_keys
from abliterated.pipeline.gguf_file import GgufFile, read_gguf, split_parts
from abliterated.pipeline.safetensors_file import CONFIG, read_config, read_shards

# What other GGUF files are: projectors, speech, adapters, encoders without an answer to refuse.
NO_LANGUAGE_MODEL: Final = frozenset(
    {
        "clip",
        "whisper",
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "t5encoder",
        "wavtokenizer-dec",
    }
)


@dataclass(frozen=True)
class Source:
    """A model's files. `parts`: every file of a split GGUF, or every shard of a folder."""

    path: Path
    kind: Literal["gguf", "safetensors"]
    architecture: str
    layers: int
    hidden_size: int
    context: int
    size: int
    parts: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...] = ()  # size and time of each part when it was looked at

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.path.name


def open_source(path: Path) -> Source:
    """Look at the model at `path`. ModelError names what is wrong with it."""
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path)
    raise ModelError(f"there is no model at {path}", remedy="Give a .gguf file or a folder with safetensors")


def check_unchanged(source: Source) -> None:
    """ModelError where a file of the model is no longer the one that was looked at."""
    for part, stamp in zip(source.parts, source.stamps, strict=False):
        if _stamps((part,)) != (stamp,):
            raise ModelError(
                f"{part.name} changed while it was read", remedy="Run it again once nobody writes to it any more"
            )


def _stamps(parts: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((status.st_size, status.st_mtime_ns) for status in (part.stat() for part in parts))
    except OSError:
        return ((-1, -1),) * len(parts)


def _gguf(path: Path) -> Source:
    structure = read_gguf(path)
    parts = split_parts(path, structure)
    architecture = structure.architecture
    kind = structure.values.get("general.type", "model")
    if kind != "model" or architecture in NO_LANGUAGE_MODEL:
        what = {"model": architecture, "adapter": f"an adapter (LoRA) for {architecture}"}.get(
            str(kind), f"{kind} of {architecture}"
        )
        raise structure.broken(f"is not a language model but {what}", "Give the model itself")
    if not any(name.startswith("token_embd.") for name in _tensor_names(structure, parts)):
        raise structure.broken("holds no token embedding: it is not a language model", "Give the model itself")
    return Source(
        path=path,
        kind="gguf",
        architecture=architecture,
        layers=structure.number("block_count"),
        hidden_size=structure.number("embedding_length"),
        context=structure.number("context_length"),
        size=sum(part.stat().st_size for part in parts),
        parts=parts,
        stamps=_stamps(parts),
    )


def _tensor_names(structure: GgufFile, parts: tuple[Path, ...]) -> set[str]:
    names = {tensor.name for tensor in structure.tensors}
    for part in parts[1:]:
        names |= {tensor.name for tensor in read_gguf(part).tensors}
    return names


def _folder(path: Path) -> Source:
    if not (path / CONFIG).exists() and len(found := _first_parts(path)) == 1:
        return _gguf(found[0])
    config = read_config(path)
    text: Mapping[str, Any] = config.get("text_config") or config
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path.name} holds no safetensors",
            remedy="Pickled weights are never loaded: convert them to safetensors first",
        )
    # Every header against its file's length: a mapped file that ends too soon would end this process without a word.
    parts = tuple(shard.path for shard in read_shards(path))
    return Source(
        path=path,
        kind="safetensors",
        architecture=str(config.get("model_type", "")),
        layers=_layers(path, text),
        hidden_size=_number(path, text, "hidden_size", "n_embd", "d_model"),
        context=_number(path, text, "max_position_embeddings", "n_positions", "max_seq_len", default=1 << 20),
        size=sum(part.stat().st_size for part in parts),
        parts=parts,
        stamps=_stamps(parts),
    )


def _first_parts(folder: Path) -> list[Path]:
    """The GGUF models in a folder: of a split one its first part."""
    later = re.compile(r".+-(?!00001-)\d{5}-of-\d{5}\.gguf")
    return [path for path in sorted(folder.glob("*.gguf")) if not later.fullmatch(path.name)]


def _layers(path: Path, config: Mapping[str, Any]) -> int:
    """How many there are; hybrids may say what each is instead."""
    kinds = config.get("layers_block_type")
    listed = len(kinds) if isinstance(kinds, list) else 0
    return _number(path, config, *depth_keys(str(config.get("model_type", ""))), default=listed)


def _number(path: Path, config: Mapping[str, Any], *keys: str, default: int = 0) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    if default:
        return default
    raise ModelError(f"{path.name}/config.json has no {keys[0]}", remedy="Give a language model's folder")
