"""What the client makes of answers it did not expect, and the in-tray it fills alone."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abliterate.api import Daemon, ProtocolError
from abliterate.contract.errors import (
    AbliteratedError,
    ConflictError,
    DaemonUnavailable,
    DiskError,
    NotFound,
    RecipeError,
)
from abliterate.contract.ids import ULID, new_id
from abliterate.contract.messages import Submit
from abliterate.contract.paths import Home
from abliterate.spool import drop
from client.conftest import IDS, make_job
from client.fake_daemon import FakeDaemon


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[bytes], Daemon]]:
    """A socket that reads one request and answers with the bytes given."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s.sock"))
    listener.listen()
    threads: list[threading.Thread] = []

    def answer(content: bytes) -> Daemon:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Daemon(tmp_path / "s.sock", timeout=60)

    yield answer
    for thread in threads:
        thread.join(60)
    listener.close()


def http(status: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, size, body)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", DaemonUnavailable),
        (b"nonsense\r\n\r\n", DaemonUnavailable),
        (http(200, b"{}", 500), DaemonUnavailable),
        (http(200, b"{}"), ProtocolError),
        (http(200, b"\xff"), ProtocolError),
        (http(200, b'{"id":3}'), ProtocolError),
        (http(500, b"oops"), ProtocolError),
        (http(404, b"<html>"), NotFound),
        (http(404, b'{"error":"no job","exit_code":7}'), NotFound),
        (http(409, b'{"error":"it runs"}'), ConflictError),
        (http(400, b'{"error":"bad recipe","remedy":"mend it","exit_code":2}'), RecipeError),
        (http(500, b'{"error":"a bug","exit_code":1}'), AbliteratedError),
        (http(500, b'{"error":"odd","exit_code":99}'), AbliteratedError),
    ],
)
def test_every_answer_is_a_message_or_a_typed_error(
    scripted: Callable[[bytes], Daemon], content: bytes, kind: type[AbliteratedError]
) -> None:
    with pytest.raises(AbliteratedError) as caught:
        scripted(content).job("abcd")
    assert type(caught.value) is kind
    assert caught.value.message


def test_an_event_stream_cut_in_a_message_is_a_daemon_gone(scripted: Callable[[bytes], Daemon]) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    daemon = scripted(head + b"40\r\ndata: {")
    with daemon.events() as stream, pytest.raises(DaemonUnavailable):
        list(stream.events())


def test_events_come_whole_whatever_the_chunks(scripted: Callable[[bytes], Daemon]) -> None:
    import msgspec

    text = b": hi\n\nid: 7\nevent: job\ndata: " + msgspec.json.encode(make_job(label="ä")) + b"\n\n:\n\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    daemon = scripted(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    with daemon.events("6") as stream:
        events = list(stream.events())
    assert [(event.id, event.job and event.job.label) for event in events] == [("", None), ("7", "ä"), ("7", None)]


def test_submitting_the_same_id_again_adds_nothing(daemon: FakeDaemon) -> None:
    api = Daemon(daemon.path)
    submit = Submit(recipe='model = "ollama:x"', id=new_id())
    assert not api.submit(submit).existing
    assert api.submit(submit).existing
    assert len(api.jobs()) == 1


def test_a_recipe_the_daemon_refuses_is_a_recipe_error(daemon: FakeDaemon) -> None:
    with pytest.raises(RecipeError, match="model: missing"):
        Daemon(daemon.path).submit(Submit(recipe="", id=new_id()))


def test_a_socket_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path, tmp_path / "none" / "x.sock"):
        with pytest.raises(DaemonUnavailable):
            Daemon(path).status()


def test_a_daemon_that_hangs_is_not_waited_for_forever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "h.sock"))
        listener.listen()
        with pytest.raises(DaemonUnavailable, match="in time"):
            Daemon(tmp_path / "h.sock", timeout=0.1).status()


def test_what_is_dropped_is_whole_readable_by_the_group_and_alone(tmp_path: Path) -> None:
    home = Home(state=tmp_path, spool=tmp_path / "spool")
    old = os.umask(0o077)
    try:
        path = drop(home, IDS[0], "../We/ird\x1bName", b"model = 1")
    finally:
        os.umask(old)
    assert path.parent == home.incoming
    assert path.name == f"{IDS[0]}.we-ird-name.toml"
    assert path.read_bytes() == b"model = 1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(home.incoming.iterdir()) == [path]
    assert ULID.fullmatch(path.name.split(".")[0])


def test_an_in_tray_that_can_t_be_written_is_said_and_left_clean(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file in its place")
    with pytest.raises(DaemonUnavailable, match="in-tray"):
        drop(Home(state=tmp_path, spool=tmp_path / "spool"), IDS[0], "x", b"")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    home = Home(state=tmp_path, spool=tmp_path / "spool")
    with pytest.raises(DiskError):
        drop(home, IDS[0], "x", b"y")
    assert list(home.incoming.iterdir()) == []
