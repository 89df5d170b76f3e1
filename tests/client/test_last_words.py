"""Errors that hardly anybody meets: each is provoked, and each names the next step."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate.api import Daemon
from abliterate.chat.address import Address
from abliterate.chat.engine import Engine
from abliterate.commands import import_config
from abliterate.contract.errors import (
    AbliteratedError,
    DaemonUnavailable,
    EngineRefused,
    EngineUnavailable,
    RecipeError,
)
from abliterate.contract.recipe import parse_recipe
from abliterate.ui import server as page
from abliterate.wishes import read_wish
from client.fake_daemon import FakeDaemon
from client.test_verbs import Run


@contextlib.contextmanager
def saying(*answers: bytes) -> Iterator[Engine]:
    """An engine that says these bytes, one answer a connection, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Engine(Address(port=listener.getsockname()[1]))
        thread.join()


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), size, body)


def remedied(error: AbliteratedError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert error.remedy


def test_an_engine_that_talks_nonsense_refuses_or_breaks_off() -> None:
    with saying(http(b"<html>")) as engine, pytest.raises(EngineRefused) as nonsense:
        engine.models()
    remedied(nonsense.value, "isn't understood", "Ollama")
    with saying(http(b'{"error": "out of memory"}', "500 Broken")) as engine, pytest.raises(EngineRefused) as refused:
        engine.show("m")
    remedied(refused.value, "out of memory", "abliterate doctor m")
    piece = json.dumps({"message": {"content": "half"}}).encode() + b"\n"
    with saying(http(piece)) as engine, pytest.raises(EngineRefused) as ended, engine.chat({"model": "m"}) as answer:
        assert [part.content for part in answer] == []
    remedied(ended.value, "broke off")


def test_an_engine_nobody_knows_or_that_speaks_no_tls() -> None:
    engine = Engine(Address(host="nobody.invalid"))
    remedied(engine.unavailable(socket.gaierror(-2, "unknown")), "nobody.invalid", "OLLAMA_HOST")
    with saying(b"HTTP/1.1 400 Bad\r\n\r\n") as plain:
        secure = Engine(Address(port=plain.address.port, secure=True))
        with pytest.raises(EngineUnavailable) as refused:
            secure.models()
    remedied(refused.value, "no secure connection", "http://")
    assert isinstance(refused.value.__cause__, ssl.SSLError)


def test_a_socket_of_another_group(tmp_path: Path) -> None:
    error = Daemon(tmp_path / "control.sock").unavailable(PermissionError(13, "denied"))
    remedied(error, "you may not talk", "group")


def test_a_lone_socket_that_is_down_can_take_nothing(run: Run, tmp_path: Path) -> None:
    done = run("submit", "qwen3", "--socket", str(tmp_path / "none.sock"))
    assert done.returncode == DaemonUnavailable.exit_code
    assert "--config" in done.stderr


def test_files_that_are_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "long.yaml").write_bytes(b"#" * (import_config._LONGEST + 1))
    for arguments in (
        ("compare", "qwen3-abliterated", "--file", "latin.txt"),
        ("import-config", "latin.txt"),
        ("import-config", "long.yaml"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "  → Name " in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deep"),
        ("a: [1, 2", "not readable as YAML"),
        ("a: '*", "not readable as YAML"),
        ("a: !!float x", "not readable as YAML"),
        ("a: &x 1\nb: *x", "aliases are not read"),
        ("- 1", "no configuration"),
    ],
)
def test_a_configuration_that_is_none(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_config._table(text, "forge.yaml")
    remedied(caught.value, words)


def test_yaml_where_none_can_be_read() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from abliterate.commands.import_config import _table\n"
        "from abliterate.contract.errors import RecipeError\n"
        "try: _table('a: 1', 'forge.yaml')\n"
        "except RecipeError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyYAML is not installed" in told.stdout
    assert "pip install 'abliterated[pipeline]'" in told.stdout


def test_a_matrix_that_can_not_be() -> None:
    for text, words in (
        ('[matrix]\n"edit.strength" = []', "an empty list"),
        ('[matrix]\n"edit.strength" = [0.1, 0.2, 0.3]\n"prompts.seed" = ' + str(list(range(9999))), "jobs"),
        ('name = "one"\n[matrix]\nmodel = ["ollama:a", "ollama:b"]', "make one"),
        ('[matrix]\n"schedule.priority" = [1, 2]', "can't be varied"),
    ):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(f'model = "ollama:m"\n{text}'.encode())
        remedied(caught.value, words)


def test_a_setting_into_a_matrix_that_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "ollama:m"\nmatrix = "all"\n')
    with pytest.raises(RecipeError) as caught:
        read_wish(str(tmp_path / "r.toml"), settings=["matrix.model=[1]"])
    remedied(caught.value, "matrix is no table", "abliterate new")


def test_a_page_that_can_not_be_kept(run: Run, daemon: FakeDaemon, environment: dict[str, str], tmp_path: Path) -> None:
    from client.conftest import IDS, make_job

    daemon.put(make_job(0, state="succeeded"))
    daemon.reports[IDS[0]] = {"json": b"{}", "html": b"<html></html>"}
    (tmp_path / "file").write_text("")
    done = run("report", IDS[0], "--open", env=environment | {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert done.returncode == 4
    assert "--html" in done.stderr


def test_a_page_with_no_home_and_a_page_too_many(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(page, "MOST_STREAMS", 0)
    served = page.PageServer(Daemon(daemon.path), None)
    thread = threading.Thread(target=served.serve_forever, args=(0.02,))
    thread.start()
    try:
        from client.test_ui import ask, enter

        cookie = enter(served)
        status, _, body = ask(served, "/api/events", Cookie=cookie)
        assert (status, json.loads(body)["remedy"]) == (503, "Close some")
        status, _, body = ask(served, "/report/01j8zq3v5k7m9n1p3r5t7v9x00", Cookie=cookie)
        assert (status, json.loads(body)["remedy"]) == (404, "Give --config")
    finally:
        served.end()
        thread.join()
