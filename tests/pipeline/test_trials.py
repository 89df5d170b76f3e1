"""A trial by hooks is the plain edit of the weights: the same logits, whatever the architecture, rank and strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from abliterate.contract.recipe import Edit, Run
from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.checkpoint import edit_checkpoint
from abliterated.pipeline.directions import direction
from abliterated.pipeline.loading import Loaded, load_model
from abliterated.pipeline.measure import Behaviour
from abliterated.pipeline.refusal_openings import Openings
from abliterated.pipeline.source import open_source
from abliterated.pipeline.trials import Change, ChangedModel, Trials
from abliterated.pipeline.watch import Watch
from pipeline.architectures import LAYERS, WIDTH, tiny

FAMILIES = [
    "llama", "gemma2", "gemma3_text", "glm4", "olmo2", "qwen3_moe", "mixtral", "lfm2", "granitemoehybrid", "phi",
    "cohere", "gpt_oss", "qwen3_next",
]  # fmt: skip
ROWS = [(5, 17, 33, 60, 71, 8), (9, 44, 2, 31), (12, 3, 90, 55, 41, 7, 28)]


def opened(folder: Path) -> Loaded:
    source = open_source(folder)
    return Loaded(source, load_model(source, Run(device="cpu"), Watch()), None, torch.device("cpu"))


def trials(loaded: Loaded) -> Trials:
    behaviour = Behaviour(Openings((3,), (3,)), 1.0, 0.0)
    found = Trials(loaded, cast(Any, None), behaviour, Watch(), gains=True)
    found.look(ROWS[0])
    return found


def some_change(rank: int, *, per_layer: bool) -> Change:
    source = np.random.default_rng(rank + per_layer)
    layers = LAYERS if per_layer else 1
    rows = [np.linalg.qr(source.standard_normal((WIDTH, rank)))[0].T for _ in range(layers)]
    strengths = source.uniform(0.0, 1.4, (LAYERS, 2)).round(3)
    strengths[1] = 0.0
    return Change(np.stack(rows).astype(np.float32), strengths)


def test_of_what_gives_out_the_same_the_first_to_be_called_is_meant_every_time(tmp_path: Path) -> None:
    """Phi calls one dropout for attention and MLP both: a hook on it would take either for the other."""
    tiny("phi").save_pretrained(tmp_path)
    loaded = opened(tmp_path)
    for _ in range(8):
        tried = trials(loaded)
        meant = [[type(part.module).__name__ for part in layer] for layer in tried.contributions.layers]
        assert meant == [["PhiAttention", "PhiMLP"]] * LAYERS
        assert tried.paths == [[0, 1]] * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_equal_the_edited_weights(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    loaded = opened(tmp_path / "base")
    tried = trials(loaded)
    for rank, per_layer in ((1, False), (2, True)):
        change = some_change(rank, per_layer=per_layer)
        with ChangedModel(tried, [change] * len(ROWS)):
            hooked = tail_logits(loaded, ROWS, 2)
        # Rows that come alone run under their own change, too.
        with ChangedModel(tried, [change]):
            alone = tail_logits(loaded, ROWS[:1], 2)
        found = direction(change.vectors if per_layer else change.vectors[0], origin={}, per_layer=per_layer)
        by_layer = tuple((float(attention), float(mlp)) for attention, mlp in change.strengths)
        target = tmp_path / f"edited-{rank}"
        edit_checkpoint(
            tmp_path / "base",
            target,
            found.removed_by(by_layer),
            Edit(norm="none"),
            allow_partial=False,
            progress=lambda *_: None,
            cancelled=lambda: False,
        )
        edited = tail_logits(opened(target), ROWS, 2)
        plain = tail_logits(loaded, ROWS, 2)
        assert (edited - plain).abs().max() > 1e-2
        assert torch.allclose(hooked, edited, atol=2e-3 * float(edited.abs().max()))
        assert torch.allclose(alone, edited[:1], atol=2e-3 * float(edited.abs().max()))


def test_changes_of_different_rank_run_side_by_side(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    loaded = opened(tmp_path / "base")
    tried = trials(loaded)
    changes = [some_change(1, per_layer=False), some_change(3, per_layer=True), some_change(2, per_layer=False)]
    beginning = (7, 21, 80, 64, 13, 5)  # what all rows begin with runs once for each change
    rows = [beginning + row for row in ROWS]

    def changing(numbers: list[int]) -> ChangedModel:
        return ChangedModel(tried, [changes[number] for number in numbers])

    together: dict[tuple[int, int], torch.Tensor] = {}
    for pairs, logits in tried.tried(len(changes), rows, 1, changing, (0, 9, "trying")):
        together |= dict(zip(pairs, logits, strict=True))
    assert len(together) == len(changes) * len(rows)
    for (number, row), found in together.items():
        with ChangedModel(tried, [changes[number]]):
            assert torch.allclose(tail_logits(loaded, [rows[row]], 1)[0], found, atol=1e-4)


def test_a_trial_moves_no_weight(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    loaded = opened(tmp_path / "base")
    tried = trials(loaded)
    before = {name: (value.data_ptr(), value.clone()) for name, value in loaded.model.state_dict().items()}
    with ChangedModel(tried, [some_change(2, per_layer=True)]):
        tail_logits(loaded, ROWS[:1], 1)
        during = loaded.model.state_dict()
        assert all(value.data_ptr() == before[name][0] for name, value in during.items())
    after = loaded.model.state_dict()
    assert all(torch.equal(value, before[name][1]) for name, value in after.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
