"""Models that also see: their language model is measured and edited whole, their tower is left alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterated.pipeline.contributions import find_contributions
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.source import open_source
from abliterated.pipeline.taps import layer_list
from abliterated.pipeline.watch import Watch
from pipeline import architectures
from pipeline.test_checkpoint import DIRECTION, edit
from pipeline.test_streamed import ROWS, alone, both, streams

BESIDE = ("vision", "visual", "projector", "merger", "embed_vision")


def moved(folder: Path) -> float:
    """How far the stream moves along the direction behind the first layer."""
    whole, _ = both(open_source(folder))
    along = streams(whole)[0] @ torch.from_numpy(DIRECTION.for_layer(0)[0].copy())
    return float((along - along[:, :1]).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", architectures.SEEING)
def test_what_sees_is_measured_and_edited_as_what_reads(family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architectures.seeing(family).save_pretrained(tmp_path / "base")
    source = open_source(tmp_path / "base")
    assert (source.layers, source.hidden_size) == (architectures.LAYERS, architectures.WIDTH)
    whole, streamed = both(source)
    assert not any(part in layer_list(whole.model)[0] for part in BESIDE)
    expected = torch.stack([alone(whole, row) for row in ROWS])
    for one in (whole, streamed):
        torch.testing.assert_close(streams(one)[1], expected, atol=2e-4, rtol=2e-4)
    assert greedy(streamed, ROWS, 4, Watch(), "") == greedy(whole, ROWS, 4, Watch(), "")
    assert len(find_contributions(whole, ROWS[0]).layers) == architectures.LAYERS
    report = edit(tmp_path / "base", tmp_path / "edited")
    assert report.coverage == 1.0
    assert moved(tmp_path / "edited") <= 1e-5 * moved(tmp_path / "base")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "edited"))
    tower = [name for name in before if any(part in name for part in BESIDE)]
    assert tower
    assert all(torch.equal(before[name], after[name]) for name in tower)
