"""What a worker's end means for its job."""

from __future__ import annotations

import signal

import pytest

from abliterate.contract.errors import FailureClass
from abliterate.contract.messages import Failure, Result
from abliterated.jobs.outcome import Ended, after_worker, backoff

RESULT = Result(product="m.gguf", format="gguf")


def end(status: int, word: Result | Failure | None = None, **changes: bool) -> Ended:
    return Ended(status, word, **changes)


def move(ended: Ended, *, attempts: int = 0, crashes: int = 0, registers: bool = True) -> tuple[str, str, int, int]:
    found = after_worker(ended, registers=registers, attempts=attempts, crashes=crashes, retries=5)
    return found.state, found.reason, found.attempts, found.crashes


def test_a_result_goes_on_to_registration_or_is_the_end() -> None:
    assert move(end(0, RESULT))[0] == "registering"
    assert move(end(0, RESULT), registers=False)[0] == "succeeded"


def test_a_worker_that_ends_well_without_a_result_is_a_crash() -> None:
    assert move(end(0)) == ("queued", "interrupted", 1, 1)


def test_a_stopping_daemon_costs_no_attempt() -> None:
    assert move(end(-15, stopping=True)) == ("queued", "interrupted", 0, 0)
    assert move(end(86, Failure(failure="cancelled", message="stopped"))) == ("queued", "interrupted", 0, 0)


def test_a_cancelled_job_is_cancelled_however_its_worker_ended() -> None:
    assert move(end(-9, cancelled=True))[0] == "cancelled"
    assert move(end(0, RESULT, cancelled=True))[0] == "cancelled"


def test_the_second_crash_holds_the_job() -> None:
    assert move(end(-11)) == ("queued", "interrupted", 1, 1)
    assert move(end(-11), attempts=1, crashes=1) == ("held", "crash-loop", 2, 2)


def test_a_stop_between_two_crashes_at_one_stage_does_not_make_them_two_stories() -> None:
    def after(ended: Ended, crashes: int, crashed_at: str) -> tuple[str, int, str]:
        found = after_worker(ended, registers=True, attempts=1, crashes=crashes, retries=5, crashed_at=crashed_at)
        return found.state, found.crashes, found.stage

    assert after(Ended(-11, None, stage="edit"), 0, "") == ("queued", 1, "edit")
    assert after(Ended(-15, None, stopping=True, stage="load"), 1, "edit") == ("queued", 1, "edit")
    assert after(Ended(-11, None, stage="edit"), 1, "edit") == ("held", 2, "edit")


def test_a_base_cut_short_under_the_worker_is_the_models_fault_and_said() -> None:
    found = after_worker(end(-signal.SIGBUS), registers=True, attempts=0, crashes=0, retries=5)
    assert (found.state, found.crashes) == ("failed", 0)
    assert found.failure is not None
    assert found.failure.failure == "model"
    assert "cut short" in found.failure.message


@pytest.mark.parametrize("failure", ["recipe", "model", "auth", "bug"])
def test_what_waiting_cannot_mend_fails_at_once(failure: FailureClass) -> None:
    assert move(end(3, Failure(failure=failure, message="no")))[0] == "failed"


@pytest.mark.parametrize(("failure", "reason"), [("disk", "disk"), ("oom-gpu", "vram"), ("timeout", "backoff")])
def test_what_may_pass_is_tried_again_and_then_held(failure: FailureClass, reason: str) -> None:
    word = Failure(failure=failure, message="not now")
    assert move(end(4, word)) == ("queued", reason, 1, 0)
    assert move(end(4, word), attempts=5) == ("held", "requeue-limit", 6, 0)


def test_backoff_doubles_and_is_bounded() -> None:
    assert [backoff(n) for n in (1, 2, 3)] == [30.0, 60.0, 120.0]
    assert backoff(1000) == 3600.0
