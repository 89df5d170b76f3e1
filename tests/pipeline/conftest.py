"""What costs every test here time and is no test's business."""

from __future__ import annotations

import gc
import sys

import pytest

_frozen = False


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """A run collects garbage when it lets a model go; the million objects of torch and transformers are none."""
    global _frozen
    if not _frozen and "torch" in sys.modules:
        import transformers.models.auto.modeling_auto
        import transformers.models.auto.tokenization_auto  # noqa: F401

        gc.collect()
        gc.freeze()
        _frozen = True
