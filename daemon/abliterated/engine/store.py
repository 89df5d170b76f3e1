"""Blobs and manifests on disk, in Ollama's own layout, so that a real Ollama can open the folder and we can open its.

`manifests/<host>/<namespace>/<model>/<tag>` is a docker v2 manifest, `blobs/sha256-<hex>` what it points to.
Everything appears by rename. What a manifest no longer needs is removed; on any doubt (a manifest that can't be read)
nothing is.
Does not know: HTTP, what stands in a blob.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from abliterate.contract.errors import ModelError, RecipeError
from abliterate.contract.names import ModelName, parse_name
from abliterated.engine.errors import invalid_name, model_not_found
from abliterated.files import sync_folder, write_whole
from abliterated.shapes.refusals import Refused

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.ollama.image."
GRACE = 3600.0  # seconds an unreferenced blob is left alone: its `create` may still come
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_UPLOAD = ".upload-"
T = TypeVar("T")


class Layer(msgspec.Struct, frozen=True, omit_defaults=True, rename={"media_type": "mediaType"}):
    media_type: str
    digest: str
    size: int
    name: str = ""

    @property
    def kind(self) -> str:
        """`model`, `template`, `params` …"""
        return self.media_type.removeprefix(LAYER)


class Manifest(msgspec.Struct, frozen=True, rename={"schema": "schemaVersion", "media_type": "mediaType"}):
    config: Layer
    layers: list[Layer]
    schema: int = 2
    media_type: str = MANIFEST


@dataclass(frozen=True)
class Stored:
    """A model in the store: its name as stored, the manifest and the manifest file's digest."""

    name: ModelName
    manifest: Manifest
    digest: str
    modified: float

    @property
    def size(self) -> int:
        return self.manifest.config.size + sum(layer.size for layer in self.manifest.layers)

    def layers(self, kind: str) -> list[Layer]:
        return [layer for layer in self.manifest.layers if layer.kind == kind]


def read_name(text: str | None) -> ModelName:
    """A name as a request spells it (`:local` means nothing here); 400 where Ollama would refuse it."""
    text = (text or "").strip()
    if not text:
        raise Refused(400, "model is required")
    try:
        return parse_name(text.removesuffix(":local"))
    except RecipeError as error:
        raise invalid_name() from error


