"""A log has a beginning, an end, and a bound; tokens never reach it."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from abliterated.jobs.job_log import LINE_BYTES, JobLog


def test_what_is_too_much_is_left_out_in_the_middle(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "log.txt", head=1000, tail=500)
    for number in range(1000):
        log.feed(f"line {number}\n".encode())
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("line 0\nline 1\n")
    assert text.endswith("line 998\nline 999\n")
    assert "bytes left out" in text
    assert len(text) < 1600


def test_a_second_attempt_goes_on_and_its_end_is_kept_as_well(tmp_path: Path) -> None:
    for attempt in range(3):
        log = JobLog(tmp_path / "log.txt", head=100, tail=200)
        for number in range(50):
            log.feed(f"{attempt} {number}\n".encode())
        log.close()
    text = (tmp_path / "log.txt").read_text()
    assert all(f"{attempt} 49\n" in text for attempt in range(3))
    assert len(text) < 100 + 3 * 240


def test_a_token_in_pieces_is_made_unreadable(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 8
    log = JobLog(tmp_path / "log.txt")
    for letter in f"error: 401 for {token} at hub\nbye {token}":
        log.feed(letter.encode())
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert token not in text
    assert text == "error: 401 for hf_… at hub\nbye hf_…\n"


def test_a_line_without_end_is_not_kept_in_memory(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "log.txt", head=100_000, tail=1000)
    log.feed(b"x" * (LINE_BYTES * 3))
    assert len(log._rest) <= LINE_BYTES
    log.close()


@given(st.lists(st.binary(max_size=60), max_size=40))
def test_what_fits_is_kept_byte_for_byte(pieces: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        log = JobLog(Path(name) / "log.txt")
        for piece in pieces:
            log.feed(piece)
        log.close()
        whole = b"".join(pieces)
        kept = (Path(name) / "log.txt").read_bytes()
        assert kept == (whole if whole.endswith(b"\n") or not whole else whole + b"\n")
