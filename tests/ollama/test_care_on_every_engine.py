"""Doctor, repair, going back and undo over the embedded engine and every real Ollama found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.contract.errors import ConflictError, ModelError, NotFound
from abliterated.ollama.admission import CertificationFailed, admit
from abliterated.ollama.certify import renders
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.doctor import diagnose
from abliterated.ollama.locate import resolve_base
from abliterated.ollama.register import go_template
from abliterated.ollama.removal import list_ours, undo
from abliterated.ollama.repair import backup_name, go_back, repair
from abliterated.ollama.version import Generation
from engine import scripted_gguf
from engines import Engine, RunningEngine, engine_parameters, require
from strangers import within

TARGET, THEIRS = "base-abliterated:8b", "base-uncensored:8b"
TEMPLATE = (
    "{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}"
    "{{ if .ToolCalls }}<tool_call>{{ .ToolCalls }}{{ end }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)
OURS = {
    "abliterated.content": "c0ffee",
    "abliterated.base.name": "ollama:base:8b",
    "abliterated.metric.refusal_before": 0.97,
    "abliterated.metric.refusal_after": 0.02,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    scripted_gguf.write(folder / "base.gguf")
    scripted_gguf.write(folder / "ours.gguf", scripted_gguf.Model(extra=OURS))
    scripted_gguf.write(folder / "theirs.gguf", scripted_gguf.Model(extra={"somebody.else": "made it"}))
    return folder


@pytest.fixture(scope="module", params=engine_parameters())
def running(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    engine: Engine = require(request.param)
    with engine.start() as started:
        yield started


@pytest.fixture
async def client(running: RunningEngine, files: Path) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(running.base_url) as opened:
        for row in await opened.tags():
            await opened.delete(row["name"])
        base = await opened.push_blob(files / "base.gguf")
        stops = {"stop": ["<|im_end|>"], "temperature": 0.5}
        await opened.create({"model": "base:8b", "files": {"m.gguf": base}, "template": TEMPLATE, "parameters": stops})
        theirs = await opened.push_blob(files / "theirs.gguf")
        markers = {"stop": ["<tool_call>", "</think>"], "top_k": 3}
        await opened.create({"model": THEIRS, "files": {"m.gguf": theirs}, "parameters": markers})
        yield opened


async def names(client: OllamaClient) -> list[str]:
    return sorted(str(row["name"]) for row in await client.tags())


async def keys(client: OllamaClient, name: str) -> set[str]:
    return {one.key for one in (await diagnose(client, name)).findings if one.level in ("problem", "warning")} - {
        "engine"
    }


async def test_the_base_is_healthy_and_the_strangers_model_is_not(client: OllamaClient) -> None:
    assert await keys(client, "base:8b") == set()
    ill = await keys(client, THEIRS)
    legacy = (await client.version()).generation is Generation.LEGACY
    assert "stop-markers" in ill
    assert ("template-missing" in ill) is legacy


async def test_a_repair_gives_back_all_the_base_has_in_an_instant(client: OllamaClient) -> None:
    before = await client.show(THEIRS)
    with within(10.0):  # the bar, a second, is make bench's business
        done = await repair(client, THEIRS)
    assert done.base == "base:8b" and done.backup == backup_name(THEIRS)
    assert await keys(client, THEIRS) == set()
    after = await client.show(THEIRS)
    assert after["modelfile"].count("TEMPLATE") == 1 and TEMPLATE.split("\n")[0] in after["modelfile"]
    assert "<tool_call>" not in after["parameters"] and "top_k" in after["parameters"]
    assert "tools" in after["capabilities"]
    again = await repair(client, THEIRS)
    assert again.changed == []
    back = await go_back(client, THEIRS)
    now = await client.show(THEIRS)
    assert back.changed
    for shown in (before, now):
        shown["modified_at"] = ""
        for field in ("parameters", "modelfile"):  # this engine prints parameters in any order
            shown[field] = sorted(shown[field].split("\n"))
    assert now == before
    assert await names(client) == sorted(["base:8b", THEIRS])
    with pytest.raises(NotFound):
        await go_back(client, THEIRS)


async def test_a_repaired_model_answers_like_its_base(client: OllamaClient) -> None:
    question: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
    await client.chat_once(THEIRS, question, tokens=4)  # its runner is loaded, by the old way of rendering
    await repair(client, THEIRS)
    assert (await client.chat_once(THEIRS, question))["message"] == (await client.chat_once("base:8b", question))[
        "message"
    ]


async def test_without_a_base_only_what_needs_none_is_mended(client: OllamaClient) -> None:
    await client.delete("base:8b")
    done = await repair(client, THEIRS)
    left = await keys(client, THEIRS)
    assert done.base == "" and done.backup and "stop-markers" not in left
    known = go_template(scripted_gguf.CHAT_TEMPLATE)
    if (await client.version()).generation is Generation.LEGACY and known:
        assert "template-missing" not in left and "TEMPLATE" in " ".join(done.changed)
    elif (await client.version()).generation is Generation.LEGACY:
        assert "template-missing" in left and done.diagnosis.broken
        with pytest.raises(ModelError, match="must come from a model of its kind"):
            await repair(client, THEIRS)


async def test_ours_is_listed_with_its_base_and_what_it_refused(client: OllamaClient, files: Path) -> None:
    await admit(client, files / "ours.gguf", TARGET, await resolve_base(client, "base:8b"), reference="base:8b")
    found = await list_ours(client)
    (row,) = found.models
    assert (row.name, row.base, row.base_there, found.others) == (TARGET, "ollama:base:8b", True, 2)
    assert row.refusal_before == pytest.approx(0.97) and row.refusal_after == pytest.approx(0.02)
    assert row.size > 1_000_000 and row.base_size > 1_000_000


async def test_undo_frees_the_blob_and_touches_nothing_else(
    client: OllamaClient, files: Path, running: RunningEngine
) -> None:
    await admit(client, files / "ours.gguf", TARGET, await resolve_base(client, "base:8b"), reference="base:8b")
    size = (files / "ours.gguf").stat().st_size
    await client.copy(TARGET, "mine:1")
    first = await undo(client, TARGET)
    assert (first.freed, first.kept_by, first.removed) == (0, ["mine:1"], [TARGET])
    second = await undo(client, "mine:1")
    assert second.freed == size and second.kept_by == []
    assert await names(client) == sorted(["base:8b", THEIRS])
    with pytest.raises(ConflictError, match="not made by abliterated"):
        await undo(client, THEIRS)
    with pytest.raises(NotFound):
        await undo(client, TARGET)


async def test_replacing_our_model_frees_the_old_weights(
    client: OllamaClient, files: Path, running: RunningEngine, tmp_path: Path
) -> None:
    base = await resolve_base(client, "base:8b")
    newer = tmp_path / "newer.gguf"
    scripted_gguf.write(newer, scripted_gguf.Model(extra=OURS | {"abliterated.content": "fresh"}))
    first = await admit(client, files / "ours.gguf", TARGET, base, reference="base:8b")
    second = await admit(client, newer, TARGET, base, reference="base:8b")
    assert await client.has_blob(second.registration.digest) and not await client.has_blob(first.registration.digest)
    assert await names(client) == sorted([TARGET, "base:8b", THEIRS])


async def test_what_a_failed_proof_leaves_is_nothing(client: OllamaClient, tmp_path: Path) -> None:
    """The product's own template renders plain turns otherwise: seen wherever the engine shows what it renders."""
    base = await resolve_base(client, "base:8b")
    odd = tmp_path / "odd.gguf"
    template = scripted_gguf.CHAT_TEMPLATE.replace("<|im_start|>user\n", "<|im_start|>human\n")
    scripted_gguf.write(odd, scripted_gguf.Model(chat_template=template, extra=OURS))
    if not renders(await client.version()):
        done = await admit(client, odd, TARGET, base, reference="base:8b")
        assert any("does not show rendered prompts" in note for note in done.certificate.notes)
        return
    with pytest.raises(CertificationFailed) as told:
        await admit(client, odd, TARGET, base, reference="base:8b")
    assert "+<|im_start|>human" in told.value.certificate.failures[0].diff
    assert await names(client) == sorted(["base:8b", THEIRS])
