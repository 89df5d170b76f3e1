"""The doorbell rings, and a deaf one is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
from watchdog.observers.polling import PollingObserver

from abliterated.spool import watch
from abliterated.spool.watch import Doorbell, filesystem, keep


async def test_a_renamed_in_file_is_scanned_soon(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    seen: asyncio.Queue[list[str]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def scan() -> float | None:
        loop.call_soon_threadsafe(seen.put_nowait, sorted(path.name for path in folder.iterdir()))
        return None

    stopping = asyncio.Event()
    task = loop.create_task(keep(folder, scan, stopping))
    assert await asyncio.wait_for(seen.get(), 60) == [], "looked once at the start"
    (folder / ".a.tmp").write_text("x")
    (folder / ".a.tmp").rename(folder / "a.toml")
    while await asyncio.wait_for(seen.get(), 60) != ["a.toml"]:
        pass
    stopping.set()
    await asyncio.wait_for(task, 60)


async def test_a_waiting_file_is_looked_at_again_in_time(tmp_path: Path) -> None:
    looks: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def scan() -> float | None:
        loop.call_soon_threadsafe(looks.put_nowait, None)
        return 0.01

    stopping = asyncio.Event()
    task = loop.create_task(keep(tmp_path, scan, stopping))
    for _ in range(3):
        await asyncio.wait_for(looks.get(), 60)
    stopping.set()
    await asyncio.wait_for(task, 60)


def test_a_recreated_folder_gets_a_new_watcher(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    bell = Doorbell(folder, lambda: None)
    bell.check()
    first = bell._observer
    bell.check()
    assert bell._observer is first
    for _ in range(5):  # whether or not its inode is given to the new one, or the watcher's thread has noticed
        before = bell._observer
        shutil.rmtree(folder)
        bell.check()
        assert folder.is_dir()
        assert bell._observer is not before
    bell.stop()


async def scans_after_a_drop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file that was renamed in is looked at, though no rescan comes. It is dropped again and again: a watcher
    that polls takes its first look in a thread of its own, and what was there then is nothing new to it."""
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 1e6)
    loop = asyncio.get_running_loop()
    looks: asyncio.Queue[None] = asyncio.Queue()

    def scan() -> float | None:
        loop.call_soon_threadsafe(looks.put_nowait, None)
        return None

    stopping = asyncio.Event()
    task = loop.create_task(keep(folder, scan, stopping))
    await asyncio.wait_for(looks.get(), 60)
    for number in range(120):
        (folder / ".a.tmp").write_text("x")
        (folder / ".a.tmp").rename(folder / f"{number}.toml")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(looks.get(), 0.5)
            break
    else:
        raise AssertionError("dropped in vain")
    stopping.set()
    await asyncio.wait_for(task, 60)


async def test_a_drop_of_which_every_event_was_lost_is_found_within_thirty_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.RESCAN_SECONDS < 30
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 0.1)
    monkeypatch.setattr(watch._Bell, "on_any_event", lambda *_: None)
    loop = asyncio.get_running_loop()
    looks: asyncio.Queue[bool] = asyncio.Queue()

    def scan() -> float | None:
        loop.call_soon_threadsafe(looks.put_nowait, (tmp_path / "a.toml").exists())
        return None

    stopping = asyncio.Event()
    task = loop.create_task(keep(tmp_path, scan, stopping))
    assert not await asyncio.wait_for(looks.get(), 60)
    (tmp_path / "a.toml").write_text("x")
    while not await asyncio.wait_for(looks.get(), 60):
        pass
    stopping.set()
    await asyncio.wait_for(task, 60)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC])
async def test_where_the_kernel_has_no_watcher_left_the_folder_is_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """`fs.inotify.max_user_instances` and `max_user_watches`."""

    class NoneLeft:
        def schedule(self, *arguments: object, **keywords: object) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(watch, "Observer", NoneLeft)
    bell = Doorbell(tmp_path, lambda: None)
    bell.check()
    assert isinstance(bell._observer, PollingObserver)
    bell.stop()
    await scans_after_a_drop(tmp_path, monkeypatch)


async def test_a_network_s_filesystem_is_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "NETWORK_FILESYSTEMS", frozenset({filesystem(tmp_path)}))
    bell = Doorbell(tmp_path, lambda: None)
    bell.check()
    assert isinstance(bell._observer, PollingObserver)
    bell.stop()
    await scans_after_a_drop(tmp_path, monkeypatch)


def test_a_watcher_that_died_is_replaced(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path, lambda: None)
    bell.check()
    first = bell._observer
    assert first is not None
    for emitter in first.emitters:
        emitter.stop()
        emitter.join(timeout=60)
    bell.check()
    assert bell._observer is not first
    bell.stop()


def test_the_filesystem_is_known(tmp_path: Path) -> None:
    assert filesystem(tmp_path)
