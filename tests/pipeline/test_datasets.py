"""Prompts out of data sets: the kinds that are read, what is fetched, what each refusal tells, and no network twice."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from abliterate.contract.errors import AbliteratedError, Cancelled, DiskError, ModelError, RecipeError
from abliterate.contract.messages import Task
from abliterate.contract.recipe import Prompts, recipe_from_table
from abliterated.pipeline import fetching
from abliterated.pipeline.datasets import data_files, fetch_dataset, parse_reference, read_column
from abliterated.pipeline.hub_access import Hub, HubUnavailable
from abliterated.pipeline.prompts import data_sets, read_prompts
from abliterated.pipeline.watch import Watch

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
ROWS = [{"text": f"question {number}?", "n": number} for number in range(12)]
CARD = b"---\nlicense: cc-by-4.0\n---\n# A set\n"


class SetHub:
    """One data set, `org/set`, at one commit; counts what it is asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked, self.withheld = files, list[str](), "nothing"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                if hub.withheld in self.path:
                    return self.answer(200, b"<html>", {})  # of whatever stands between
                path = self.path.partition("?")[0]
                head = "/datasets/org/set/resolve/"
                if path.startswith("/api/datasets/org/set") and not path.endswith("/revision/gone"):
                    listed = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                    body = json.dumps({"id": "org/set", "sha": COMMIT, "siblings": listed}).encode()
                    return self.answer(200, body, {"Content-Type": "application/json"})
                name = path.removeprefix(head).partition("/")[2]
                if path.startswith(head) and name in hub.files:
                    data = hub.files[name]
                    return self.answer(200, data, {"ETag": f'"{name}-{len(data)}"', "X-Repo-Commit": COMMIT})
                code = "RevisionNotFound" if "revision" in path else "RepoNotFound"
                return self.answer(404, b"{}", {"X-Error-Code": code})

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[object]:
    running: list[SetHub] = []

    def start(files: dict[str, bytes]) -> tuple[SetHub, Hub]:
        running.append(SetHub({"README.md": CARD, **files}))
        return running[-1], Hub(running[-1].endpoint, tmp_path / "cache")

    yield start
    for hub in running:
        hub.stop()


def lines(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def parquet(tmp_path: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    return (tmp_path / "x.parquet").read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "json-columns", "json-data", "csv", "txt"])
def test_every_kind_gives_the_same_texts(kind: str, serve: object, tmp_path: Path) -> None:
    texts = [str(row["text"]) for row in ROWS]
    data = {
        "parquet": lambda: parquet(tmp_path),
        "jsonl": lambda: lines(ROWS),
        "json": lambda: json.dumps(ROWS).encode(),
        "json-columns": lambda: json.dumps({"text": texts, "n": list(range(12))}).encode(),
        "json-data": lambda: json.dumps({"version": "1", "data": ROWS}).encode(),
        "csv": lambda: b"n,text\r\n" + b"".join(f'{n},"{text}"\r\n'.encode() for n, text in enumerate(texts)),
        "txt": lambda: ("\ufeff" + "\n".join(texts)).encode(),
    }[kind]()
    suffix = kind.partition("-")[0]
    _, hub = serve({f"data/train-00000.{suffix}": data})  # type: ignore[operator]
    found = read_column("hf:org/set#text", hub=hub)
    assert found.texts == tuple(texts)
    assert (found.name, found.revision, found.licence) == ("hf:org/set#text", COMMIT, "cc-by-4.0")


def test_the_best_kind_is_read_and_of_it_the_training_part(serve: object) -> None:
    named = ["data/train-0.jsonl", "data/test-0.jsonl", "a.csv", "dataset_infos.json", "README.md", "set.py"]
    assert data_files(named) == ["data/train-0.jsonl"]
    assert data_files(["only.txt", "set.py"]) == ["only.txt"]
    assert data_files(["set.py"]) == []
    hub, where = serve({"train.jsonl": lines(ROWS), "set.py": b"raise SystemExit", "train.csv": b"n,text\n"})  # type: ignore[operator]
    read_column("hf:org/set#text", hub=where)
    assert not [path for path in hub.asked if path.endswith((".py", ".csv"))]


def test_of_a_conversation_the_users_first_word_counts(serve: object) -> None:
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"u{n}"}]} for n in range(3)]
    rows.append({"messages": [{"from": "human", "value": "older form"}]})
    rows.append({"messages": []})
    _, hub = serve({"train.jsonl": lines(rows)})  # type: ignore[operator]
    assert read_column("hf:org/set#messages", hub=hub).texts == ("u0", "u1", "u2", "older form")


def test_what_was_fetched_is_read_without_a_network(serve: object, tmp_path: Path) -> None:
    hub, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    online = read_column("hf:org/set#text", hub=where)
    asked = len(hub.asked)
    offline = Hub(where.endpoint, where.cache, offline=True)
    assert read_column("hf:org/set#text", hub=offline) == online
    assert len(hub.asked) == asked
    hub.stop()
    # A hub that is away now is as good as none.
    assert read_column("hf:org/set#text", hub=where) == online
    with pytest.raises(ModelError, match="not here yet"):
        read_column("hf:org/set#text", hub=Hub(where.endpoint, tmp_path / "empty", offline=True))


