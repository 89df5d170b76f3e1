"""What hashes and reads gigabytes steps back; the loop it was asked from doesn't."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from abliterated.ollama.aside import NICE, aside


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
async def test_the_thread_steps_back_and_its_process_does_not() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert await aside(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == max(before, NICE)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


async def test_it_gives_the_answer_or_the_error() -> None:
    assert await aside(int, "17", base=8) == 15
    with pytest.raises(ValueError, match="invalid literal"):
        await aside(int, "x")
