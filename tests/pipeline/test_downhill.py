"""Strengths followed downhill: the gradient is that of what the trials measure, on every kind of architecture; nothing
else moves; and where there is no way down, that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from abliterated.pipeline import downhill
from abliterated.pipeline.candidates import harm
from abliterated.pipeline.directions import Float64
from abliterated.pipeline.downhill import NoWayDown, between
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.trials import Change, Trials
from pipeline.architectures import LAYERS, WIDTH, tiny
from pipeline.test_trials import opened, trials

HARMFUL = [(5, 17, 33, 60, 71, 8), (9, 44, 2, 31), (12, 3, 90, 55, 41, 7, 28), (7, 7, 19, 4)]
HARMLESS = [(6, 11, 35, 62), (14, 48, 21, 30, 2), (13, 5, 91), (8, 1, 20, 44, 3)]
EVERYWHERE = frozenset(range(LAYERS))
WEIGHT, PRESSURE = 40.0, 0.7


def asked(loaded: Loaded) -> Trials:
    """Trials on prompts that are what they are: no model made at random refuses."""
    found = trials(replace(loaded, tokenizer=SimpleNamespace(get_vocab=dict, eos_token_id=None)))
    found.harmful = [*HARMFUL[:2], HARMFUL[2] + (3,), HARMFUL[3]]
    found.beginnings = (0, 0, 1, 0)
    found.sensible = (3, 4, 5, 6, 7)
    found.harmless = HARMLESS
    found.answered = found._answers(HARMLESS, 6)
    return found


def some_change(rank: int = 2) -> Change:
    source = np.random.default_rng(rank)
    rows = np.linalg.qr(source.standard_normal((WIDTH, rank)))[0].T
    return Change(rows.astype(np.float32)[None], source.uniform(0.2, 1.2, (LAYERS, 2)).round(3))


def cost(tried: Trials, change: Change) -> float:
    """What the way goes down, by the figures of a trial."""
    (scores,) = tried.scored([change], 9, 9, "")
    softplus = np.logaddexp(0.0, scores.refusal).mean()
    return float(WEIGHT * harm(float(scores.kl.mean()), float(scores.astray.mean())) + PRESSURE * softplus)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "olmo2", "qwen3_moe", "lfm2", "granitemoehybrid", "phi", "qwen3_next"]
)
def test_the_gradient_is_that_of_what_trials_measure(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downhill, "FOLDS", 1)
    tiny(family).save_pretrained(tmp_path)
    tried, change = asked(opened(tmp_path)), some_change()
    strengths = torch.tensor(change.strengths, dtype=torch.float32, requires_grad=True)
    downhill._Slope(tried, change, WEIGHT).follow(strengths, PRESSURE, 0)
    assert strengths.grad is not None
    toward = np.random.default_rng(3).standard_normal(change.strengths.shape)
    step = 0.001  # further on, a router of experts may choose others
    up, down = (cost(tried, replace(change, strengths=change.strengths + by * toward)) for by in (step, -step))
    expected = (up - down) / (2 * step)
    assert float((strengths.grad.numpy() * toward).sum()) == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_each_stage_costs_less_under_its_pressure_than_where_the_way_began(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    loaded = opened(tmp_path)
    tried, change = asked(loaded), some_change()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    hurt = harm(*(float(part) for part in figures(tried, change)[1:]))
    stages = downhill.downhill(tried, change, hurt, EVERYWHERE - {1}, 1.5)
    assert len(stages) == len(downhill.STAGES)
    for pressure, stage in zip(downhill.STAGES, stages, strict=True):
        assert (stage[1] == 0).all(), "a layer that is left out was changed"
        assert ((stage >= 0) & (stage <= 1.5)).all()
        assert weighed(tried, replace(change, strengths=stage), hurt, pressure) < weighed(tried, change, hurt, pressure)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    again = downhill.downhill(tried, change, hurt, EVERYWHERE - {1}, 1.5)
    assert all(np.array_equal(one, two) for one, two in zip(stages, again, strict=True))


def figures(tried: Trials, change: Change) -> tuple[float, float, float]:
    (scores,) = tried.scored([change], 9, 9, "")
    return float(np.logaddexp(0.0, scores.refusal).mean()), float(scores.kl.mean()), float(scores.astray.mean())


def weighed(tried: Trials, change: Change, hurt: float, pressure: float) -> float:
    softplus, kl, astray = figures(tried, change)
    return harm(kl, astray) / hurt + pressure * softplus


def test_there_is_no_way_down_where_weights_come_layer_by_layer(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tried = asked(opened(tmp_path))
    tried.loaded = replace(tried.loaded, engine=cast(Any, object()))
    with pytest.raises(NoWayDown, match="layer by layer"):
        downhill.downhill(tried, some_change(), 1.0, EVERYWHERE, 1.5)


def test_there_is_no_way_down_through_what_knows_no_gradient(tmp_path: Path) -> None:
    class Deaf(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, stream: torch.Tensor) -> torch.Tensor:
            return stream.clone()

    tiny("llama").save_pretrained(tmp_path)
    tried = asked(opened(tmp_path))
    last = tried.loaded.model.get_submodule("model.norm")
    hook = last.register_forward_hook(lambda *call: Deaf.apply(call[2]))
    with pytest.raises(NoWayDown, match="NotImplementedError on the way back"):
        downhill.downhill(tried, some_change(), 1.0, EVERYWHERE, 1.5)
    hook.remove()


STAGES = [np.full((2, 2), value) for value in (0.2, 0.6, 1.0)]


@pytest.mark.parametrize(
    ("reaching", "expected"),
    [
        ((False, False, True), (0.7, 0.8, 0.9)),
        ((False, True, True), (0.3, 0.4, 0.5)),
        ((True, True, True), (0.125, 0.15, 0.175)),
        ((False, False, False), (1.05, 1.1, 1.15)),
    ],
)
def test_what_lies_around_the_target_is_tried(reaching: tuple[bool, ...], expected: tuple[float, ...]) -> None:
    found: list[Float64] = between(STAGES, reaching.__getitem__, 3)
    assert [float(one[0, 0]) for one in found] == pytest.approx(expected)
