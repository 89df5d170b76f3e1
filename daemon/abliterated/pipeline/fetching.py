"""The stage "fetch": a task whose model is still at a hub becomes one whose model is a folder here.

It is the only stage that may use the network; behind it the process is offline and holds no token. Needs no device,
so a worker fetches before it takes one. Does not know how files travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from abliterate.contract.messages import Task
from abliterated.pipeline.prompts import data_sets
from abliterated.pipeline.watch import Watch


def _fetch_sets(references: Sequence[str], watch: Watch) -> None:
    """Bring the data sets into the cache, where the prompts are read from."""
    from abliterated.pipeline.datasets import fetch_dataset
    from abliterated.pipeline.hub_access import Hub

    hub = Hub.from_environment()
    if hub.offline:  # fetched before, or never to be
        return
    with watch.stage("fetch"):
        for number, reference in enumerate(references):
            watch.step(number, len(references), "data sets", f"fetching {reference.removeprefix('hf:')}")
            fetch_dataset(reference, hub=hub, cancelled=watch.cancelled)


def needs_fetch(task: Task) -> bool:
    """Whether the task's model is not here yet."""
    return not task.source and task.recipe.model.startswith("hf:")


def fetched(task: Task, watch: Watch) -> Task:
    """The task with `source` a folder, `base` hf:ORG/REPO@COMMIT and `base_digest` git:COMMIT; any other as it is.

    Raises what `hub.fetch` does.
    """
    sets = data_sets(task.recipe.prompts)
    if sets:
        _fetch_sets(sets, watch)
    if not needs_fetch(task):
        return task
    # The hub's client is read here and not above, so that other runs never import it.
    from abliterated.pipeline.hub import fetch, go_offline

    reference = task.recipe.model
    with watch.stage("fetch"):

        def progress(done: int, total: int) -> None:
            watch.step(done, total, "bytes", f"fetching {reference.removeprefix('hf:')}")

        try:
            found = fetch(reference, progress=progress, cancelled=watch.cancelled)
        finally:
            go_offline()
    repository = reference.removeprefix("hf:").partition("@")[0]
    return msgspec.structs.replace(
        task,
        source=str(found.folder),
        base=f"hf:{repository}@{found.commit}",
        base_digest=f"git:{found.commit}",
    )
