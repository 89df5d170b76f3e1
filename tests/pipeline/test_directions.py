"""The arithmetic of directions, against straightforward definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError
from abliterated.pipeline.directions import (
    RefusalDirection,
    between_layers,
    difference_of_means,
    direction,
    further_directions,
    orthonormal,
    protect,
    winsorise,
    without_gaps,
)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None, max_examples=50)
def test_a_difference_of_means_is_a_unit_vector_that_leaves_the_harmless_mean_alone(
    width: int, seed: int, orthogonalize: bool
) -> None:
    source = np.random.default_rng(seed)
    harmful, harmless = source.normal(size=(2, 3, width))
    found = difference_of_means(harmful, harmless, orthogonalize=orthogonalize)
    expected = np.stack([unit(row) for row in harmful - harmless])
    if orthogonalize:
        for layer in range(3):
            base = unit(harmless[layer])
            expected[layer] = unit(expected[layer] - (expected[layer] @ base) * base)
            assert abs(found[layer] @ base) < 1e-9
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_where_the_classes_agree_there_is_no_direction_but_zeros() -> None:
    mean = np.random.default_rng(0).normal(size=(2, 8)) * 1e3
    other = mean.copy()
    other[1, 3] += 1.0
    found = difference_of_means(mean, other, orthogonalize=False)
    assert not found[0].any()
    assert found[1, 3] == pytest.approx(-1.0)
    with pytest.raises(ModelError, match="no direction between them"):
        direction(found[0], origin={})


def test_atoms_are_taken_out_as_ridge_regression_says() -> None:
    source = np.random.default_rng(1)
    vector, atoms = unit(source.normal(size=16)), source.normal(size=(3, 16))
    alpha = 0.1 * (atoms**2).sum(-1).mean()
    a = atoms.T
    expected = unit(vector - a @ np.linalg.inv(a.T @ a + alpha * np.eye(3)) @ a.T @ vector)
    np.testing.assert_allclose(protect(vector, atoms), expected, atol=1e-12)
    without = protect(vector, atoms, ridge=1e-12)
    assert np.abs(atoms @ without).max() < 1e-9


def test_a_fractional_index_lies_between_two_layers() -> None:
    layers = np.eye(4)
    np.testing.assert_allclose(between_layers(layers, 1.0), layers[1])
    np.testing.assert_allclose(between_layers(layers, 1.5), unit(layers[1] + layers[2]))
    np.testing.assert_allclose(between_layers(layers, 99.0), layers[3])


def test_a_layer_without_a_direction_takes_its_neighbours() -> None:
    layers = np.zeros((4, 3))
    layers[2] = [0, 1, 0]
    assert (without_gaps(layers) == [0, 1, 0]).all()
    with pytest.raises(ModelError):
        without_gaps(np.zeros((4, 3)))


def test_a_second_direction_is_found_where_the_harmful_prompts_are_of_two_kinds() -> None:
    source = np.random.default_rng(2)
    one, two = np.eye(32)[3], np.eye(32)[9]
    harmless = source.normal(size=(60, 32)) * 0.1
    harmful = source.normal(size=(60, 32)) * 0.1
    harmful[:30] += 3 * one
    harmful[30:] += 3 * two
    first = unit(harmful.mean(0) - harmless.mean(0))
    found = further_directions(first, harmful, harmless, 2)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-9)
    for wanted in (one, two):
        assert np.linalg.norm(found @ wanted) > 0.99
    with pytest.raises(ModelError, match="fewer than"):
        further_directions(first, harmful[:3], harmless, 8)


def test_winsorising_clips_giants_and_leaves_the_rest() -> None:
    rows = np.ones((1, 100))
    rows[0, 0] = 1e6
    assert winsorise(rows, 0.98).max() == pytest.approx(1.0)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_rows_are_made_orthonormal_and_the_first_keeps_its_side(rank: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(rank, 12))
    found = orthonormal(rows)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-12)
    assert found[0] @ rows[0] > 0


def test_a_direction_is_one_for_all_layers_or_one_for_each() -> None:
    single = direction(np.eye(8)[2], origin={"method": "layer"})
    assert single.vectors.shape == (1, 1, 8)
    assert (single.for_layer(0) == single.for_layer(31)).all()
    layered = direction(np.eye(8)[:3], origin={}, per_layer=True)
    assert layered.for_layer(2)[0, 2] == 1
    assert single.digest() != layered.digest()
    assert single.digest() == direction(3 * np.eye(8)[2], origin={"other": 1}).digest()


@pytest.mark.parametrize("vectors", [np.zeros((1, 1, 4)), np.full((1, 1, 4), np.nan), np.ones((1, 2, 4))])
def test_no_direction_holds_nothing_or_nonsense(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        RefusalDirection(vectors.astype(np.float32))
    with pytest.raises(ModelError):
        direction(vectors[0].astype(np.float64), origin={})
