"""A start that nobody notices: what `status` imports, and how long it takes."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

from client.conftest import make_job
from client.fake_daemon import FakeDaemon

HEAVY = {
    "rich",
    "aiohttp",
    "asyncio",
    "torch",
    "psutil",
    "watchdog",
    "tomli_w",
    "abliterated",
    "platformdirs",
    "typing_extensions",
}


def test_status_imports_nothing_heavy(daemon: FakeDaemon, environment: dict[str, str]) -> None:
    daemon.put(make_job(0))
    code = "import sys; from abliterate.cli import main; main(['status']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=150
    )
    loaded = {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert not loaded & HEAVY


def test_status_is_there_at_once(daemon: FakeDaemon, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    daemon.put(make_job(0))
    spent = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("status").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Its own processor time: others may be at work here. The bar, by the clock, is `make bench`'s.
    assert min(spent) < 0.25, spent