def read_digest(text: str) -> str:
    """`sha256:<hex>` from either spelling; 400 for anything else."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise Refused(400, "invalid digest format")
    return f"sha256:{match[1]}"


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.blobs = self.root / "blobs"
        self.manifests = self.root / "manifests"
        for folder in (self.blobs, self.manifests):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)

    # blobs

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def has(self, digest: str) -> bool:
        return self.blob(digest).is_file()

    def upload(self) -> Upload:
        return Upload(self)

    def write(self, kind: str, data: bytes) -> tuple[Layer, bool]:
        """Store `data` as a layer; says whether it was new."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        fresh = not self.has(digest)
        if fresh:
            write_whole(self.blob(digest), data)
        else:
            os.utime(self.blob(digest))
        return Layer(kind if "/" in kind else LAYER + kind, digest, len(data)), fresh

    def read(self, layer: Layer) -> bytes:
        try:
            return self.blob(layer.digest).read_bytes()
        except OSError as error:
            raise Refused(
                500, f"blob {layer.digest} can't be read: {error.strerror}", remedy="Create its model again"
            ) from error

    # manifests

    def all(self) -> list[Stored]:
        """Every model whose manifest can be read, the youngest first."""
        found = [stored for path in self._manifest_files() if (stored := self._load(path)) is not None]
        return sorted(found, key=lambda stored: (-stored.modified, stored.name.key()))

    def find(self, name: ModelName) -> Stored | None:
        """The model of that name, whatever its case."""
        stored = self._load(self._path(name))
        if stored is not None:
            return stored
        return next((stored for stored in self.all() if stored.name.key() == name.key()), None)

    def get(self, text: str | None) -> Stored:
        """The model a request names; 400 or 404 otherwise."""
        stored = self.find(read_name(text))
        if stored is None:
            raise model_not_found(text or "")
        return stored

    def put(self, name: ModelName, manifest: Manifest) -> Stored:
        """Make `name` mean `manifest`; an older one of that name gives up what nothing else needs."""
        old = self.find(name)
        target = old.name if old else name
        for layer in (manifest.config, *manifest.layers):
            if not self.has(layer.digest):
                raise Refused(
                    400, f"blob {layer.digest} is not in the store", remedy="Upload it, or create its model again"
                )
        path = self._path(target)
        self._make_folder(path.parent)
        write_whole(path, msgspec.json.encode(manifest))
        if old:
            self._release(old.manifest)
        stored = self._load(path)
        assert stored is not None, "a manifest just written can be read"
        return stored

    def delete(self, stored: Stored) -> None:
        path = self._path(stored.name)
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
        for folder in list(path.parents)[:3]:
            try:
                folder.rmdir()
            except OSError:
                break  # not empty: the next ones aren't either
        self._release(stored.manifest)

    def tidy(self, now: float | None = None) -> int:
        """Remove half uploads and, after an hour's grace, blobs no manifest needs; returns the bytes freed."""
        needed = self._needed()
        freed = 0
        for path in self.blobs.iterdir():
            status = path.stat()
            if not path.name.startswith(_UPLOAD):
                digest = path.name.replace("-", ":", 1)
                if needed is None or not _DIGEST.fullmatch(digest) or digest in needed:
                    continue
                if (now or time.time()) - status.st_mtime < GRACE:
                    continue
            path.unlink(missing_ok=True)
            freed += status.st_size
        return freed

    def _release(self, manifest: Manifest) -> None:
        needed = self._needed()
        if needed is None:
            return
        for layer in (manifest.config, *manifest.layers):
            if layer.digest not in needed:
                self.blob(layer.digest).unlink(missing_ok=True)
        sync_folder(self.blobs)

    def _needed(self) -> set[str] | None:
        """Digests some manifest points to; None if one can't be read, for then nobody knows."""
        needed: set[str] = set()
        for path in self._manifest_files():
            stored = self._load(path)
            if stored is None:
                return None
            needed.update(layer.digest for layer in (stored.manifest.config, *stored.manifest.layers))
        return needed

    def _manifest_files(self) -> Iterator[Path]:
        return (path for path in self.manifests.glob("*/*/*/*") if not path.name.startswith(".") and path.is_file())

    def _path(self, name: ModelName) -> Path:
        return self.manifests / name.host / name.namespace / name.model / name.tag

    def _load(self, path: Path) -> Stored | None:
        try:
            data = path.read_bytes()
            modified = path.stat().st_mtime
            host, namespace, model, tag = path.relative_to(self.manifests).parts
            manifest = msgspec.json.decode(data, type=Manifest)
        except (OSError, ValueError):
            return None
        return Stored(ModelName(host, namespace, model, tag), manifest, hashlib.sha256(data).hexdigest(), modified)

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)


class Upload:
    """A blob on its way in: written to a temporary file, hashed as it comes, named only if its digest is what was
    said.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hash = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(prefix=_UPLOAD, dir=store.blobs)
        self.path = Path(name)
        self.file = os.fdopen(descriptor, "wb")

    def add(self, data: bytes) -> None:
        self.hash.update(data)
        with _writing(self.store):
            self.file.write(data)

    def finish(self, digest: str) -> None:
        found = f"sha256:{self.hash.hexdigest()}"
        if found != digest:
            raise Refused(400, f'digest mismatch, expected "{digest}", got "{found}"')  # Ollama's own words
        with _writing(self.store):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.path.chmod(0o644)
            self.path.replace(self.store.blob(digest))
            sync_folder(self.store.blobs)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write before, it can't now
            self.file.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            500, f"can't write the blob: {error.strerror}", remedy=f"Free some room where {store.root} is"
        ) from error


def json_blob(store: Store, stored: Stored, kind: str, default: T) -> T:
    """The last layer of `kind`, parsed as what `default` is; `default` where there is none."""
    layers = stored.layers(kind)
    if not layers:
        return default
    try:
        return msgspec.json.decode(store.read(layers[-1]), type=type(default))
    except ValueError as error:
        raise ModelError(f"its {kind} layer can't be read: {error}", remedy="Create the model again") from error
