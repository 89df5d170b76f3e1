"""A power cut, in this process: what was not fsynced when it comes is rolled back, on the real file system.

Everything found at `install` counts as on the disk. fsync of a file keeps its bytes, fsync of a folder its entries,
os.sync all of both. Files keep their inode and time, as they would. SQLite's files are left to SQLite, which syncs each
commit before it answers (WAL, synchronous=FULL).
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEFT_ALONE = ("journal.sqlite3", "reserve.bin")


class PowerCut:
    """`cut()` restores below `root` what is durable. `luck`: which of the rest is kept; None keeps nothing of it."""

    def __init__(self, root: Path, grave: Path, luck: random.Random | None = None) -> None:
        self.root, self.grave, self.luck = root, grave, luck
        grave.mkdir(exist_ok=True)
        self.lock = threading.RLock()
        self.files: dict[int, tuple[bytes, int]] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self._real: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        self._everything()
        for name in ("fsync", "sync", "unlink", "remove", "rename", "replace", "rmdir"):
            self._real[name] = getattr(os, name)
        os.fsync = self._fsync
        os.sync = self._sync
        os.unlink = os.remove = self._unlink
        os.rename = os.replace = self._rename
        os.rmdir = self._rmdir

    # --- what becomes durable -----------------------------------------------------------------------------------

    def _fsync(self, descriptor: Any) -> None:
        with self.lock:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._keep(Path(f"/proc/self/fd/{number}").readlink())

    def _sync(self) -> None:
        with self.lock:
            self._everything()

    def _everything(self) -> None:
        for folder, _, names in os.walk(self.root):
            self._keep(Path(folder))
            for name in names:
                self._keep(Path(folder) / name)

    def _keep(self, path: Path) -> None:
        if path.name.startswith(LEFT_ALONE):
            return
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            entries = os.scandir(path)
            self.folders[status.st_ino] = {e.name: e.inode() for e in entries if not e.name.startswith(LEFT_ALONE)}
        elif stat.S_ISREG(status.st_mode):
            self.files[status.st_ino] = (path.read_bytes(), status.st_mtime_ns)

    # --- nothing is ever gone before it is durably gone ---------------------------------------------------------

    def _bury(self, path: Path) -> None:
        self._real["rename"](path, self.grave / str(path.lstat().st_ino))

    def _path(self, name: Any, folder: int | None) -> Path:
        path = Path(os.fsdecode(name))
        return Path(f"/proc/self/fd/{folder}").readlink() / path if folder is not None else path

    def _mine(self, path: Path) -> bool:
        return path.absolute().is_relative_to(self.root) and not path.name.startswith(LEFT_ALONE)

    def _unlink(self, name: Any, *, dir_fd: int | None = None) -> None:
        with self.lock:
            path = self._path(name, dir_fd)
            if self._mine(path):
                self._bury(path)
            else:
                self._real["unlink"](path)

    def _rmdir(self, name: Any, *, dir_fd: int | None = None) -> None:
        with self.lock:
            path = self._path(name, dir_fd)
            if any(os.scandir(path)):
                self._real["rmdir"](path)
            self._bury(path)

    def _rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        with self.lock:
            source, target = self._path(old, src_dir_fd), self._path(new, dst_dir_fd)
            if self._mine(target) and target.exists():
                self._bury(target)
            self._real["rename"](source, target)

    # --- the cut ------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Holds the lock for ever: nothing else is written by this process through os."""
        self.lock.acquire()
        self._places = {
            (Path(folder) / name).lstat().st_ino: Path(folder) / name
            for top in (self.root, self.grave)
            for folder, inner, names in os.walk(top)
            for name in [*inner, *names]
        }
        self._restore_folder(self.root)

    def _restore_folder(self, folder: Path) -> None:
        wanted = dict(self.folders.get(folder.lstat().st_ino, {}))
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(LEFT_ALONE) or wanted.get(entry.name) == entry.inode():
                continue
            new = entry.name not in wanted and entry.inode() not in wanted.values()
            if new and self.luck is not None and self.luck.random() < 0.5:
                wanted[entry.name] = entry.inode()
                continue
            place = self.grave / f"cut-{entry.inode()}"
            self._real["rename"](entry.path, place)
            self._places[entry.inode()] = place
        for name, inode in wanted.items():
            path = folder / name
            if not path.exists():
                if self.luck is not None and self.grave in self._places[inode].parents and self.luck.random() < 0.5:
                    continue  # this removal had reached the disk
                self._real["rename"](self._places[inode], path)
                self._places[inode] = path
            if path.is_dir():
                self._restore_folder(path)
            else:
                self._restore_file(path, inode)

    def _restore_file(self, path: Path, inode: int) -> None:
        data, time = self.files.get(inode, (b"", path.stat().st_mtime_ns))
        now = path.read_bytes()
        if now == data:
            return
        if self.luck is not None:
            data = self.luck.choice([data, now, now[: len(now) // 2], b""])
        mode = path.stat().st_mode
        path.chmod(0o600)
        path.write_bytes(data)
        path.chmod(stat.S_IMODE(mode))
        os.utime(path, ns=(time, time))
