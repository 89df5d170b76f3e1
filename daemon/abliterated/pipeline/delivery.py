"""The folder a run delivers into: what lies there already and whether it is ours, and everything put there at once.

A run works elsewhere; here a product appears under its name whole, or not at all. One of ours is replaced, anything
else is left alone. Does not know how a product is made.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from abliterate.contract.errors import AbliteratedError, ConflictError, DiskError
from abliterated.files import sync_folder
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.provenance import VERSION
from abliterated.pipeline.watch import Watch

PROVENANCE_FILE: Final = "abliterated.json"
RESULT_FILE: Final = "result.json"
_CHUNK: Final = 8 << 20
_AT_FDCWD, _EXCHANGE = -100, 2


def check_folders(*folders: Path) -> None:
    """Make the folders, and see that they can be written. DiskError names the one that can't."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise DiskError(
            "no folder for temporary files can be written", remedy="Make room in /tmp, or set TMPDIR to another folder"
        ) from error
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DiskError(
                f"{folder}: can't be written ({error.strerror})", remedy="Check the path, its rights and its disk"
            ) from error


def check_place(output: Path, names: Sequence[str], base: Path | None) -> None:
    """ConflictError where one of the names a run may deliver is taken by what is not ours, or another product of ours
    lies there: a folder gets one."""
    for name in names:
        target = output / name
        if not target.exists() and not target.is_symlink():
            continue
        if base is not None and base.exists() and target.exists() and target.samefile(base):
            raise ConflictError(f"{name} in {output.name}/ is the base itself", remedy="Give another folder or name")
        if not ours(target):
            raise ConflictError(
                f"{name} in {output.name}/ is there already, and was not made by abliterated",
                remedy="Move it away, or give another folder or name",
            )
    earlier = _earlier(output)
    if earlier and earlier not in names and (output / earlier).exists():
        raise ConflictError(
            f"{output.name}/ holds another product already, {earlier}",
            remedy="Give another folder, or remove it with its reports",
        )


def ours(path: Path) -> bool:
    """Whether abliterated made it: a GGUF or a folder with our provenance, a direction with our sidecar."""
    try:
        if path.is_symlink():
            return False
        if path.is_dir():
            return VERSION in _object(path / PROVENANCE_FILE)
        if path.suffix == ".gguf":
            return VERSION in read_gguf(path).values
        if path.suffix == ".safetensors":
            return "digest" in _object(path.with_name(path.name + ".json"))
        # The reports say so themselves; answers lie beside them.
        return any("product" in _object(one) for one in (path, path.with_name("report.json")))
    except AbliteratedError:
        return False


def deliver(sources: Sequence[Path], output: Path) -> None:
    """Put every one of `sources` into `output`, each whole, in this order; what lay there under its name goes."""
    try:
        for source in sources:
            if source.parent != output:
                _place(source, output / source.name)
        sync_folder(output)
    except OSError as error:
        raise DiskError(
            f"can't write into {output.name}/: {error.strerror}",
            remedy="Check that folder and its disk's room, and run it again",
        ) from error


def forget_result(output: Path) -> None:
    """The result of an earlier run goes before its product is replaced."""
    try:
        (output / RESULT_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"can't write into {output.name}/: {error.strerror}", remedy="Check that folder") from error


def digest(path: Path, watch: Watch) -> tuple[str, int]:
    """sha256 (hex) and bytes of a product; of a folder, over its files' names and digests."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total, done, found = sum(file.stat().st_size for file in files), 0, []
    for one in files:
        content = hashlib.sha256()
        with one.open("rb") as file:
            while chunk := file.read(_CHUNK):
                content.update(chunk)
                done += len(chunk)
                watch.step(done, total, "bytes", "reading it back")
        found.append(content.hexdigest())
    if path.is_file():
        return found[0], total
    listed = "".join(f"{one.name} {content}\n" for one, content in zip(files, found, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest(), total


def _place(source: Path, target: Path) -> None:
    try:
        _swap_in(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # Another filesystem: copied beside its place first.
        partial = target.with_name(f".{target.name}.partial")
        _remove(partial)
        try:
            shutil.copytree(source, partial) if source.is_dir() else shutil.copy2(source, partial)
            for file in sorted(partial.iterdir()) if partial.is_dir() else [partial]:
                _sync_file(file)
            _swap_in(partial, target)
        except BaseException:
            _remove(partial)
            raise
        _remove(source)


def _swap_in(source: Path, target: Path) -> None:
    if not target.is_dir():
        source.replace(target)  # over a file, if there is one
        return
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if _exchange(source, target):
        source.rename(old)
    else:
        target.rename(old)
        source.rename(target)
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, where the system can: no moment without a product."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _earlier(output: Path) -> str:
    """The product an earlier run delivered here."""
    found = _object(output / RESULT_FILE).get("product", "")
    return found if isinstance(found, str) and Path(found).name == found else ""


def _object(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
