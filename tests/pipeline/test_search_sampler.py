"""What a search tries next, and what a point of its space means: seeded, inside its bounds, ever closer to the best."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from abliterated.pipeline.kernels import DIMENSIONS, STRONGEST, Kernel, Space, constant
from abliterated.pipeline.search_sampler import near, spread

coordinate = st.floats(0.0, 1.0, allow_nan=False)
point = st.tuples(*[coordinate] * DIMENSIONS)
SPACE = Space(positions=(-1, -4), depth=5)


def test_the_first_points_lie_all_over_and_depend_on_the_seed_alone() -> None:
    points = spread(64, seed=3)
    assert points == spread(64, seed=3)
    assert points != spread(64, seed=4)
    for axis in zip(*points, strict=True):
        quarters = np.histogram(axis, bins=4, range=(0, 1))[0]
        assert quarters.min() >= 8


@given(best=st.lists(point, min_size=1, max_size=8), left=coordinate, seed=st.integers(0, 9))
def test_the_next_points_stay_in_the_cube_and_come_again(best: list[tuple[float, ...]], left: float, seed: int) -> None:
    points = near(best, 11, seed, 1, left)
    assert points == near(best, 11, seed, 1, left)
    assert all(0.0 <= value <= 1.0 for one in points for value in one)


def test_late_points_lie_closer_to_the_best() -> None:
    best = [(0.5,) * DIMENSIONS]

    def away(left: float) -> float:
        points = [one for generation in range(8) for one in near(best, 11, 0, generation, left)]
        return float(np.median(np.abs(np.array(points) - 0.5)))

    assert away(0.0) < away(1.0) / 3


@given(point)
def test_every_point_means_something_within_bounds(one: tuple[float, ...]) -> None:
    found = SPACE.parameters(one)
    assert 0.0 <= found.index <= 4.0
    assert found.position in SPACE.positions
    strengths = found.strengths(np.ones((6, 2)), frozenset(range(6)))
    assert strengths.shape == (6, 2)
    assert strengths.min() >= 0.0
    assert strengths.max() <= STRONGEST + 1e-9


def test_a_kernel_stands_at_its_centre_and_falls_to_its_floor() -> None:
    found = Kernel(peak=1.2, center=0.5, width=0.25, floor=0.5).over(5)
    assert found.tolist() == [0.6, 0.6, 1.2, 0.6, 0.6]
    assert constant(0.7).over(3).tolist() == [0.7] * 3


def test_leaning_on_what_writers_are_worth_spares_the_worthless_and_layers_left_out_stay_so() -> None:
    one = SPACE.point(2.0, -1, constant(1.0), constant(1.0), lean=1.0)
    worth = np.array([[0.0, 0.5], [0.25, 1.0], [1.0, 4.0]])
    strengths = SPACE.parameters(one).strengths(worth, frozenset({0, 1, 2}))
    assert np.allclose(strengths, [[0.0, 0.5], [0.25, 1.0], [1.0, 1.1]], atol=1e-5)
    assert SPACE.parameters(one).strengths(worth, frozenset({2})).tolist()[:2] == [[0.0, 0.0], [0.0, 0.0]]


def test_a_point_and_its_meaning_are_each_others() -> None:
    kernel = Kernel(peak=0.9, center=0.25, width=0.5, floor=0.1)
    found = SPACE.parameters(SPACE.point(2.5, -4, kernel, constant(1.0), lean=0.25))
    assert (found.index, found.position, found.own, found.lean) == (2.5, -4, False, 0.25)
    assert np.allclose(found.attention.over(7), kernel.over(7))


def test_a_weaker_point_means_the_same_with_lower_kernels() -> None:
    one = SPACE.point(1.5, -1, Kernel(0.9, 0.3, 0.5, 0.2), Kernel(1.2, 0.6, 0.4, 0.8), lean=0.5)
    strong, weak = SPACE.parameters(one), SPACE.parameters(SPACE.weaker(one, 0.5, 0.75))
    assert (weak.index, weak.position, weak.lean) == (strong.index, strong.position, strong.lean)
    assert np.allclose(weak.attention.over(9), 0.5 * strong.attention.over(9), atol=1e-5)
    assert np.allclose(weak.mlp.over(9), 0.75 * strong.mlp.over(9), atol=1e-5)
