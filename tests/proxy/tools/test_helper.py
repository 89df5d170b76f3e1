"""The process that renders: strangers' templates, files that lie, and when it starts and ends."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import ModelError
from abliterated.proxy.tools.helper import Render, shapes, short_id
from abliterated.proxy.tools.renderer import CannotRender, Renderer
from abliterated.proxy.tools.vocabulary import read_words
from engine.scripted_gguf import write
from proxy.tools.double import TEMPLATE, write_gguf
from strangers import gone
from templates.families import own_families, scripted

HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set ns = namespace(t='x' * 999) %}{% for a in range(99999) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"


@pytest.fixture
async def renderer() -> AsyncIterator[Renderer]:
    made = Renderer(seconds=60)
    yield made
    await made.close()
    assert not made.running


def asked(jinja: str, messages: list[dict[str, object]] | None = None) -> Render:
    return Render(jinja, messages or [dict(one) for one in HELLO], [], {"bos_token": "", "eos_token": ""})


async def test_it_starts_when_first_asked_and_renders(renderer: Renderer) -> None:
    assert not renderer.running
    assert await renderer.render(asked(TEMPLATE)) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant"
    assert renderer.running


async def test_a_template_that_refuses_or_breaks_the_sandbox_is_said_so_and_the_process_lives(
    renderer: Renderer,
) -> None:
    for jinja in (
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% if %}",
        "{{ 1/0 }}",
    ):
        with pytest.raises(CannotRender):
            await renderer.render(asked(jinja))
    assert await renderer.render(asked("fine")) == "fine"


async def test_a_template_without_end_costs_the_process_its_life_and_the_next_question_gets_a_new_one() -> None:
    renderer = Renderer(seconds=1)
    try:
        with pytest.raises(CannotRender, match="took more than"):
            await renderer.render(asked(ENDLESS))
        assert not renderer.running
        renderer._seconds = 60
        assert await renderer.render(asked("fine")) == "fine"
    finally:
        await renderer.close()


async def test_a_template_that_eats_memory_is_stopped(renderer: Renderer) -> None:
    with pytest.raises(CannotRender):
        await renderer.render(asked(HUGE))
    assert await renderer.render(asked("fine")) == "fine"


async def test_it_stops_when_nobody_has_asked_for_a_while() -> None:
    renderer = Renderer(idle_seconds=0.05)
    await renderer.render(asked("fine"))
    async with asyncio.timeout(60):
        while renderer.running:
            await asyncio.sleep(0.01)
    assert await renderer.render(asked("again")) == "again"
    await renderer.close()


async def test_who_leaves_in_the_middle_does_not_leave_his_answer_to_the_next() -> None:
    renderer = Renderer(seconds=60)
    task = asyncio.create_task(renderer.render(asked(ENDLESS)))
    async with asyncio.timeout(60):
        while not renderer.running:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await renderer.render(asked("mine")) == "mine"
    await renderer.close()


async def test_questions_at_once_are_answered_each_its_own(renderer: Renderer) -> None:
    told = await asyncio.gather(*(renderer.render(asked(f"{number}")) for number in range(20)))
    assert told == [str(number) for number in range(20)]


async def test_nothing_heavy_is_loaded_there_and_it_ends_with_its_owner(renderer: Renderer) -> None:
    await renderer.render(asked("fine"))
    assert renderer._process is not None
    maps = Path(f"/proc/{renderer._process.pid}/maps")
    if maps.exists():
        assert "torch" not in maps.read_text() and "numpy" not in maps.read_text()
    owner = subprocess.run(
        [sys.executable, "-c", _OWNER], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    child = int(owner.stdout)
    async with asyncio.timeout(60):
        while not gone(child):
            await asyncio.sleep(0.02)


_OWNER = """
import asyncio, os
from abliterated.proxy.tools.helper import Render
from abliterated.proxy.tools.renderer import Renderer
async def main():
    renderer = Renderer()
    await renderer.render(Render("x", [], [], {}))
    print(renderer._process.pid, flush=True)
    os._exit(0)
asyncio.run(main())
"""


async def test_a_models_words_are_read_from_its_gguf(renderer: Renderer, tmp_path: Path) -> None:
    family = next(family for family in own_families() if family.name == "bracketed")
    path = write(tmp_path / "model.gguf", scripted(family))
    learnt = await renderer.learn(str(path), "any")
    assert learnt.words.jinja == family.jinja
    assert "[TOOL_CALLS]" in learnt.words.control
    assert learnt.tools and learnt.jinja == family.jinja and not learnt.loses


async def test_our_variant_is_used_where_the_models_own_loses_tools(renderer: Renderer, tmp_path: Path) -> None:
    family = next(family for family in own_families() if family.name == "header-ids")
    learnt = await renderer.learn(str(write_gguf(tmp_path / "model.gguf", family.jinja)), "any")
    assert learnt.jinja != family.jinja and family.jinja in learnt.jinja
    assert learnt.loses == {"several calls"} and learnt.tools


async def test_a_file_that_is_not_there_or_no_gguf_is_said_so(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "none", tmp_path / "text", tmp_path):
        with pytest.raises(CannotRender):
            await renderer.learn(str(path), "x")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), what=st.binary(min_size=1, max_size=12), cut=st.integers(0, 700))
def test_a_gguf_that_lies_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, what: bytes, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "lies.gguf"
    data = bytearray(write_gguf(path).read_bytes())
    data[place : place + len(what)] = what
    path.write_bytes(bytes(data[: max(cut, 1)] if cut < 600 else data))
    try:
        read_words(path)
    except ModelError as error:
        assert "can't read" in str(error)


def test_a_gguf_that_announces_too_much_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62))
    with pytest.raises(ModelError, match="more than it can hold"):
        read_words(path)


def test_a_conversation_is_offered_in_the_shapes_templates_differ_about() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    talk = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1"}]
    first, short, text, both = shapes(talk)
    assert first == talk
    assert short[0]["tool_calls"][0]["id"] == short[1]["tool_call_id"] == short_id("call_1")
    assert text[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert both[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}' and len(both[1]["tool_call_id"]) == 9
    assert list(shapes(HELLO)) == [HELLO]  # type: ignore[arg-type]
