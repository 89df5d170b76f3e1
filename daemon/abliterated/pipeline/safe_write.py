"""Files read in pieces and files written so that nobody ever sees half of one.

`Source` reads exact ranges and looks, before each, whether the run was cancelled. `Output` writes under a temporary
name beside its target; leaving it well syncs and renames it, leaving it by an exception removes it. Knows no formats.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from abliterate.contract.errors import Cancelled, DiskError, ModelError
from abliterated.files import sync_folder
from abliterated.pipeline.past_cache import GRAIN, LARGE, OF_THE_DISK, PastCache, reserve

Bytes: TypeAlias = NDArray[np.uint8]

CHUNK: Final = 8 << 20


class Room:
    """Memory used again and again: asked of the system anew for every matrix, it costs as much as an edit.

    Asked for in small pages: numpy would ask for huge ones, which a virtual machine's host may have to find first.
    """

    def __init__(self) -> None:
        self._held: Bytes = np.empty(0, dtype=np.uint8)
        self.phase = 0  # where in a file, to the grain, goes what it will hold

    def take(self, size: int) -> Bytes:
        """So many bytes, whatever they hold; what was taken before is lost."""
        if self._held.size < size + GRAIN:
            self._held = np.empty(0, dtype=np.uint8)
            self._held = np.frombuffer(mmap.mmap(-1, size + GRAIN, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        return self._held[self.phase : self.phase + size]


class Source:
    """A file to read from, by position."""

    def __init__(self, path: Path, cancelled: Callable[[], bool]) -> None:
        self._path, self._cancelled = path, cancelled

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._unreadable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def array(self, start: int, size: int, room: Room | None = None) -> Bytes:
        """Bytes from `start`, as an array of one's own, or in `room` until that is used again."""
        found = room.take(size) if room else np.empty(size, dtype=np.uint8)
        view = found.data
        at = 0
        while at < size:
            check(self._cancelled)
            try:
                count = os.preadv(self._file, [view[at : at + CHUNK]], start + at)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise ModelError(f"{self._path.name} ended while it was read", remedy="Pull or download it again")
            at += count
        return found

    def chunks(self, start: int, size: int) -> Iterator[Bytes]:
        """The same in pieces, for copying."""
        for at in range(start, start + size, CHUNK):
            yield self.array(at, min(CHUNK, start + size - at))

    def copy(self, start: int, size: int, output: Output, at: int) -> Iterator[int]:
        """Copy bytes to a place in `output` without taking them through this process; yields how many, in pieces.

        Independent of the output's own position, so that another thread may write elsewhere.
        """
        end = start + size
        while start < end:
            check(self._cancelled)
            count = output.take(self._file, start, min(CHUNK, end - start), at)
            if not count:  # another file system, or none that can: by hand
                data = self.array(start, min(CHUNK, end - start))
                output.put(data, at)
                count = len(data)
            start, at = start + count, at + count
            yield count

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(f"can't read {self._path.name}: {error.strerror}", remedy="Check the path and its rights")


class Output:
    """A file being written; `at` is where the next write goes."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._partial = target.with_name(f".{target.name}.partial")
        self._direct: PastCache | None = None
        self.at = 0

    def __enter__(self) -> Self:
        try:
            self._file = os.open(
                self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644
            )
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        except OSError as failure:
            self._partial.unlink(missing_ok=True)
            raise self._failed(failure) from failure
        finally:
            if self._direct is not None:
                self._direct.close()
            os.close(self._file)
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        try:
            self._partial.replace(self._target)
            sync_folder(self._target.parent)
        except OSError as failure:
            self._partial.unlink(missing_ok=True)
            raise self._failed(failure) from failure

    def write(self, data: bytes | Bytes) -> None:
        """Write all of it. DiskError if the disk won't take it."""
        self.at = self.put(data, self.at)

    def put(self, data: bytes | Bytes, at: int) -> int:
        """Write all of it at a place, whatever the position; where it ends."""
        flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1)
        view, done = flat.data, 0
        if self._direct is not None and len(view) >= LARGE and (flat.ctypes.data - at) % GRAIN == 0:
            done = self._put(view[: -at % GRAIN], at)
            with self._telling():
                done += self._direct.put(view[done:], at + done)
        done += self._put(view[done:], at + done)
        return at + done

    def take(self, file: int, start: int, size: int, at: int) -> int:
        """Let the kernel copy from an open file; how much it did, 0 where it can't."""
        if self._direct is not None and size >= LARGE and (start - at) % GRAIN == 0:
            if before := -at % GRAIN:
                size = before
            else:
                with self._telling():
                    if count := self._direct.take(file, start, size, at):
                        return count
        if not hasattr(os, "copy_file_range"):
            return 0
        try:
            count = os.copy_file_range(file, self._file, size, start, at)
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise self._failed(error) from error
            return 0
        _start_writing(self._file, at, count)
        return count

    def reserve(self, size: int) -> None:
        """Let the file be so long, and what is large go past the page cache from now on, where the system can.

        DiskError if the disk has not the room.
        """
        with self._telling():
            reserve(self._file, size)
        with suppress(OSError):
            self._direct = PastCache(self._partial)

    @property
    def parallel(self) -> bool:
        """Whether threads may write into it at once; else they would wait for each other inside the kernel."""
        return self._direct is not None

    def seek(self, position: int) -> None:
        """Go on from there; a gap reads as zeros."""
        self.at = position

    def truncate(self) -> None:
        """Let the file end here."""
        with self._telling():
            os.ftruncate(self._file, self.at)

    def _put(self, view: memoryview, at: int) -> int:
        done = 0
        while done < len(view):
            with self._telling():
                count = os.pwrite(self._file, view[done : done + CHUNK], at + done)
            _start_writing(self._file, at + done, count)
            done += count
        return done

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> DiskError:
        return DiskError(
            f"can't write {self._target.name}: {error.strerror}", remedy="Make room on that disk, or choose another"
        )


def _start_writing(file: int, at: int, size: int) -> None:
    """Ask Linux to begin writing these bytes to the disk, so that the sync at the end has little left to wait for."""
    if (start := _sync_file_range()) is not None:
        start(file, at, size, 2)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], object] | None:
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast("Callable[[int, int, int, int], object]", found)


def check(cancelled: Callable[[], bool]) -> None:
    """Raise Cancelled where the run was asked to stop."""
    if cancelled():
        raise Cancelled(
            "the run was asked to stop while it edited the weights",
            remedy="Submit it again to go on where it stopped",
        )


def need_space(target: Path, needed: int) -> None:
    """DiskError, before anything is written, where the target's disk has less than `needed` bytes free."""
    try:
        disk = os.statvfs(target.parent)
    except OSError as error:
        raise DiskError(
            f"can't write into {target.parent.name}/: {error.strerror}", remedy="Check the folder and its rights"
        ) from error
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise DiskError(
            f"{target.name} needs {_size(needed)}, and its disk has {_size(free)} free",
            remedy=f"Make {_size(needed - free)} of room, or choose another disk",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
