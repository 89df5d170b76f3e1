"""The official clients through the proxy, with everything on, in front of the embedded engine and of real Ollamas."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from abliterated.proxy.assist import Asked, Outlet
from abliterated.proxy.server import Steering
from contract.scripted_model import ANSWER, PLAIN_CHAT_TEMPLATE, PLAIN_GO_TEMPLATE, write_scripted_model
from engines import Engine, RunningEngine, engine_parameters, require
from proxy.script import Running, proxy

MODEL, ALIAS, ABLITERATED = "lamp:1b", "lamp:1b-abliterated", "lamp-abliterated:1b"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=engine_parameters())
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    engine: Engine = require(request.param)
    folder = tmp_path_factory.mktemp(engine.id)
    with engine.start(folder / "models", log=folder / "engine.log") as started:
        yield started


async def no_help(asked: Asked, outlet: Outlet) -> bool:
    return False


@pytest.fixture(scope="module")
def front(engine: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("access") / "log"
    steering = Steering(aliases=((ALIAS, ABLITERATED),), observe=True, access_log=str(log))
    with proxy(engine.base_url, steering=steering) as running:
        running.proxy.assistant = no_help
        running.loop.call_soon_threadsafe(lambda: running.proxy.change(assist=True))
        yield running


@pytest.fixture(scope="module")
def url(front: Running) -> str:
    return f"http://{front.address}"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[ollama.Client]:
    client = ollama.Client(host=url, trust_env=False, timeout=60)
    yield client
    client._client.close()


@pytest.fixture(scope="module")
def model(client: ollama.Client, url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Uploaded and created through the proxy, under an ordinary name and an abliterated one."""
    path: Path = write_scripted_model(tmp_path_factory.mktemp("gguf") / "lamp.gguf", chat_template=PLAIN_CHAT_TEMPLATE)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        assert http.post(f"/api/blobs/{digest}", content=path.read_bytes()).status_code in (200, 201)
        assert http.head(f"/api/blobs/{digest}").status_code == 200
    for name in (MODEL, ABLITERATED):
        assert [*client.create(name, files={"model.gguf": digest}, template=PLAIN_GO_TEMPLATE, stream=True)][
            -1
        ].status == "success"
    return MODEL


@pytest.mark.parametrize("name", [MODEL, ABLITERATED, ALIAS])
def test_ollamas_own_client_chats_whole_and_in_pieces(client: ollama.Client, model: str, name: str) -> None:
    assert client.chat(name, HELLO).message.content == ANSWER
    assert "".join(part.message.content or "" for part in client.chat(name, HELLO, stream=True)) == ANSWER
    assert client.generate(name, "count").response == ANSWER
    assert "".join(part.response for part in client.generate(name, "count", stream=True)) == ANSWER


def test_ollamas_own_client_manages_models(client: ollama.Client, model: str) -> None:
    assert {found.model for found in client.list().models} >= {MODEL, ABLITERATED}
    assert client.show(ABLITERATED).modelinfo == client.show(ALIAS).modelinfo
    client.copy(MODEL, "lamp:copy")
    client.delete("lamp:copy")
    assert "lamp:copy" not in {found.model for found in client.list().models}
    client.chat(MODEL, HELLO, options={"num_predict": 1})
    assert MODEL in {found.model for found in client.ps().models}


def test_a_missing_abliterated_model_says_how_to_make_it_and_an_ordinary_one_does_not(
    client: ollama.Client, model: str
) -> None:
    with pytest.raises(ollama.ResponseError, match=r"not found.*abliterate submit qwen3:8b") as missed:
        client.chat("qwen3-abliterated:8b", HELLO)
    assert missed.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as ordinary:
        client.chat("qwen3:8b", HELLO)
    assert "abliterate" not in ordinary.value.error


async def test_the_asynchronous_client_leaves_in_mid_stream_and_the_connection_pool_lives(url: str, model: str) -> None:
    client = ollama.AsyncClient(host=url, trust_env=False, timeout=60)
    try:
        async for _ in await client.chat(model, HELLO, stream=True):
            break
        assert (await client.chat(model, HELLO, options={"num_predict": 2})).message.content
    finally:
        await client._client.aclose()


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as transport,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", http_client=transport, max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("name", [MODEL, ALIAS])
def test_openais_client_chats_and_lists(openai_client: openai.OpenAI, model: str, name: str) -> None:
    messages: Any = HELLO
    whole = openai_client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=5)
    with openai_client.chat.completions.create(
        model=name, messages=messages, temperature=0, max_tokens=5, stream=True
    ) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert MODEL in {found.id for found in openai_client.models.list()}
    with pytest.raises(openai.NotFoundError, match="abliterate submit qwen3:8b"):
        openai_client.chat.completions.create(model="qwen3-abliterated:8b", messages=messages)


def test_openais_responses_and_anthropics_messages_where_the_engine_has_them(
    engine: RunningEngine, url: str, openai_client: openai.OpenAI, model: str
) -> None:
    with contextlib.ExitStack() as stack:
        transport = stack.enter_context(httpx2.Client(trust_env=False, timeout=60))
        messages = stack.enter_context(
            anthropic.Anthropic(base_url=url, api_key="-", http_client=transport, max_retries=0)
        )
        if (engine.engine.version or (99, 0, 0)) < (0, 14, 0):
            with pytest.raises(anthropic.NotFoundError):
                messages.messages.create(model=model, max_tokens=5, messages=[{"role": "user", "content": "hello"}])
            return
        for name in (model, ALIAS):
            said = messages.messages.create(model=name, max_tokens=5, messages=[{"role": "user", "content": "hello"}])
            assert said.content
            with messages.messages.stream(
                model=name, max_tokens=5, messages=[{"role": "user", "content": "hello"}]
            ) as stream:
                assert "".join(stream.text_stream)
            assert openai_client.responses.create(model=name, input="hello", max_output_tokens=5).output_text
        with pytest.raises(anthropic.NotFoundError, match="abliterate submit qwen3:8b"):
            messages.messages.create(
                model="qwen3-abliterated:8b", max_tokens=5, messages=[{"role": "user", "content": "hello"}]
            )


def test_at_the_end_the_figures_know_who_was_asked(front: Running, model: str) -> None:
    text = front.proxy.tally.text()
    for route in ("/api/chat", "/v1/chat/completions"):
        assert f'abliterated_proxy_requests_total{{route="{route}",model="{MODEL}",status="200"}}' in text
    assert f'abliterated_proxy_tokens_total{{route="/api/chat",model="{MODEL}"}}' in text
    assert ANSWER not in text
