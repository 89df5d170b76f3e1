"""One suite over the embedded engine and every real Ollama found: everything kept, nothing foreign touched, proven."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from abliterate.contract.errors import ConflictError, EngineRefused, ModelError
from abliterated.ollama.admission import admit
from abliterated.ollama.certify import certify, renders
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import Base, describe_base, resolve_base
from abliterated.ollama.register import go_template, register
from abliterated.ollama.request import blob_digest
from abliterated.ollama.version import Generation
from engine import scripted_gguf
from engines import Engine, RunningEngine, find_engines

TARGET = "base-abliterated:8b"
TEMPLATE = (
    "{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}"
    "{{ if .ToolCalls }}<tool_call>{{ end }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)
FIELDS: dict[str, Any] = {
    "template": TEMPLATE,
    "system": 'You say "yes"\nand """no"""',
    "parameters": {"stop": ['"', "<|im_end|>", 'two\n"lines"'], "temperature": 0.5, "num_ctx": 2048, "top_k": 7},
    "license": ["Licence of the base\nline two", "another"],
    "messages": [{"role": "user", "content": 'a\n"quoted"'}, {"role": "assistant", "content": " yes "}],
}
PLAIN = {"temperature": 0.5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    scripted_gguf.write(folder / "base.gguf")
    for content in ("c0ffee", "0ld"):
        scripted_gguf.write(folder / f"{content}.gguf", scripted_gguf.Model(extra={"abliterated.content": content}))
    return folder


def parameters() -> list[Any]:
    return [
        pytest.param(
            engine,
            id=engine.id,
            marks=[] if engine.embedded else [pytest.mark.real_ollama],
        )
        for engine in find_engines()
    ]


@pytest.fixture(scope="module", params=parameters())
def running(request: pytest.FixtureRequest) -> Any:
    engine: Engine = request.param
    if engine.missing:
        pytest.skip(engine.missing)
    with engine.start() as started:
        yield started


@pytest.fixture
async def client(running: RunningEngine, files: Path) -> AsyncIterator[OllamaClient]:
    async with OllamaClient(running.base_url) as opened:
        for row in await opened.tags():
            await opened.delete(row["name"])
        digest = await opened.push_blob(files / "base.gguf")
        await opened.create({"model": "base:8b", "files": {"model.gguf": digest}, **FIELDS})
        await opened.create({"model": "jinja:1", "files": {"model.gguf": digest}, "parameters": PLAIN})
        yield opened


def elsewhere(base: Base) -> Base:
    return Base(**{**base.__dict__, "blob_path": Path("/elsewhere/blobs") / base.blob_path.name})


async def test_what_the_base_says_is_read_back_word_for_word(client: OllamaClient) -> None:
    base = await resolve_base(client, "base:8b")
    said = base.modelfile
    assert (said.template, said.system) == (TEMPLATE, FIELDS["system"])
    assert said.parameter_map() == FIELDS["parameters"]
    assert [{"role": m.role, "content": m.content} for m in said.messages] == FIELDS["messages"]
    assert list(said.licenses) == FIELDS["license"]
    assert base.blob_path.read_bytes()[:4] == b"GGUF" and base.digest


@pytest.mark.parametrize("name", ["base:8b", "jinja:1"])
@pytest.mark.parametrize("how", ["linked", "uploaded"])
async def test_the_new_model_is_its_base_in_all_but_its_weights(
    client: OllamaClient, files: Path, name: str, how: str
) -> None:
    base = await resolve_base(client, name)
    version = await client.version()
    done = await register(client, files / "c0ffee.gguf", TARGET, base if how == "linked" else elsewhere(base))
    unexpected = [note for note in done.notes if note not in version.notes() and "ignores the template" not in note]
    assert unexpected == []
    assert done.content == "c0ffee" and done.layer == done.digest and not done.existing
    made = await describe_base(client, TARGET)
    assert made.capabilities == base.capabilities
    assert made.modelfile.parameter_map() == base.modelfile.parameter_map()
    rest = {"models": (), "parameters": ()}
    assert made.modelfile.__dict__ | rest == base.modelfile.__dict__ | rest
    again = await register(client, files / "c0ffee.gguf", TARGET, base)
    assert again.existing


async def test_the_prompts_are_the_bases_and_it_speaks(client: OllamaClient, files: Path) -> None:
    base = await resolve_base(client, "base:8b")
    await register(client, files / "c0ffee.gguf", TARGET, base)
    proof = await certify(client, TARGET, "base:8b")
    assert proof.failures == [] and proof.answer == "a quiet answer"
    assert bool(proof.compared) is renders(await client.version())


async def test_a_model_without_a_base_speaks_by_the_template_inside_it(client: OllamaClient, files: Path) -> None:
    done = await admit(client, files / "c0ffee.gguf", TARGET)
    version = await client.version()
    said = [note for note in done.registration.notes if note not in version.notes()]
    if version.generation is not Generation.LEGACY:
        assert said == [] and "tools" in done.registration.capabilities
    elif go_template(scripted_gguf.CHAT_TEMPLATE):
        assert "got a Go template" in said[0] and "tools" in done.registration.capabilities
    else:
        assert "tools will not work there" in said[0]
    assert done.certificate.answer == "a quiet answer" and done.certificate.differences == []


async def test_a_foreign_model_is_kept_and_ours_is_renewed(client: OllamaClient, files: Path) -> None:
    base = await resolve_base(client, "base:8b")
    with pytest.raises(ConflictError):
        await register(client, files / "c0ffee.gguf", "jinja:1", base)
    assert (await describe_base(client, "jinja:1")).content == ""
    await register(client, files / "0ld.gguf", TARGET, base)
    done = await register(client, files / "c0ffee.gguf", TARGET, base)
    assert done.content == "c0ffee" and (await describe_base(client, TARGET)).content == "c0ffee"
    assert len(await client.tags()) == 3


async def test_what_is_no_model_leaves_nothing_behind(client: OllamaClient, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(ModelError):
        await register(client, broken, TARGET)
    with pytest.raises(EngineRefused):
        await client.create({"model": "x:1", "files": {"model.gguf": "sha256:" + "0" * 64}})
    assert {row["name"] for row in await client.tags()} == {"base:8b", "jinja:1"}


async def test_loading_and_unloading_leave_nothing_changed(client: OllamaClient) -> None:
    await client.chat_once("jinja:1", [{"role": "user", "content": "hello"}], tokens=4)
    assert "jinja:1" in [row["name"] for row in await client.ps()]
    assert await client.unload("jinja:1")
    assert "jinja:1" not in [row["name"] for row in await client.ps()]


async def test_a_renderer_and_its_parser_are_the_bases(client: OllamaClient, files: Path) -> None:
    """Told by the modelfile alone: the fields of /api/show are never filled."""
    digest = await client.push_blob(files / "base.gguf")
    spoken = {"renderer": "qwen3-coder", "parser": "qwen3-coder", "requires": "0.1.0", "parameters": PLAIN}
    await client.create({"model": "spoken:1", "files": {"model.gguf": digest}, **spoken})
    base = await resolve_base(client, "spoken:1")
    known = (await client.version()).generation is not Generation.LEGACY or bool(base.modelfile.renderer)
    assert (base.modelfile.renderer, base.modelfile.parser) == (("qwen3-coder",) * 2 if known else ("", ""))
    await register(client, files / "c0ffee.gguf", TARGET, base)
    made = await describe_base(client, TARGET)
    for said in ("renderer", "parser", "requires", "template"):
        assert getattr(made.modelfile, said) == getattr(base.modelfile, said), said
    assert made.capabilities == base.capabilities
    proof = await certify(client, TARGET, "spoken:1")
    assert proof.failures == []
    assert bool(proof.compared) is renders(await client.version())


def projector(path: Path) -> Path:
    """As small as an engine takes for one."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_uint32("clip.vision.block_count", 1)
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


async def test_the_projector_comes_along(client: OllamaClient, files: Path, tmp_path: Path) -> None:
    """Named by its blob, which the engine has: vision stays, and nothing of it is sent again."""
    digests = {"model.gguf": await client.push_blob(files / "base.gguf")}
    digests["mmproj.gguf"] = await client.push_blob(projector(tmp_path / "mmproj.gguf"))
    await client.create({"model": "seeing:1", "files": digests, "parameters": PLAIN})
    base = await resolve_base(client, "seeing:1")
    assert [blob_digest(path) for path in base.modelfile.models] == list(digests.values())
    await register(client, files / "c0ffee.gguf", TARGET, base)
    made = await describe_base(client, TARGET)
    assert made.modelfile.models[1:] == base.modelfile.models[1:]
    assert made.content == "c0ffee"
    assert made.capabilities == base.capabilities
