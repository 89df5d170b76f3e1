"""The table of states: what it promises, whatever rows it has."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from abliterate.contract.states import STATES, TERMINAL, TRANSITIONS, IllegalTransition, State, check_transition


def test_every_state_has_its_row_and_every_move_ends_in_a_state() -> None:
    assert set(TRANSITIONS) == set(STATES) == set(get_args(State))
    for after in TRANSITIONS.values():
        assert after <= set(STATES)


@pytest.mark.parametrize(("old", "new"), list(product(STATES, STATES)))
def test_a_move_is_in_the_table_or_raises(old: State, new: State) -> None:
    if new in TRANSITIONS[old]:
        check_transition(old, new)
    else:
        with pytest.raises(IllegalTransition, match=f"from {old} to {new}"):
            check_transition(old, new)


def test_from_every_state_a_job_can_end() -> None:
    can_end = set(TERMINAL)
    while more := {state for state in STATES if state not in can_end and TRANSITIONS[state] & can_end}:
        can_end |= more
    assert can_end == set(STATES)


def test_what_runs_can_be_interrupted_and_cancelled() -> None:
    for state in ("starting", "running", "registering"):
        assert {"queued", "cancelling"} <= TRANSITIONS[state]
    for state in ("queued", "held"):
        assert "cancelled" in TRANSITIONS[state]


def test_only_what_failed_or_was_cancelled_is_tried_again() -> None:
    assert {state for state in TERMINAL if TRANSITIONS[state]} == {"failed", "cancelled"}


def test_the_table_can_t_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS["queued"] = frozenset()  # type: ignore[index]
