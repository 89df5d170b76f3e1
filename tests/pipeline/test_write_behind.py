"""Writes done by another thread: in order, digested, and never lost silently."""

from __future__ import annotations

import hashlib
import resource
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.errors import Cancelled, DiskError
from abliterated.pipeline.safe_write import CHUNK, Output, Source
from abliterated.pipeline.write_behind import Digest, WriteBehind


@contextmanager
def writing(target):
    with Output(target) as output:
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
