"""Prompt lists over a real socket: licences first, broken downloads that go on, files that are whole or not there."""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from abliterate import lists
from abliterate.commands import download_lists
from abliterate.contract.errors import DiskError, RecipeError
from abliterate.lists import LISTS, DownloadError, ListError, PromptList, fetch, read_prompts
from client.terminals import terminal

Run = Callable[..., subprocess.CompletedProcess[str]]
CSV = ("Index,Goal,Category\n" + "".join(f'{n},"Write, please,\nnumber {n}",x\n' for n in range(5000))).encode()


class Server(ThreadingHTTPServer):
    """`break_at`: end the next answer after so many bytes; `asked`: the Range of each request."""

    daemon_threads = True
    content = CSV
    tag = '"one"'
    break_at = 0
    status = 200
    asked: list[str]

    @property
    def wanted(self) -> PromptList:
        return replace(LISTS[0], url=f"http://127.0.0.1:{self.server_address[1]}/list.csv")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        given = self.headers.get("Range", "")
        server.asked.append(given)
        start = int(given.removeprefix("bytes=").rstrip("-")) if given else 0
        if given and self.headers["If-Range"] != server.tag:
            start = 0
        if start >= len(server.content) or server.status != 200:
            self.send_response(416 if server.status == 200 else server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = server.break_at or len(server.content)
        server.break_at = 0
        self.wfile.write(server.content[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_list_is_one_prompt_a_line_and_says_where_it_is_from(server: Server, tmp_path: Path) -> None:
    path, count = fetch(server.wanted, tmp_path)
    assert count == 5000
    head, source, first, *_ = path.read_text().splitlines()
    assert head.startswith("# JailbreakBench")
    assert source.startswith("# licence: MIT; from https://")
    assert first == "Write, please, number 0"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_at = 70_000
    with pytest.raises(DownloadError, match="broke off"):
        fetch(server.wanted, tmp_path)
    assert not list(tmp_path.glob("*.txt"))
    assert fetch(server.wanted, tmp_path)[1] == 5000
    assert server.asked == ["", "bytes=70000-"]


def test_another_file_by_then_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.break_at = 70_000
    with pytest.raises(DownloadError):
        fetch(server.wanted, tmp_path)
    server.content, server.tag = CSV[:40_000] + b'"', '"two"'
    assert fetch(server.wanted, tmp_path)[1] > 0
    server.content = b"no list"
    with pytest.raises(ListError, match="not the list it was"):
        fetch(server.wanted, tmp_path)
    server.content = CSV
    assert fetch(server.wanted, tmp_path)[1] == 5000, "a rest that is longer than the file is no trap"


def test_no_server_no_room_and_no_answer_are_typed(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DownloadError, match="answered 404"):
        fetch(server.wanted, tmp_path)
    with pytest.raises(DownloadError, match="refused"):
        fetch(replace(server.wanted, url="http://127.0.0.1:1/x"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        fetch(server.wanted, tmp_path / "file")


def test_far_too_long_is_no_list(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MOST_BYTES", 1000)
    with pytest.raises(DownloadError, match="far longer"):
        fetch(server.wanted, tmp_path)


def test_json_lists_and_rows_that_do_not_count() -> None:
    alpaca = next(one for one in LISTS if one.name == "alpaca")
    rows = [
        {"instruction": "a b", "input": ""},
        {"instruction": "c", "input": "x"},
        {"instruction": "a  b", "input": ""},
    ]
    assert read_prompts(json.dumps(rows).encode(), alpaca) == ["a b"]


def arguments(folder: Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"lists": [], "output_dir": str(folder), "list": False, "yes": True, "json": False} | more
    )


def test_the_verb_fetches_all_and_tells_of_each(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lists, "LISTS", (server.wanted,))
    assert download_lists.run(arguments(tmp_path)) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path}/jbb-harmful.txt  5000 harmful prompts\n"
    assert "MIT" in told.err
    assert download_lists.run(arguments(tmp_path, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["lists"][0]["prompts"] == 5000


def test_nothing_is_fetched_before_a_yes(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    done = run("download-lists")
    assert done.returncode == 2
    assert "CC-BY-NC-4.0" in done.stderr
    assert "--yes" in done.stderr
    with terminal("download-lists", "jbb-harmful", environment=environment) as person:
        assert "MIT" in person.until("Fetch them? [y/N] ")
        person.type("n\n")
        assert person.ended() == 1
    assert not list(tmp_path.glob("*.txt"))


def test_what_there_is_and_what_there_is_not(run: Run) -> None:
    told = json.loads(run("download-lists", "--list", "--json").stdout)["lists"]
    assert {one["kind"] for one in told} == {"harmful", "harmless"}
    assert all(one["licence"] and one["url"].startswith("https://") for one in told)
    done = run("download-lists", "advbnch", "--yes")
    assert (done.returncode, "Did you mean advbench?" in done.stderr) == (2, True)
    with pytest.raises(RecipeError):
        download_lists._wanted(["x"])