@pytest.mark.parametrize(
    ("reference", "files", "said"),
    [
        ("hf:org/set#nothing", {"train.jsonl": lines(ROWS)}, "no column 'nothing'"),
        ("hf:org/set#n", {"train.jsonl": lines(ROWS)}, "column 'n' is empty"),
        ("hf:org/set#text", {"set.py": b""}, "holds no Parquet, JSON, CSV or text"),
        ("hf:org/set#text", {"train.jsonl": b'{"text": '}, "can't be read"),
        ("hf:org/set#text", {"train.parquet": b"PAR1 not"}, "can't be read"),
        ("hf:org/set@gone#text", {"train.jsonl": lines(ROWS)}, "no revision 'gone'"),
        ("hf:org/other#text", {"train.jsonl": lines(ROWS)}, "org/other"),
    ],
)
def test_what_can_not_be_had_is_said(reference: str, files: dict[str, bytes], said: str, serve: object) -> None:
    _, hub = serve(files)  # type: ignore[operator]
    with pytest.raises(AbliteratedError, match=said) as raised:
        read_column(reference, hub=hub)
    assert raised.value.remedy


def test_a_hub_that_lists_what_it_does_not_give_is_away(serve: object) -> None:
    hub, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    hub.withheld = "/resolve/"
    with pytest.raises(HubUnavailable, match="lists the files of org/set, but does not give them") as raised:
        read_column("hf:org/set#text", hub=where)
    assert "Try again later" in raised.value.remedy


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_under_the_cache_is_told(serve: object) -> None:
    _, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    names = where.cache / "datasets--org--set" / "refs"
    names.mkdir(parents=True)
    (names / "main").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="the disk is full: org/set does not fit into the cache") as raised:
        read_column("hf:org/set#text", hub=where)
    assert "set HF_HOME to another disk" in raised.value.remedy


def test_parquet_without_what_reads_it_is_told(serve: object, monkeypatch: pytest.MonkeyPatch) -> None:
    _, where = serve({"train.parquet": b"PAR1"})  # type: ignore[operator]
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(RecipeError, match="is Parquet, which needs pyarrow") as raised:
        read_column("hf:org/set#text", hub=where)
    assert "or give a text file" in raised.value.remedy


def test_a_cancelled_fetch_of_a_set_stops(serve: object) -> None:
    hub, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    with pytest.raises(Cancelled, match="asked to stop") as raised:
        read_column("hf:org/set#text", hub=where, cancelled=lambda: True)
    assert "Submit it again" in raised.value.remedy
    assert not [path for path in hub.asked if "resolve" in path]


@pytest.mark.parametrize("reference", ["hf:org/set", "hf:#text", "hf:a/b/c#text", "hf:org/set#", "org/set#text"])
def test_what_names_no_column_is_an_error_of_the_recipe(reference: str) -> None:
    with pytest.raises(RecipeError, match="names no column"):
        parse_reference(reference)


def test_a_set_that_is_too_large_is_not_fetched(serve: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterated.pipeline import datasets

    monkeypatch.setattr(datasets, "LARGEST", 10)
    hub, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    with pytest.raises(ModelError, match="larger than"):
        fetch_dataset("hf:org/set#text", hub=where)
    assert not [path for path in hub.asked if "resolve" in path]


def test_a_run_fetches_them_first_and_the_report_can_say_where_from(
    serve: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where = serve({"train.jsonl": lines(ROWS)})  # type: ignore[operator]
    offline = False
    monkeypatch.setattr(Hub, "from_environment", lambda: Hub(where.endpoint, where.cache, offline=offline))
    asked = {"harmful": "hf:org/set#text", "harmless": ["builtin"], "atoms": ["hf:org/set#text"]}
    recipe = recipe_from_table({"model": "./model.gguf", "prompts": asked})
    assert data_sets(recipe.prompts) == ["hf:org/set#text"]
    task = Task(recipe=recipe, base="x", source="x", work=str(tmp_path), output=str(tmp_path))
    seen: list[str] = []
    fetching.fetched(task, Watch(lambda progress: seen.append(progress.message)))
    assert "fetching org/set#text" in seen
    offline = True
    prompts = read_prompts(recipe.prompts)
    told = {(source.kind, source.name, source.licence, source.count) for source in prompts.sources}
    assert ("harmful", "hf:org/set#text", "cc-by-4.0", 12) in told
    assert ("harmless", "builtin", "Apache-2.0", 128) in told
    assert ("atoms", "hf:org/set#text", "cc-by-4.0", 12) in told
    assert len(prompts.atoms) == 12
    assert read_prompts(Prompts(harmful="hf:org/set#text")).harmful.training
