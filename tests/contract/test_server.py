"""What any client asks first: is somebody there, which version, and what when the question is wrong."""

from __future__ import annotations

import re

import httpx
import pytest

from engines import RunningEngine


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_root_says_that_ollama_is_running(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == ("Ollama is running" if method == "GET" else "")


def test_the_version_is_told_and_is_the_one_started(http: httpx.Client, running: RunningEngine) -> None:
    answer = http.get("/api/version")
    version = answer.json()["version"]
    assert answer.json() == {"version": version}
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", version)
    if running.engine.version is not None:
        assert version == ".".join(map(str, running.engine.version))
    assert http.head("/api/version").status_code == 200


def test_an_empty_home_lists_no_models(running: RunningEngine) -> None:
    """On a start of its own: the shared one holds models by now."""
    with running.engine.start() as fresh, httpx.Client(base_url=fresh.base_url, trust_env=False, timeout=60) as http:
        assert http.get("/api/tags").json() == {"models": []}
        assert http.head("/api/tags").status_code == 200
        assert http.get("/api/ps").json() == {"models": []}
        listed = http.get("/v1/models").json()
        assert listed["object"] == "list"
        assert not listed["data"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/chat"), ("POST", "/api/tags"), ("PUT", "/api/version")])
def test_a_wrong_method_is_405(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.text) == (405, "405 method not allowed")
    assert answer.headers["content-type"].startswith("text/plain")


def test_an_unknown_path_is_404_in_plain_text(http: httpx.Client) -> None:
    answer = http.get("/api/no-such-thing")
    assert (answer.status_code, answer.text) == (404, "404 page not found")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/api/show", "/api/chat", "/api/generate", "/api/create"])
@pytest.mark.parametrize("body", [b"", b'{"model"'])
def test_a_body_that_is_no_json_is_400_with_an_error(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_body_is_json_whatever_its_content_type_says(http: httpx.Client, lamp: str) -> None:
    answer = http.post(
        "/api/show", content=f'{{"model":"{lamp}"}}', headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 200
