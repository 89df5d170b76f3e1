"""When a model is loaded whole, and how much goes through a streamed one together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterated.pipeline.passes import Pass, common_prefix, plan
from abliterated.pipeline.room import LEAST_STATE, MOST_STATE, free_memory, how_to_load, state_limit
from abliterated.pipeline.streamed import waves

GIGA = 1 << 30
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple), min_size=1, max_size=20)


def test_what_fits_with_room_to_spare_is_loaded_whole() -> None:
    assert how_to_load(1_200_000_000, 4, 16 * GIGA) == "whole"
    assert how_to_load(8_000_000_000, 4, 16 * GIGA) == "streamed"
    assert how_to_load(8_000_000_000, 2, 20 * GIGA) == "streamed"
    assert how_to_load(8_000_000_000, 2, 24 * GIGA) == "whole"


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
