"""The doorbell: any event in the folder rings; a scan within 30 s comes whatever happens.

watchdog's events are hints: they may be lost, doubled or late, and its thread dies silently when the folder is
recreated, so its health is looked at with every scan. Does not know what a scan does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

log = logging.getLogger(__name__)

RESCAN_SECONDS = 29.0  # what is dropped is taken within 30, whatever was lost
POLL_SECONDS = 1.0
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "ceph", "glusterfs"}
)
_QUIET_EVENTS = frozenset({"opened", "closed_no_write"})


class _Bell(FileSystemEventHandler):
    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in _QUIET_EVENTS:
            self._ring()


class Doorbell:
    """Watches one folder, and starts over when the folder or the watcher is no longer what it was."""

    def __init__(self, folder: Path, ring: Callable[[], None]) -> None:
        self._folder = folder
        self._bell = _Bell(ring)
        self._observer: BaseObserver | None = None
        self._held: int | None = None  # the folder, open: so long no other can have its inode

    def check(self) -> None:
        """Start the watcher, or replace it if it died or its folder was recreated."""
        self._folder.mkdir(parents=True, exist_ok=True)
        same = self._held is not None and os.path.samestat(os.fstat(self._held), self._folder.stat())
        watcher = self._observer
        if same and watcher is not None and all(one.is_alive() for one in (watcher, *watcher.emitters)):
            return
        self.stop()
        self._held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        polls = filesystem(self._folder) in NETWORK_FILESYSTEMS
        if not polls:
            try:
                self._observer = self._started(Observer())
                return
            except OSError as error:
                log.warning("no file events (%s): polling instead", error, extra={"action": "watch"})
        self._observer = self._started(PollingObserver(timeout=POLL_SECONDS))

    def stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            with contextlib.suppress(RuntimeError):
                self._observer.join(timeout=5)
            self._observer = None
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _started(self, observer: BaseObserver) -> BaseObserver:
        observer.schedule(self._bell, str(self._folder), recursive=False)
        observer.start()
        return observer


async def keep(folder: Path, scan: Callable[[], float | None], stopping: asyncio.Event) -> None:
    """Scan at every ring, when a waiting file is due, and every RESCAN_SECONDS, until `stopping`."""
    loop = asyncio.get_running_loop()
    rung = asyncio.Event()

    def ring() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            loop.call_soon_threadsafe(rung.set)

    bell = Doorbell(folder, ring)
    stop = loop.create_task(stopping.wait())
    try:
        while not stopping.is_set():
            rung.clear()
            due: float | None = None
            try:
                await asyncio.to_thread(bell.check)
                due = await asyncio.to_thread(scan)
            except OSError as error:
                log.error("the spool can't be read: %s", error, extra={"action": "spool"})
                due = 1.0
            bell_rings = loop.create_task(rung.wait())
            await asyncio.wait(
                {bell_rings, stop},
                timeout=min(RESCAN_SECONDS, due or RESCAN_SECONDS),
                return_when=asyncio.FIRST_COMPLETED,
            )
            bell_rings.cancel()
    finally:
        stop.cancel()
        await asyncio.to_thread(bell.stop)


def filesystem(path: Path) -> str:
    """The type of the filesystem `path` lies on, as /proc/mounts names it; "" where that can't be told."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    best = ("", "")
    real = str(path.resolve())
    for line in mounts:
        point, kind = line.split()[1:3]
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
