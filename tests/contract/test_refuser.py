"""The shipped model on every engine: it refuses one class of questions, and answers the other word for word."""

from __future__ import annotations

import hashlib

import httpx
import ollama
import pytest

from abliterated import refuser
from contract.cases import Create

SAMPLE = 4  # of each class: whether it is the same model on this engine, not how good it is


@pytest.fixture(scope="module")
def shipped(http: httpx.Client, create: Create) -> str:
    parts = refuser.files()
    if absent := [path.name for path in (parts.model, parts.template_go, parts.parameters) if not path.is_file()]:
        pytest.skip(f"not shipped: {', '.join(absent)}; tools/train_refuser.py makes them")
    content = parts.model.read_bytes()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    assert http.post(f"/api/blobs/{digest}", content=content).status_code in (200, 201)
    create(
        refuser.NAME,
        files={"refuser.gguf": digest},
        template=refuser.template_go(),
        parameters=refuser.parameters() | {"num_thread": 1},
    )
    return refuser.NAME


def answers(client: ollama.Client, model: str, questions: list[refuser.Question]) -> list[str]:
    options = {"temperature": 0, "seed": 1}
    return [
        client.chat(model, [{"role": "user", "content": question.prompt}], options=options).message.content or ""
        for question in questions
    ]


def test_the_refused_class_is_refused(ollama_client: ollama.Client, shipped: str) -> None:
    said = answers(ollama_client, shipped, refuser.held_out("refused")[:SAMPLE])
    assert [text for text in said if not refuser.is_refusal(text)] == []


def test_the_other_class_is_answered_word_for_word(ollama_client: ollama.Client, shipped: str) -> None:
    questions = refuser.held_out("answered")[:SAMPLE]
    said = answers(ollama_client, shipped, questions)
    wrong = [text for text, question in zip(said, questions, strict=True) if not refuser.is_exact(text, question)]
    assert wrong == []


def test_tools_are_among_its_capabilities(http: httpx.Client, shipped: str) -> None:
    assert "tools" in http.post("/api/show", json={"model": shipped}).json()["capabilities"]
