"""When a model is loaded whole, and how much goes through a streamed one together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterated.pipeline.passes import Pass, common_prefix, plan
from abliterated.pipeline.room import (
    BESIDE,
    LEAST_STATE,
    MOST_STATE,
    Placement,
    free_memory,
    place,
    place_offloaded,
    state_limit,
)
from abliterated.pipeline.streamed import waves

GIGA = 1 << 30
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple), min_size=1, max_size=20)


def test_what_fits_with_room_to_spare_is_loaded_whole_and_on_the_emptiest_device() -> None:
    assert place(4_800_000_000, [16 * GIGA], 0).how == "whole"
    assert place(32_000_000_000, [16 * GIGA], 0).how == "streamed"
    assert place(16_000_000_000, [20 * GIGA], 0).how == "streamed"
    assert place(16_000_000_000, [24 * GIGA], 0).how == "whole"
    assert place(16_000_000_000, [10 * GIGA, 70 * GIGA, 24 * GIGA], 0) == Placement("whole", 1)


def test_what_one_device_cannot_hold_is_spread_over_several_or_streamed_through_the_emptiest() -> None:
    found = place(60_000_000_000, [40 * GIGA, 70 * GIGA], 0)
    assert (found.how, found.device) == ("spread", 0)
    assert sum(found.shares) >= 60_000_000_000
    assert place(100_000_000_000, [40 * GIGA, 70 * GIGA], 0) == Placement("streamed", 1)
    # A GGUF is dequantised in the main memory first.
    assert place(60_000_000_000, [40 * GIGA, 70 * GIGA], 32 * GIGA, from_host=True) == Placement("streamed", 1)
    assert place(60_000_000_000, [40 * GIGA, 70 * GIGA], 64 * GIGA, from_host=True).how == "spread"


@given(
    st.integers(1, 1 << 42), st.lists(st.integers(1 << 30, 1 << 37), min_size=1, max_size=8), st.integers(0, 1 << 40)
)
def test_no_device_is_given_more_than_it_has(weights: int, free: list[int], host: int) -> None:
    found = place(weights, free, host)
    if found.how == "whole":
        assert weights * BESIDE <= free[found.device] == max(free)
    if found.how == "spread":
        assert weights <= sum(found.shares) + len(free)
        assert all(share * BESIDE <= one for share, one in zip(found.shares, free, strict=True))
    if found.how == "streamed":
        assert free[found.device] == max(free) < weights * BESIDE
    left = place_offloaded(free, host)
    assert all(share * BESIDE <= one for share, one in zip(left.shares, free, strict=True))
    assert left.host * BESIDE <= host


def test_streams_take_a_share_of_the_memory_and_never_all() -> None:
    assert state_limit(1 << 20) == LEAST_STATE
    assert state_limit(10 * GIGA) == 2 * GIGA
    assert state_limit(1000 * GIGA) == MOST_STATE
    assert free_memory(torch.device("cpu")) > 0


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_waves_hold_everything_once_in_order_and_within_the_limit(sizes: list[int], limit: int) -> None:
    found = waves(sizes, limit)
    assert [number for wave in found for number in wave] == list(range(len(sizes)))
    assert all(len(wave) == 1 or sum(sizes[number] for number in wave) <= limit for wave in found)


@given(ROWS)
def test_the_common_prefix_is_what_all_begin_with(rows: list[tuple[int, ...]]) -> None:
    shared = common_prefix(rows)
    assert len({row[:shared] for row in rows}) == 1
    assert any(len(row) == shared for row in rows) or len({row[: shared + 1] for row in rows}) > 1


@given(ROWS, st.integers(1, 5), st.integers(1, 4))
def test_a_plan_runs_every_row_once_and_shares_nothing_that_is_read(
    rows: list[tuple[int, ...]], tail: int, kinds: int
) -> None:
    variants = tuple(row % kinds for row in range(len(rows)))
    planned = plan(Pass(rows, tail=tail, variants=variants), torch.device("cpu"), shareable=True)
    assert sorted(row for batch in planned.batches for row in batch) == list(range(len(rows)))
    assert planned.shared == 0 or planned.shared + tail <= min(map(len, rows))
    if planned.shared:
        assert sorted(kind for batch in planned.beginnings for kind in batch) == sorted(set(variants))
    assert plan(Pass(rows, tail=tail), torch.device("cpu"), shareable=False).shared == 0
