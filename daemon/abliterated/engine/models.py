"""A stored model, opened: what its layers and its GGUF say, what it can do.

Capabilities follow Ollama ≥ 0.30 for a GGUF that brings its own Jinja template: a substring test on the template (for
more ways to think than Ollama knows), and what the config blob adds. The template that renders is always the GGUF's; a
Go TEMPLATE is kept and told, never run.
Does not know: HTTP, processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import AbliteratedError
from abliterated.engine.header import Header, read_header
from abliterated.engine.store import Store, Stored, json_blob
from abliterated.shapes.refusals import Refused

# What opens and closes a thought in a template whose thoughts llama.cpp splits off; Ollama looks for the first alone.
_THOUGHTS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel|>", "analysis"), ("<|channel>", "<channel|>"),
)  # fmt: skip


class Config(msgspec.Struct):
    """The config blob. `rootfs`, `os` and `architecture` are there because a docker manifest has them."""

    model_format: str = "gguf"
    model_family: str = ""
    model_families: list[str] | None = None
    model_type: str = ""
    file_type: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    capabilities: list[str] = []
    architecture: str = "amd64"
    os: str = "linux"
    rootfs: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    stored: Stored
    config: Config
    header: Header
    path: Path
    projector: Path | None = None
    template: str = ""
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    licenses: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.stored.name.short()

    @property
    def context_length(self) -> int:
        return self.header.number("context_length")

    @property
    def capabilities(self) -> list[str]:
        template = self.header.chat_template
        found = ["embedding" if f"{self.header.architecture}.pooling_type" in self.header.values else "completion"]
        if self.projector:
            found.append("vision")
        if "tools" in template or "tool_call" in template:
            found.append("tools")
        if any(opening in template and closing in template for opening, closing in _THOUGHTS):
            found.append("thinking")
        return found + [capability for capability in self.config.capabilities if capability not in found]

    @property
    def details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": self.config.model_format,
            "family": self.config.model_family,
            "families": self.config.model_families,
            "parameter_size": self.config.model_type,
            "quantization_level": self.config.file_type,
        }


class Library:
    """Opens models; remembers the headers of GGUFs, which never change under their digest."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._headers: dict[str, Header] = {}

    def header(self, digest: str) -> Header:
        if digest not in self._headers:
            if len(self._headers) >= 256:
                self._headers.clear()
            self._headers[digest] = read_header(self.store.blob(digest))
        return self._headers[digest]

    def open(self, stored: Stored) -> Model:
        try:
            return self._open(stored)
        except AbliteratedError as error:
            if isinstance(error, Refused):
                raise
            raise Refused(500, f"can't open model '{stored.name.short()}': {error}") from error

    def _open(self, stored: Stored) -> Model:
        store = self.store
        try:
            config = msgspec.json.decode(store.read(stored.manifest.config), type=Config)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Refused(
                500, f"can't read the config of '{stored.name.short()}': {error}", remedy="Create the model again"
            ) from error
        weights, projectors = stored.layers("model"), stored.layers("projector")
        if not weights or config.model_format != "gguf":
            raise Refused(500, f"model '{stored.name.short()}' holds no GGUF", remedy="Create it again from a GGUF")
        return Model(
            stored=stored,
            config=config,
            header=self.header(weights[0].digest),
            path=store.blob(weights[0].digest),
            projector=store.blob(projectors[0].digest) if projectors else None,
            template=self._text(stored, "template"),
            system=self._text(stored, "system"),
            parameters=json_blob(store, stored, "params", {}),
            messages=json_blob(store, stored, "messages", []),
            licenses=tuple(store.read(layer).decode("utf-8", "replace") for layer in stored.layers("license")),
        )

    def _text(self, stored: Stored, kind: str) -> str:
        layers = stored.layers(kind)
        return self.store.read(layers[-1]).decode("utf-8", "replace") if layers else ""


def parameter_size(count: int) -> str:
    """`8.0B`, `494.03M`: the number of weights, as Ollama writes it."""
    if count >= 10**9:
        return f"{count // 10**9}B" if count % 10**9 == 0 else f"{count / 1e9:.1f}B"
    if count >= 10**6:
        return f"{count // 10**6}M" if count % 10**6 == 0 else f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}K" if count >= 1000 else str(count)
