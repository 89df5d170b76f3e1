"""The page of architectures names those the tests edit, and those the census refuses."""

from __future__ import annotations

import re
from pathlib import Path

from abliterated.pipeline import checkpoint_writers, writers
from pipeline.architectures import SEEING, SPECIAL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"


def test_the_page_names_every_architecture_there_is_a_test_for() -> None:
    edited, refused = PAGE.read_text().split("\n## Refused\n")
    lists = edited.partition("In both forms:")[2].partition("## What counts")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", lists)) == set(SPECIAL) | set(SEEING)
    named = set(re.findall(r"`([a-z0-9_]+)`", refused))
    told = {name.removesuffix("_text") for name in checkpoint_writers._REFUSED} | {"rwkv6", "rwkv6qwen2", "arwkv7"}
    assert told <= named
    for name in ("gemma3n", "rwkv6", "rwkv6qwen2", "arwkv7"):
        assert name in writers._REFUSED
