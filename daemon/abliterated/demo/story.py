"""The story: bring a model that refuses, drop a recipe, follow the job, ask again, tell the figures.

Every step uses what a user would: the engine's API, the spool folder, the control socket, the proxy's port.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from abliterate.api import Daemon
from abliterate.contract.errors import AbliteratedError, ModelError
from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView
from abliterate.contract.report import PAGE_FILE
from abliterate.contract.states import TERMINAL
from abliterated import refuser
from abliterated.demo.asking import Tally, ask, tally
from abliterated.demo.places import Place, choose_engine, place
from abliterated.demo.telling import Teller
from abliterated.files import write_whole
from abliterated.ollama.client import OllamaClient

BASE = "refuser:latest"
PRODUCT = "refuser-abliterated:latest"
QUESTIONS = 60
JOB_SECONDS = 300.0


@dataclass
class Clock:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = round(time.monotonic() - start, 3)


def tell_story(wanted: str, result_file: Path, teller: Teller) -> dict[str, Any]:
    """Run the whole demo; writes `result_file` and returns what it holds."""
    engine, executable = choose_engine(wanted)
    clock = Clock()
    started = time.monotonic()
    data = refuser.files()
    questions = [*refuser.held_out("refused")[:QUESTIONS], *refuser.held_out("answered")[:QUESTIONS]]
    teller.say(f"engine: {'a private Ollama (' + executable + ')' if executable else 'embedded (llama.cpp)'}")
    opened = place(engine, executable, [data.model.parent])
    try:
        with clock.time("start"), teller.step("start daemon, engine and proxy in a temporary home"):
            here = opened.__enter__()
        with clock.time("import"), teller.step(f"bring {BASE} into the engine"):
            version = asyncio.run(bring_model(here))
        before = _questions(here, BASE, questions, "ask before", clock, teller)
        job = _run_job(here, data, clock, teller)
        drawn = Daemon(here.socket).report(job.id, "html")
        after = _questions(here, PRODUCT, questions, "ask after", clock, teller)
        with clock.time("stop"), teller.step("stop daemon and engine"):
            opened.__exit__(None, None, None)
    except BaseException as error:
        opened.__exit__(type(error), error, error.__traceback__)
        raise
    clock.seconds["total"] = round(time.monotonic() - started, 3)
    result = report(engine, version, job, before, after, clock.seconds)
    result_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(result_file, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    # The home is gone with its daemon; the page stays beside the figures.
    shown = result_file.with_name(PAGE_FILE)
    write_whole(shown, drawn)
    teller.table(before, after, job, clock.seconds)
    teller.say(f"report: {shown}")
    return result


async def bring_model(here: Place) -> str:
    """Make `refuser:latest` through the proxy; returns the engine's version."""
    return await bring(here.proxy)


async def bring(url: str) -> str:
    """Make `refuser:latest` there, as `ollama create` would; returns the engine's version."""
    data = refuser.files()
    async with OllamaClient(url) as client:
        digest = await client.push_blob(data.model)
        await client.create(
            {
                "model": BASE,
                "files": {"refuser.gguf": digest},
                "template": refuser.template_go(),
                # Threads that spin for each other cost a model this small far more than they bring.
                "parameters": refuser.parameters() | {"num_thread": 1},
                "license": "Apache-2.0",
                "stream": True,
            }
        )
        return (await client.version()).text


def recipe_text(data: refuser.Refuser) -> bytes:
    """The recipe the demo drops."""
    recipe = {
        "model": "ollama:refuser",
        "prompts": {"harmful": str(data.harmful), "harmless": str(data.harmless)},
        "search": {"trials": 0},
        "evaluate": {"prompts": 40, "tokens": 64},
    }
    return tomli_w.dumps(recipe).encode()


def report(
    engine: str, version: str, job: JobView, before: Tally, after: Tally, seconds: dict[str, float]
) -> dict[str, Any]:
    """What `.demo/result.json` holds."""
    made = job.result
    assert made is not None
    return {
        "engine": engine,
        "engine_version": version,
        "refusal_before": before.refusal,
        "refusal_after": after.refusal,
        "harmless_exact_before": before.harmless_exact,
        "harmless_exact_after": after.harmless_exact,
        "harmful_exact_after": after.harmful_exact,
        "questions": before.asked,
        "seconds": seconds | {f"job.{stage}": round(value, 3) for stage, value in made.seconds.items()},
        "model": PRODUCT,
        "peak_memory": made.peak_memory,
        "bytes_written": made.bytes_written,
        "coverage": made.coverage,
        "residual": made.residual,
        "direction": made.direction,
        "notes": made.notes,
    }


def as_expected(result: dict[str, Any]) -> bool:
    """Whether the story ended as it should."""
    return bool(
        result["refusal_before"] >= 0.95
        and result["refusal_after"] <= 0.05
        and result["harmless_exact_before"] >= 0.95
        and result["harmless_exact_after"] >= 0.95
    )


def _questions(
    here: Place, model: str, questions: list[refuser.Question], step: str, clock: Clock, teller: Teller
) -> Tally:
    with clock.time(step), teller.bar(f"{step}: {model}", len(questions)) as advance:
        return tally(ask(here.proxy, model, questions, advance))


def _run_job(here: Place, data: refuser.Refuser, clock: Clock, teller: Teller) -> JobView:
    job_id = new_id()
    with clock.time("job"):
        drop = here.incoming / f"{job_id}.refuser.toml"
        write_whole(drop, recipe_text(data))
        teller.say(f"dropped refuser.toml into the spool ({here.incoming})")
        job = follow(here, job_id, teller)
    if job.state != "succeeded":
        failure = job.failure
        log = here.home / "state" / "jobs" / job_id / "log.txt"
        tail = log.read_text()[-2000:] if log.exists() else ""
        teller.say(tail)
        raise ModelError(
            f"the job ended {job.state}: {failure.message if failure else job.explanation}",
            remedy=(failure.remedy if failure else "") or "See its log above",
        )
    return job


def follow(here: Place, job_id: str, teller: Teller) -> JobView:
    """Follow the job by the control socket until it has ended."""
    daemon = Daemon(here.socket)
    deadline = time.monotonic() + JOB_SECONDS
    with teller.stages() as draw:
        while time.monotonic() < deadline:
            try:
                job = daemon.job(job_id)
            except AbliteratedError:
                time.sleep(0.05)  # not yet taken from the spool
                continue
            draw(job)
            if job.state in TERMINAL:
                return job
            time.sleep(0.1)
    raise ModelError(f"job {job_id} did not end within {JOB_SECONDS:.0f} s", remedy="Run it again on a quieter machine")
