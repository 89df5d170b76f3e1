"""A search that can't reach its target, as a job: the best is delivered, how far off it is said, and `wait` tells it by
its exit code."""

from __future__ import annotations

import pytest

from e2e.daemons import house
from pipeline.planted import plant

pytestmark = pytest.mark.e2e


def test_a_job_that_misses_its_target_delivers_the_best_and_wait_exits_with_8() -> None:
    with house() as made:
        made.configure()
        made.serve()
        model = plant(made.home)
        # The refusal is written in the first layers; the last one alone can't take it back.
        recipe = (
            f'model = "{model.path}"\n[prompts]\nharmful = "{model.harmful}"\nharmless = "{model.harmless}"\n'
            '[direction]\nmethod = "layer"\nlayer = 2\n'
            '[edit]\nlayers = "3"\n[search]\ntrials = 2\n[evaluate]\nprompts = 8\ntokens = 8\n'
            "[export]\nregister = false\n"
        )
        job_id = made.drop(recipe.encode(), "short")
        made.until(lambda: any(job.id == job_id for job in made.control.jobs()), "the job")
        said = made.client("wait", job_id, code=8)
        assert "refusal 100% → 100% · 97.0% above the target" in said
        job = made.ended(job_id)
        assert job.state == "succeeded"
        assert job.result is not None
        assert list(made.home.rglob(job.result.product)), "nothing was delivered"
        assert any("no trial kept refusals at 3.0%" in note for note in job.result.notes)
        assert '"reached": false' in made.client("report", job_id, "--json").replace(":false", ": false")
