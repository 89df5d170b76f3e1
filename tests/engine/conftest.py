"""One engine for the tests of this room that only talk; those that hurt one start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.running import Engine, engine
from engine.scripted_gguf import PLAIN_TEMPLATE, Model, Script, write

THOUGHTFUL = Model(
    # A prompt ends in a newline whether the model may think or not, so this one thinks either way.
    scripts=[Script(["<think>", "I should ponder", "</think>", "\n\nthe answer", " is", " 42"])]
)
CALLING = Model(
    scripts=[Script(["<tool_call>", '\n{"name": "get_weather", ', '"arguments": {"city": "Paris"}}\n', "</tool_call>"])]
)
PLAIN = Model(scripts=[Script("a plain answer, nothing more")], chat_template=PLAIN_TEMPLATE)
LONG = 65536  # tokens: minutes of talk for a test that must see a generation cut short
ENDLESS = Model(
    scripts=[Script("round and round it goes ", loop=True)], chat_template=PLAIN_TEMPLATE, context_length=LONG
)
BARE = Model(scripts=[Script(" upon a time", after="e")], chat_template=None)
JSON = Model(scripts=[Script(['{"city"', ': "Par', 'is"}'])], chat_template=PLAIN_TEMPLATE)


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ggufs")
    models = {
        "thoughtful": THOUGHTFUL,
        "calling": CALLING,
        "plain": PLAIN,
        "endless": ENDLESS,
        "bare": BARE,
        "json": JSON,
    }
    return {name: write(folder / f"{name}.gguf", model) for name, model in models.items()}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, ggufs: dict[str, Path]) -> Iterator[Engine]:
    """An engine that has every scripted model, at temperature 0."""
    with engine(tmp_path_factory.mktemp("shared") / "models") as running:
        for name, path in ggufs.items():
            running.create(name, path, parameters={"temperature": 0})
        yield running


@pytest.fixture(scope="package")
def hurt(tmp_path_factory: pytest.TempPathFactory, ggufs: dict[str, Path]) -> Iterator[Engine]:
    """An engine whose store and runners tests may damage."""
    folder = tmp_path_factory.mktemp("hurt")
    with engine(folder / "models") as running:
        running.create("base", ggufs["plain"], parameters={"temperature": 0})
        running.create("endless", ggufs["endless"])
        yield running
