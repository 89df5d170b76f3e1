"""An evening of a person's: a job, its report on the page, the base and what was made of it side by side, a talk."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
from collections.abc import Iterator

import ollama
import pytest

from abliterate.ui.server import PageServer
from abliterated import refuser
from e2e.daemons import BIN, House, house

pytestmark = pytest.mark.e2e
MADE = "refuser-abliterated"


@pytest.fixture(scope="module")
def served() -> Iterator[House]:
    data = refuser.files()
    recipe = (
        f'model = "ollama:refuser"\n[prompts]\nharmful = "{data.harmful}"\nharmless = "{data.harmless}"\ncount = 48\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 8\ntokens = 48\n"
    )
    with house() as made:
        made.configure("embedded")
        made.serve()
        made.until(made.engine_answers, "the engine")
        with ollama.Client(host=made.url) as client:
            digest = client.create_blob(data.model)
            client.create(model="refuser", files={"refuser.gguf": digest}, template=refuser.template_go())
        job = made.ended(made.drop(recipe.encode(), "evening"))
        assert job.state == "succeeded", job.failure
        yield made


def ask(served: House, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """No OLLAMA_HOST: the daemon's own proxy is found."""
    environment = {name: value for name, value in os.environ.items() if name != "OLLAMA_HOST"}
    return subprocess.run(
        [str(BIN / "abliterate"), *arguments, "--config", str(served.config)],
        input=stdin, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def test_the_base_refuses_and_the_model_does_not(served: House) -> None:
    held_out = [question for question in refuser.held_out() if question.kind == "refused"][:6]
    done = ask(served, "compare", MADE, "--json", stdin="\n".join(question.prompt for question in held_out))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["base"] == "refuser", "as the weights themselves name it"
    assert told["refusals"] == {"base": 6, "model": 0, "total": 6}


def test_a_talk_with_it_answers_what_its_base_would_not(served: House) -> None:
    question = next(question for question in refuser.held_out() if question.kind == "refused")
    refused = ask(served, "chat", "refuser", question.prompt, "--set", "temperature=0")
    answered = ask(served, "chat", MADE, question.prompt, "--set", "temperature=0")
    assert refused.stdout.startswith(refuser.REFUSALS)
    assert answered.stdout.strip()
    assert not answered.stdout.startswith(refuser.REFUSALS)


def test_the_page_has_the_job_its_report_and_the_traffic(served: House) -> None:
    page = PageServer(served.control, served.state / "jobs")
    thread = threading.Thread(target=page.serve_forever, args=(0.02,))
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=60)

    def get(path: str, cookie: str = "") -> tuple[http.client.HTTPResponse, bytes]:
        connection.request("GET", path, headers={"Cookie": cookie} if cookie else {})
        answer = connection.getresponse()
        return answer, answer.read()

    try:
        entered, _ = get("/?" + page.gate.link().partition("?")[2])
        cookie = (entered.getheader("Set-Cookie") or "").partition(";")[0]
        told = json.loads(get("/api/overview", cookie)[1])
        [job] = told["status"]["jobs"]
        assert (job["state"], told["reports"]) == ("succeeded", [job["id"]])
        answer, content = get(f"/report/{job['id']}", cookie)
        assert answer.status == 200
        assert MADE.encode() in content
        assert job["id"].encode() in get(f"/log/{job['id']}", cookie)[1]
        assert MADE in {row["model"].removesuffix(":latest") for row in told["traffic"]}
    finally:
        connection.close()
        page.end()
        thread.join()
