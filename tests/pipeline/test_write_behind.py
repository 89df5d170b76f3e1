"""Writes done by another thread: in order, digested, and never lost silently."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import resource
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.errors import Cancelled, DiskError, ModelError
from abliterated.pipeline.past_cache import LARGE
from abliterated.pipeline.safe_write import CHUNK, Output, Source
from abliterated.pipeline.write_behind import Digest, WriteBehind


@contextmanager
def writing(target, size=None):
    with Output(target) as output:
        if size is not None:
            output.reserve(size)
        behind = WriteBehind(output)
        try:
            yield output, behind
        except BaseException:
            behind.close(failed=True)
            raise
        behind.close(failed=False)


@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12))
def test_what_lies_in_rooms_used_again_arrives_whole_and_in_order(sizes, tmp_path_factory):
    target, expected = tmp_path_factory.mktemp("rooms") / "out", b""
    digest = Digest()
    with writing(target) as (_, behind):
        for number, size in enumerate(sizes):
            _, room = behind.rooms()
            data = room.take(size)
            data[:] = number
            expected += data.tobytes()
            behind.put(data, digest)
    assert target.read_bytes() == expected
    assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()


def test_a_retry_overwrites_what_was_written_before_it(tmp_path):
    with writing(tmp_path / "out") as (output, behind):
        behind.put(np.full(5000, 1, dtype=np.uint8), Digest())
        output.seek(0)
        behind.put(np.full(20, 2, dtype=np.uint8), Digest())
        behind.wait()
        output.truncate()
    assert (tmp_path / "out").read_bytes() == b"\x02" * 20


def test_copies_are_told_and_lie_where_they_should(tmp_path):
    data = np.random.default_rng(0).bytes(CHUNK + 5)
    (tmp_path / "in").write_bytes(data)
    told: list[int] = []
    with Source(tmp_path / "in", lambda: False) as source, writing(tmp_path / "out") as (_, behind):
        behind.copy(source, 5, CHUNK, 5)
        behind.put(np.frombuffer(data[:5], dtype=np.uint8), Digest())
        behind.wait(told.append)
    assert (tmp_path / "out").read_bytes() == data
    assert sum(told) == CHUNK


@pytest.mark.parametrize("begin", [0, 4096, 12_345])
def test_large_pieces_written_and_copied_at_once_lie_where_they_should(begin, tmp_path):
    """As a checkpoint's tensors do: many a place between two pages, some small, some larger than a chunk."""
    sizes = (2 * CHUNK + 5, 3, LARGE - 1, LARGE + 4096, CHUNK, 700, CHUNK + 4095, 3 * LARGE)
    data = np.random.default_rng(0).integers(0, 256, begin + sum(sizes), dtype=np.uint8)
    data.tofile(tmp_path / "in")
    told, at, digest, expected = [], begin, Digest(), hashlib.sha256()
    with (
        Source(tmp_path / "in", lambda: False) as source,
        writing(tmp_path / "out", len(data)) as (output, behind),
    ):
        behind.copy(source, 0, begin, 0)
        for number, size in enumerate(sizes):
            if number % 2:
                output.seek(at)
                read, written = behind.rooms()
                piece = written.take(size)
                piece[:] = source.array(at, size, read)
                behind.put(piece, digest)
                expected.update(data[at : at + size])
            else:
                behind.copy(source, at, size, at)
            at += size
        behind.wait(told.append)
    kept = np.fromfile(tmp_path / "out", dtype=np.uint8)
    forget(tmp_path / "out")
    np.testing.assert_array_equal(kept, data)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", dtype=np.uint8), data)
    assert digest.hexdigest() == expected.hexdigest()
    assert sum(told) == begin + sum(sizes[::2])


def forget(path):
    """Out of the page cache with it, so that the disk is asked."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pages_in_memory(path):
    """How many pages of the file lie in the page cache. To read one, even without waiting, fetches it and its
    neighbours."""
    library, size = ctypes.CDLL(None, use_errno=True), path.stat().st_size
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    told = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as pages:  # written to by nobody
        byte = ctypes.c_char.from_buffer(pages)
        failed = library.mincore(ctypes.addressof(byte), size, told)
        del byte
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page[0] & 1 for page in told)


def test_a_large_file_being_written_leaves_the_page_cache_to_what_is_read(tmp_path):
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("Linux alone has it")
    trial = tmp_path / "trial"
    trial.write_bytes(bytes(LARGE))
    assert pages_in_memory(trial)
    forget(trial)
    if pages_in_memory(trial):
        pytest.skip("this file system keeps everything in memory")
    (tmp_path / "in").write_bytes(bytes(2 * CHUNK))
    with (
        Source(tmp_path / "in", lambda: False) as source,
        writing(tmp_path / "out", 3 * CHUNK) as (output, behind),
    ):
        if not output.parallel:
            pytest.skip("this file system knows no way past it")
        behind.copy(source, 0, 2 * CHUNK, 0)
        output.seek(2 * CHUNK)
        piece = behind.rooms()[1].take(CHUNK)
        piece[:] = 1
        behind.put(piece, Digest())
    assert pages_in_memory(tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == bytes(2 * CHUNK) + b"\x01" * CHUNK


def test_where_memory_lies_otherwise_than_the_file_it_is_written_all_the_same(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 3 * LARGE, dtype=np.uint8)
    with writing(tmp_path / "out", len(data)) as (output, _):
        output.put(data[1 : LARGE + 7], 1)
        output.put(data[LARGE + 7 :].tobytes(), LARGE + 7)
        output.put(data[:1], 0)
    assert (tmp_path / "out").read_bytes() == data.tobytes()


def test_a_file_that_shrinks_while_it_is_copied_is_named(tmp_path):
    (tmp_path / "in").write_bytes(bytes(CHUNK + LARGE))
    with (
        pytest.raises(ModelError, match="in ended while it was read"),
        Source(tmp_path / "in", lambda: False) as source,
        writing(tmp_path / "out", 3 * CHUNK) as (_, behind),
    ):
        behind.copy(source, 0, 3 * CHUNK, 0)
        behind.wait()
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_whole_is_told_before_anything_is_written(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="can't write out"), writing(tmp_path / "out", 200_000):
            pytest.fail("there is no room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_by_the_next_call_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="can't write out"), writing(tmp_path / "out") as (_, behind):
            digest = Digest()
            for _ in range(100):
                behind.rooms()
                behind.put(np.zeros(50_000, dtype=np.uint8), digest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_cancelled_copy_ends_the_run_and_its_thread(tmp_path):
    (tmp_path / "in").write_bytes(bytes(3 * CHUNK))
    asked = iter((False, True))
    with (
        pytest.raises(Cancelled),
        Source(tmp_path / "in", lambda: next(asked, True)) as source,
        writing(tmp_path / "out") as (_, behind),
    ):
        behind.copy(source, 0, 3 * CHUNK, 0)
        behind.wait()
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write-behind")]
