"""What hashes and reads gigabytes steps back; the loop it was asked from doesn't."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from abliterated.ollama.aside import NICE, aside
from abliterated.ollama.client import _Upload


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
async def test_the_thread_steps_back_and_its_process_does_not() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert await aside(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == max(before, NICE)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


async def test_it_gives_the_answer_or_the_error() -> None:
    assert await aside(int, "17", base=8) == 15
    with pytest.raises(ValueError, match="invalid literal"):
        await aside(int, "x")


async def test_a_file_stays_open_until_the_thread_that_reads_it_is_done(tmp_path: Path) -> None:
    """Else its descriptor becomes a new connection's, and the thread takes away what was meant for that."""
    slow = tmp_path / "slow"
    os.mkfifo(slow)
    writer = os.open(slow, os.O_RDWR)

    async def first() -> bytes:
        return await anext(aiter(_Upload(slow, "", None).read()))

    try:
        reading = asyncio.create_task(first())
        for again in range(3):
            await asyncio.sleep(0)
            if again:
                reading.cancel()
        await asyncio.wait({reading}, timeout=0.05)
        assert not reading.done()
        os.write(writer, b"x")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 60)
    finally:
        os.write(writer, b"x")
        os.close(writer)
