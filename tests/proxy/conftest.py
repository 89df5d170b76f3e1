"""What a scripted upstream is to a test of the proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.script import ScriptedUpstream, upstream


@pytest.fixture
def server() -> Iterator[ScriptedUpstream]:
    with upstream() as scripted:
        yield scripted
