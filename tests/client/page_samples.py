"""A day in a queue, for the page to draw."""

from __future__ import annotations

import time
from pathlib import Path

from abliterate.contract.messages import Failure, Result
from client.conftest import make_job
from client.fake_daemon import FakeDaemon

IDS = [f"01j8zq3v5k7m9n1p3r5t7v9x{number:02d}" for number in range(8)]
METRICS = """\
# TYPE abliterated_proxy_requests_total counter
abliterated_proxy_requests_total{route="/api/chat",model="qwen3-abliterated:8b",status="200"} 1204
abliterated_proxy_requests_total{route="/v1/chat/completions",model="qwen3-abliterated:8b",status="500"} 3
abliterated_proxy_requests_total{route="/api/chat",model="gemma3:4b",status="200"} 88
abliterated_proxy_tokens_total{route="/api/chat",model="qwen3-abliterated:8b"} 341202
abliterated_proxy_assisted_total{route="/api/chat",model="qwen3-abliterated:8b"} 12
abliterated_proxy_first_byte_seconds_sum{route="/api/chat",model="qwen3-abliterated:8b"} 240.8
abliterated_proxy_first_byte_seconds_count{route="/api/chat",model="qwen3-abliterated:8b"} 1204
abliterated_proxy_in_flight 2
"""


def fill(daemon: FakeDaemon, home: Path) -> None:
    """Jobs in every state, the first ended one with a report."""
    now = time.time()
    daemon.metrics = METRICS
    jobs = [
        make_job(
            id=IDS[0], state="running", stage="search", done=23, total=60, unit="trials", remaining=1810,
            memory=11_400_000_000, message="trial 23: refusal 6 %, KL 0.03", started=now - 1260, submitted=now - 4000,
        ),
        make_job(
            id=IDS[1], reason="window", explanation="waits until 01:00", model="ollama:llama3.3:70b",
            target="llama3.3-abliterated:70b", submitted=now - 7200, label="big night",
        ),
        make_job(
            id=IDS[2], state="held", reason="crash-loop", explanation="its worker died twice at the stage edit",
            model="hf:org/a-model-with-a-name-that-takes-its-room", submitted=now - 90000,
            target="a-model-with-a-name-that-takes-its-room-abliterated:latest",
        ),
        make_job(
            id=IDS[3], state="succeeded", started=now - 9000, ended=now - 6000, submitted=now - 9500,
            model="ollama:gemma3:4b", target="gemma3-abliterated:4b",
            result=Result(product="x.gguf", format="gguf", metrics={"refusal_before": 0.97, "refusal_after": 0.02}),
        ),
        make_job(
            id=IDS[4], state="failed", started=now - 20000, ended=now - 19000, submitted=now - 21000,
            model="ollama:mistral:7b", target="mistral-abliterated:7b",
            failure=Failure(
                failure="disk",
                message="no room on /var/lib: 5.1 GB are needed, 2.0 GB are there",
                remedy="Free 3.1 GB there, then `abliterate retry`",
            ),
        ),
        make_job(
            id=IDS[5], state="cancelled", ended=now - 200000, model="ollama:phi4:14b", target="phi4-abliterated:14b",
        ),
    ]  # fmt: skip
    for job in jobs:
        daemon.put(job)
        daemon.logs[job.id] = b"stage load\nstage direction\n"
    page = home / "jobs" / IDS[3] / "out" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("<!doctype html><title>report</title><p>what was done</p>")
