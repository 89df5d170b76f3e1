"""`/api/create`: a manifest from uploaded blobs or from another model, told step by step.

What is a model is decided twice: by its header here, and by llama.cpp itself (a probe in a runner), so that an
architecture it does not know is refused at once and not when first used.
Does not know: HTTP, streaming; quantisation, adapters and pulling, which it refuses.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import ModelError
from abliterate.contract.names import ModelName
from abliterated.engine.header import Header
from abliterated.engine.models import Config, Library, parameter_size
from abliterated.engine.store import CONFIG, Layer, Manifest, Store, read_digest, read_name
from abliterated.shapes.refusals import Refused

Tell = Callable[[str], None]
Probe = Callable[[Path], Awaitable[None]]


class Info(msgspec.Struct, frozen=True):
    capabilities: list[str] | None = None
    model_family: str = ""
    quantization_level: str = ""
    parameter_size: str = ""


class CreateRequest(msgspec.Struct, frozen=True, rename={"source": "from"}):
    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    source: str | None = None
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    info: Info | None = None
    quantize: str | None = None
    quantization: str | None = None


def check(request: CreateRequest) -> ModelName:
    """What can be refused before anything is done; returns the new model's name."""
    name = read_name(request.model or request.name)
    if request.quantize or request.quantization:
        raise Refused(
            400,
            "create-time quantization is not supported by the embedded engine",
            remedy="Quantize the GGUF before importing it",
        )
    if request.adapters:
        raise Refused(
            400,
            "adapters are not supported by the embedded engine",
            remedy="Merge the adapter into its model before importing it",
        )
    if not request.source and not request.files:
        raise Refused(400, "neither 'from' or 'files' was specified")
    check_template(request.template or "")
    if (
        not request.source
        and (bad := next((name for name in request.files or {} if not _relative(name)), None)) is not None
    ):
        raise Refused(400, f"file path must be relative: {bad}")
    for digest in () if request.source else (request.files or {}).values():
        read_digest(digest)
    return name


def check_template(template: str) -> None:
    """Refuse a Go template whose actions or blocks do not close; it is kept verbatim, not run."""
    depth = 0
    rest = re.sub(r"\{\{-?\s*/\*.*?\*/\s*-?\}\}", "", template, flags=re.DOTALL)
    actions = re.findall(r"\{\{(.*?)\}\}", rest, flags=re.DOTALL)
    if "{{" in re.sub(r"\{\{.*?\}\}", "", rest, flags=re.DOTALL):
        raise Refused(400, "template error: unclosed action")
    for action in actions:
        word = action.strip().removeprefix("-").split(maxsplit=1)[0:1]
        match word[0] if word else "":
            case "if" | "range" | "with" | "define" | "block":
                depth += 1
            case "end":
                depth -= 1
            case "else" if depth == 0:
                raise Refused(400, "template error: unexpected {{else}}")
        if depth < 0:
            raise Refused(400, "template error: unexpected {{end}}")
    if depth:
        raise Refused(400, "template error: unexpected EOF, an {{end}} is missing")


