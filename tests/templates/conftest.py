"""Engines for the tests of templates: those that can be had, each started where it is needed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from engines import Engine, RunningEngine, engine_parameters, require


@pytest.fixture(scope="module", params=[given for given in engine_parameters() if not given.values[0].embedded])
def ollama(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    """Each real Ollama."""
    engine: Engine = require(request.param)
    with engine.start() as running:
        yield running


@pytest.fixture(scope="module")
def http(ollama: RunningEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ollama.base_url, trust_env=False, timeout=150) as client:
        yield client
