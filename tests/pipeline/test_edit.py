"""The closed forms against a float64 reference that builds the projector, over many shapes and strengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import RecipeError
from abliterate.contract.recipe import Edit
from abliterated.pipeline.edit import (
    NOTHING_LEFT,
    edit_bias,
    edit_matrix,
    kernel,
    seen_through_norms,
    selected_layers,
    strengths,
)

shapes = st.tuples(st.integers(8, 300), st.integers(1, 80), st.integers(1, 3), st.integers(0, 2**32 - 1))
lambdas = st.sampled_from([1.0, 0.5, 1.5, -1.0, 0.01, 2.0])


def _case(shape):
    rows, columns, rank, seed = shape
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.standard_normal((rows, rank)))
    matrix = random.standard_normal((rows, columns)) * 10.0 ** random.uniform(-3, 1)
    return np.ascontiguousarray(basis.T.astype(np.float32)), matrix.astype(np.float32)


def reference(matrix, vectors, strength, norm):
    """float64, with the dense projector, as the definitions say it; and how much what is rescaled had shrunk."""
    wide, rows = matrix.astype(np.float64), vectors.astype(np.float64)
    projector = np.eye(len(wide)) - strength * rows.T @ rows
    if norm == "none":
        return projector @ wide, 1.0
    if norm == "columns":
        edited = projector @ wide
        before, after = np.linalg.norm(wide, axis=0), np.linalg.norm(edited, axis=0)
        scale = before / np.where(after > 0, after, 1)
        return edited * scale, max(1.0, scale.max())
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = projector @ (wide / np.where(lengths > 0, lengths, 1))
    after = np.linalg.norm(unit, axis=1, keepdims=True)
    scale = 1 / np.where(after > 0, after, 1)
    return unit * scale * lengths, max(1.0, scale.max())


@settings(max_examples=60, deadline=None)
@given(shapes, lambdas, st.sampled_from(["none", "columns", "rows"]))
def test_every_closed_form_equals_its_definition(shape, strength, norm):
    vectors, matrix = _case(shape)
    edited = edit_matrix(matrix, vectors, strength, norm)
    wanted, shrunk = reference(matrix, vectors, strength, norm)
    assume(shrunk < 0.9 * NOTHING_LEFT**-0.5)  # what shrank more is rounding noise, and stays as small as it is
    assert edited.dtype == np.float32
    assert np.linalg.norm(edited - wanted) <= 3e-5 * shrunk * np.linalg.norm(wanted)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["none", "columns"]))
def test_at_full_strength_nothing_of_the_direction_is_left(shape, norm):
    vectors, matrix = _case(shape)
    edited = edit_matrix(matrix, vectors, 1.0, norm)
    before = np.linalg.norm(vectors.astype(np.float64) @ matrix)
    after = np.linalg.norm(vectors.astype(np.float64) @ edited)
    # Relative to v'W; a matrix that had almost nothing of v is held to its own size's rounding instead.
    assert after <= max(1e-5 * before, 1e-6 * np.linalg.norm(matrix))


@settings(max_examples=40, deadline=None)
@given(shapes, lambdas)
def test_columns_keep_their_lengths(shape, strength):
    vectors, matrix = _case(shape)
    if matrix.shape[0] < 20:  # with few rows a column can lie almost wholly along the directions
        return
    edited = edit_matrix(matrix, vectors, strength, "columns")
    np.testing.assert_allclose(np.linalg.norm(edited, axis=0), np.linalg.norm(matrix, axis=0), rtol=2e-5)


def test_a_column_that_is_the_direction_itself_vanishes_instead_of_exploding():
    vector = np.zeros((1, 16), dtype=np.float32)
    vector[0, 3] = 1
    matrix = np.zeros((16, 3), dtype=np.float32)
    matrix[3, 0], matrix[5, 1] = 2, 1
    for norm in ("columns", "rows", "none"):
        edited = edit_matrix(matrix, vector, 1.0, norm)
        assert np.isfinite(edited).all()
        assert np.abs(edited[:, 0]).max() < 1e-6
        assert edited[5, 1] == 1


@settings(max_examples=30, deadline=None)
@given(shapes, lambdas)
def test_biases_lose_their_share_and_nothing_else(shape, strength):
    vectors, matrix = _case(shape)
    bias = np.ascontiguousarray(matrix[:, :2].T)
    edited = edit_bias(bias, vectors, strength)
    wanted = bias - strength * (bias.astype(np.float64) @ vectors.T) @ vectors
    assert np.abs(edited - wanted).max() <= 1e-6 * np.abs(bias).max()


def test_a_direction_seen_through_gains_is_what_a_norm_behind_the_writer_needs():
    random = np.random.default_rng(1)
    vectors = np.linalg.qr(random.standard_normal((64, 2)))[0].T.astype(np.float32)
    first, second = (random.uniform(0.2, 3, 64).astype(np.float32) for _ in range(2))
    matrix = random.standard_normal((64, 10)).astype(np.float32)
    seen = seen_through_norms(vectors, (first, second))
    out = edit_matrix(matrix, seen, 1.0, "columns")
    assert np.abs(vectors @ (first[:, None] * second[:, None] * out)).max() < 1e-5
    centred = seen_through_norms(vectors, (first,), centred=True)
    out = edit_matrix(matrix, centred, 1.0, "columns")
    assert np.abs(vectors @ (first[:, None] * (out - out.mean(0)))).max() < 1e-5


def test_layers_are_selected_as_people_write_them():
    assert selected_layers("all", 4) == {0, 1, 2, 3}
    assert selected_layers("1-2", 4) == {1, 2}
    assert selected_layers("2-", 4) == {2, 3}
    assert selected_layers("-1", 4) == {0, 1}
    assert selected_layers("2-30", 4) == {2, 3}
    assert selected_layers("3", 4) == {3}
    assert selected_layers([0, 3], 4) == {0, 3}
    for nothing in ("4-9", "3-1", [], [4]):
        with pytest.raises(RecipeError):
            selected_layers(nothing, 4)


def test_kernels_are_one_at_the_center_and_the_floor_far_from_it():
    for shape in ("linear", "gaussian", "trapezoid"):
        edit = Edit(kernel=shape, center=0.5, width=0.25, floor=0.1)
        assert kernel(edit, 0.5) == pytest.approx(1)
        assert kernel(edit, 0.0) == pytest.approx(0.1, abs=1e-3)
        assert 0.1 < kernel(edit, 0.7) < 1
    assert kernel(Edit(), 0.0) == 1


def test_strengths_multiply_factor_kernel_and_sign():
    edit = Edit(strength=2.0, attention=0.5, mlp=0.25, layers="1-", invert=True)
    assert strengths(edit, 3) == ((0, 0), (-1, -0.5), (-1, -0.5))
    assert strengths(Edit(kernel="linear", center=0.9), 1) == ((1, 1),)