class Creator:
    def __init__(self, store: Store, library: Library, probe: Probe, lock: asyncio.Lock) -> None:
        self.store = store
        self.library = library
        self.probe = probe
        self.lock = lock

    async def create(self, request: CreateRequest, tell: Tell) -> None:
        """Do it, telling each step; raises Refused. Nothing is visible before the manifest is."""
        name = check(request)
        try:
            layers, config = self._inherit(request, tell) if request.source else await self._import(request, tell)
            async with self.lock:
                manifest = await asyncio.to_thread(self._write, request, layers, config, tell)
                tell("writing manifest")
                await asyncio.to_thread(self.store.put, name, manifest)
        except OSError as error:
            raise Refused(
                500,
                f"can't write to the store {self.store.root}: {error.strerror}",
                remedy="Free some room there, and see that it may be written",
            ) from error
        tell("success")

    def _inherit(self, request: CreateRequest, tell: Tell) -> tuple[list[Layer], Config]:
        base = self.store.find(read_name(request.source))
        if base is None:
            raise Refused(404, f"model '{request.source}' not found", remedy="The embedded engine does not pull models")
        model = self.library.open(base)
        for layer in base.layers("model"):
            tell(f"using existing layer {layer.digest}")
        return list(base.manifest.layers), model.config

    async def _import(self, request: CreateRequest, tell: Tell) -> tuple[list[Layer], Config]:
        tell("parsing GGUF")
        layers: list[Layer] = []
        described: Header | None = None
        for file, text in (request.files or {}).items():
            digest = read_digest(text)
            if not self.store.has(digest):
                raise Refused(400, f"blob {digest} of {file!r} is not in the store", remedy="Upload it first")
            try:
                header = await asyncio.to_thread(self.library.header, digest)
            except ModelError as error:
                raise Refused(400, f"invalid file {file!r}: {error}") from error
            path = self.store.blob(digest)
            if not header.is_projector:
                if described is not None:
                    raise Refused(400, "more than one model in 'files'", remedy="Merge a split GGUF first")
                self._refuse_other_kinds(file, header)
                tell("validating GGUF model")
                await self.probe(path)
                described = header
            kind = "projector" if header.is_projector else "model"
            layers.append(Layer(f"application/vnd.ollama.image.{kind}", digest, path.stat().st_size))
            tell(f"using existing layer {digest}")
        if described is None:
            raise Refused(400, "no language model in 'files'", remedy="Give the model's GGUF beside its projector")
        return layers, Config(
            model_family=described.architecture,
            model_families=[described.architecture],
            model_type=parameter_size(described.parameters),
            file_type=described.file_type,
        )

    @staticmethod
    def _refuse_other_kinds(file: str, header: Header) -> None:
        kind = header.values.get("general.type", "model")
        if kind != "model":
            raise Refused(
                400, f"{file!r} is not a language model but a GGUF of type {kind!r}", remedy="Give the model's own GGUF"
            )
        if not header.architecture or "tokenizer.ggml.model" not in header.values:
            raise Refused(
                400,
                f"{file!r} is not a language model: it has no architecture or no tokenizer",
                remedy="Convert the model again, with its tokenizer beside its weights",
            )
        if header.values.get("split.count", 1) not in (0, 1):
            raise Refused(400, f"{file!r} is one part of a split GGUF", remedy="Merge the parts first")

    def _write(self, request: CreateRequest, layers: list[Layer], base: Config, tell: Tell) -> Manifest:
        def replace(kind: str, data: bytes, *, append: bool = False) -> None:
            if not append:
                layers[:] = [layer for layer in layers if layer.kind != kind]
            layer, fresh = self.store.write(kind, data)
            tell(f"{'creating new' if fresh else 'using existing'} layer {layer.digest}")
            layers.append(layer)

        if request.template:
            replace("template", request.template.encode())
        if request.system:
            replace("system", request.system.encode())
        if request.parameters:
            inherited = [layer for layer in layers if layer.kind == "params"]
            known = json.loads(self.store.read(inherited[-1])) if inherited else {}
            replace("params", msgspec.json.encode({**known, **request.parameters}))
        for text in [request.license] if isinstance(request.license, str) else request.license or []:
            if text:
                replace("license", text.encode(), append=True)
        if request.messages:
            replace("messages", msgspec.json.encode(request.messages))
        info = request.info or Info()
        config = Config(
            model_format="gguf",
            model_family=base.model_family or info.model_family,
            model_families=base.model_families,
            model_type=base.model_type or info.parameter_size,
            file_type=base.file_type if base.file_type != "unknown" else info.quantization_level or "unknown",
            renderer=request.renderer or base.renderer,
            parser=request.parser or base.parser,
            requires=request.requires or base.requires,
            capabilities=list(dict.fromkeys([*base.capabilities, *(info.capabilities or [])])),
            rootfs={"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        )
        return Manifest(self.store.write(CONFIG, msgspec.json.encode(config))[0], layers)


def _relative(name: str) -> bool:
    """Whether `name` stays below the folder it is read from, as Go's fs.ValidPath has it."""
    return bool(name) and all(part not in ("", ".", "..") for part in name.split("/"))
