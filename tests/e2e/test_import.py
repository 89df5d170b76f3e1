"""A folder of safetensors, no converter configured: the Ollama that is there makes the GGUF, or the folder stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import ollama
import pytest

from abliterate.contract.errors import EngineRefused
from abliterate.contract.recipe import Run
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.importer import PASSING, import_folder
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.loading import load
from abliterated.pipeline.rendering import renderer
from abliterated.pipeline.run import run
from abliterated.pipeline.source import open_source
from abliterated.pipeline.watch import Watch
from e2e.daemons import BIN, House, house
from engines import Engine, RunningEngine, find_engines, real_ollamas
from pipeline.folders import planted_folder, read_json, task
from pipeline.planted import Planted

pytestmark = [pytest.mark.e2e, pytest.mark.real_ollama]
WITH_PROGRAMS, LAST_IMPORTER = (0, 30, 0), (0, 34, 0)  # between them an import needs llama-quantize too


def engines(wanted: Callable[[tuple[int, int, int]], bool]) -> list[Engine]:
    """The real ones of such a version."""
    return [engine for engine in real_ollamas() if engine.version and wanted(engine.version)]


@pytest.fixture(scope="module")
def importing() -> Iterator[RunningEngine]:
    found = engines(lambda version: version < WITH_PROGRAMS)
    if not found:
        pytest.skip(f"no Ollama before 0.30 is here: {[engine.missing for engine in find_engines()]}")
    with found[0].start() as running:
        yield running


@pytest.fixture(scope="module")
def current() -> Iterator[RunningEngine]:
    found = engines(lambda version: version > LAST_IMPORTER)
    if not found:
        pytest.skip("no Ollama from 0.34.1 on is here")
    with found[0].start() as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_folder(tmp_path_factory.mktemp("model"), shards=True)


def recipe(model: Planted, name: str) -> bytes:
    return (
        f'model = "{model.path}"\nname = "{name}"\n'
        f'[prompts]\nharmful = "{model.harmful}"\nharmless = "{model.harmless}"\n'
        "[search]\ntrials = 0\n[evaluate]\nprompts = 16\ntokens = 8\n"
    ).encode()


def served(made: House, upstream: RunningEngine, model: Planted) -> None:
    made.upstream = upstream.port
    made.configure("ollama", paths={"models": [str(model.path.parent)]})
    made.serve()


def test_the_engines_importer_makes_a_model_that_answers_as_the_edited_folder(
    importing: RunningEngine, model: Planted
) -> None:
    with house() as made:
        served(made, importing, model)
        job = made.ended(made.drop(recipe(model, "whole-abliterated"), "whole"))
        assert job.state == "succeeded", (job.failure, job.explanation)
        assert job.result is not None
        assert job.result.format == "gguf"
        assert job.result.metrics["refusal_after"] == 0.0
        with ollama.Client(host=importing.base_url) as client:
            names = [str(entry.model) for entry in client.list().models]
            assert names == ["whole-abliterated:latest"]  # the passing model is gone
            shown = client.show("whole-abliterated")
            assert shown.modelinfo is not None
            assert shown.modelinfo["abliterated.content"] == job.result.content
            folder, prompts, expected = answers(model)
            assert (folder / "config.json").is_file()
            for prompt, wanted in zip(prompts, expected, strict=True):
                told = client.generate(
                    "whole-abliterated", prompt, raw=True, options={"temperature": 0, "num_predict": 8}
                )
                assert told.response == wanted
        # And nothing of the import is left in the engine's store: the model's own blobs alone.
        weights = [path for path in (importing.models / "blobs").iterdir() if path.stat().st_size > 50_000]
        assert len(weights) == 1


def answers(model: Planted) -> tuple[Path, list[str], list[str]]:
    """The folder the same recipe gives, what it is asked, and what it answers, greedily."""
    asked = task(model, export={"format": "safetensors"}, evaluate={"prompts": 0})
    made = Path(asked.output) / run(asked, lambda _: None, lambda: False).product
    source = open_source(made)
    loaded = load(source, Run(), Watch())
    lines = [*model.harmful.read_text().splitlines()[:3], *model.harmless.read_text().splitlines()[:3]]
    rows = renderer(loaded.tokenizer, source.context, "").all_tokens(lines)
    found = greedy(loaded, rows, 8, Watch(), "")
    return made, [loaded.tokenizer.decode(row) for row in rows], [loaded.tokenizer.decode(row) for row in found]


def test_where_there_is_no_importer_the_folder_is_the_product_and_the_next_step_is_said(
    current: RunningEngine, model: Planted
) -> None:
    with house() as made:
        served(made, current, model)
        job = made.ended(made.drop(recipe(model, "kept-abliterated"), "kept"))
        assert job.state == "succeeded", (job.failure, job.explanation)
        assert job.result is not None
        assert (job.result.format, job.result.product) == ("safetensors", "kept-abliterated")
        assert any("Next: set [tools] converter" in note for note in job.result.notes)
        assert (made.state / "jobs" / job.id / "out" / "kept-abliterated" / "config.json").is_file()


async def test_an_architecture_the_importer_does_not_know_is_refused_and_nothing_stays(
    importing: RunningEngine, model: Planted, tmp_path: Path
) -> None:
    strange = shutil.copytree(model.path, tmp_path / "strange")
    config = read_json(strange / "config.json") | {"architectures": ["NobodysForCausalLM"]}
    (strange / "config.json").write_text(json.dumps(config))
    async with OllamaClient(importing.base_url) as client:
        # Some model of the engine's must show where its store is.
        digest = await client.push_blob(model.path.with_name("planted.gguf"))
        await client.create({"model": "another", "files": {"model.gguf": digest}})
        before = sorted(path.name for path in (importing.models / "blobs").iterdir())
        with pytest.raises(EngineRefused, match="unsupported architecture"):
            await import_folder(client, strange, tmp_path / "out.gguf")
        assert not [row for row in await client.tags() if str(row["name"]).startswith(PASSING)]
        after = sorted(path.name for path in (importing.models / "blobs").iterdir())
        await client.delete("another")
    assert not (tmp_path / "out.gguf").exists()
    assert after == before


def test_a_folder_is_exported_by_the_ollama_of_the_shell(
    importing: RunningEngine, model: Planted, tmp_path: Path
) -> None:
    made = tmp_path / "made.gguf"
    told = subprocess.run(
        [str(BIN / "abliterated"), "export", str(model.path), "-o", str(made), "--quantize", "Q8_0"],
        env=os.environ | {"OLLAMA_HOST": importing.base_url},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(made)
    assert "Q8_0" in {tensor.type.name for tensor in read_gguf(made).tensors}
    assert [path.name for path in tmp_path.iterdir()] == ["made.gguf"]


async def test_the_file_is_the_callers_own(importing: RunningEngine, model: Planted, tmp_path: Path) -> None:
    async with OllamaClient(importing.base_url) as client:
        await import_folder(client, model.path, tmp_path / "out.gguf")
        await import_folder(client, model.path, tmp_path / "again.gguf")
    assert read_gguf(tmp_path / "out.gguf").architecture == "llama"
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
