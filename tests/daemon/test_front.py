"""What the queue's state means for the proxy, and what a missing model leads to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from abliterate.contract.config import Config, ProxySettings, Upstream
from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import JobView, Submit, Submitted
from abliterate.contract.states import State
from abliterated.front import SUBMITS_AN_HOUR, Front
from abliterated.proxy.missing import Missed

MISSED = Missed("qwen3-abliterated:8b", "qwen3:8b", "abliterate submit qwen3:8b", loopback=True)


def view(
    state: State, job: str = "01", target: str = "qwen3-abliterated:8b", remaining: float | None = None
) -> JobView:
    return JobView(id=job, label="x", model="ollama:qwen3:8b", target=target, state=state, remaining=remaining)


class Queue:
    def __init__(self, *jobs: JobView) -> None:
        self.views = list(jobs)
        self.submitted: list[Submit] = []

    async def jobs(self) -> list[JobView]:
        return self.views

    async def submit(self, wanted: Submit, actor: str) -> Submitted:
        assert actor == "proxy"
        self.submitted.append(wanted)
        return Submitted(id="01new")


def front(**settings: object) -> Front:
    made = Front(Config(proxy=ProxySettings(listen="127.0.0.1:0", upstream="http://127.0.0.1:1", **settings)))  # type: ignore[arg-type]
    assert made.make([]) is not None
    return made


@pytest.mark.parametrize("policy", ["hold", "reject"])
def test_the_policy_is_in_force_exactly_while_a_job_is_at_work(policy: str) -> None:
    made = front(during_jobs=policy, hold_seconds=5)
    assert made.proxy is not None
    seen = []
    for state in ("queued", "starting", "running", "registering", "succeeded"):
        made.job_changed(view(state))  # type: ignore[arg-type]
        seen.append(made.proxy.view.busy)
    assert seen == ["share", policy, policy, "share", "share"]
    assert made.proxy.view.hold_seconds == 5


def test_two_jobs_at_work_are_one_busy_time_and_retry_after_follows_the_longer() -> None:
    made = front(during_jobs="reject")
    assert made.proxy is not None
    made.job_changed(view("running", "01", remaining=100))
    made.job_changed(view("running", "02", remaining=200_000))
    assert (made.proxy.view.busy, made.proxy.view.retry_after) == ("reject", 3600)
    made.job_changed(view("failed", "02"))
    assert (made.proxy.view.busy, made.proxy.view.retry_after) == ("reject", 100)
    made.job_changed(view("cancelled", "01"))
    assert made.proxy.view.busy == "share"


def test_share_never_holds_anything() -> None:
    made = front()
    assert made.proxy is not None
    made.job_changed(view("running"))
    assert made.proxy.view.busy == "share"


def test_further_upstreams_and_aliases_are_checked_at_the_start() -> None:
    for wrong in (
        Config(upstream=[Upstream(pattern="*", url="https://x")]),
        Config(proxy=ProxySettings(aliases={"a b": "c"})),
        Config(proxy=ProxySettings(patterns=[""])),
    ):
        with pytest.raises(RecipeError):
            Front(wrong).make([])
    assert Front(Config(proxy=ProxySettings(listen=""))).make([]) is None


async def test_a_missing_model_gets_its_command_or_the_job_that_makes_it() -> None:
    made = front()
    assert await made.remark(MISSED) == "make it with: abliterate submit qwen3:8b"
    made.queue = Queue(view("succeeded"), view("queued", "07", "other:1b"))
    assert await made.remark(MISSED) == "make it with: abliterate submit qwen3:8b"
    made.queue = Queue(view("running", "09", "Qwen3-Abliterated:8B"))
    assert "job 09 is making it (running)" in await made.remark(MISSED)


@pytest.fixture
async def ollama() -> AsyncIterator[str]:
    async def tags(request: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": "qwen3:8b", "model": "qwen3:8b", "digest": "0"}]})

    app = web.Application()
    app.router.add_get("/api/tags", tags)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_auto_submit_queues_what_can_be_made_for_clients_of_this_machine_and_not_too_often(ollama: str) -> None:
    made = Front(Config(proxy=ProxySettings(listen="127.0.0.1:0", upstream=ollama, auto_submit=True)))
    queue = made.queue = Queue()
    far = Missed(MISSED.model, MISSED.base, MISSED.command, loopback=False)
    other = Missed("gemma3-abliterated:4b", "gemma3:4b", "abliterate submit gemma3:4b", loopback=True)
    for nobody in (far, other):
        assert (await made.remark(nobody)).startswith("make it with: abliterate submit")
    assert not queue.submitted
    for number in range(SUBMITS_AN_HOUR + 2):
        said = await made.remark(MISSED)
        assert said.startswith("job 01new will make it" if number < SUBMITS_AN_HOUR else "make it with:")
    assert len(queue.submitted) == SUBMITS_AN_HOUR
    assert 'model = "ollama:qwen3:8b"' in queue.submitted[0].recipe
    assert 'name = "qwen3-abliterated:8b"' in queue.submitted[0].recipe


async def test_auto_submit_with_ollama_away_falls_back_to_the_command() -> None:
    made = front(auto_submit=True)
    made.queue = Queue()
    assert await made.remark(MISSED) == "make it with: abliterate submit qwen3:8b"
