"""Templates that lose tools get a variant that doesn't; nothing else about them changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterated.templates.abilities import TOOL, abilities
from abliterated.templates.rendering import TemplateRefuses, render
from abliterated.templates.variants import tool_variant
from templates.families import own_families

ALL = {"system", "tools", "calls", "results", "several calls"}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools are told, calls are not, as two families had it.
LISTED = CHATML.replace(
    "{% for message",
    "{% if tools %}<|im_start|>system\nList of tools: {{ tools | tojson }}<|im_end|>\n{% endif %}{% for message",
)
ROLES = (
    "{% if tools %}{% set available_tools = tools %}{% endif %}"
    "{% if available_tools %}<|start_of_role|>available_tools<|end_of_role|>{{ available_tools | tojson }}"
    "<|end_of_text|>\n{% endif %}"
    "{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)  # fmt: skip
CASES = {
    "a bare ChatML whose model knows tools": (CHATML, "Qwen2.5-7B-Instruct", "<tool_call>"),
    "calls in Python's way": (LISTED, "", "<|tool_call_start|>[count_ducks(pond="),
    "calls as a list": (ROLES, "", '<|tool_call|>[{"name": "count_ducks"'),
}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "How many?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "count_ducks", "arguments": {"pond": pond}}} for pond in ("a", "b")],
    },
    {"role": "tool", "content": "7"},
    {"role": "tool", "content": "8"},
]


@pytest.mark.parametrize("case", CASES)
def test_what_was_lost_is_told(case: str) -> None:
    jinja, name, spoken = CASES[case]
    assert abilities(jinja) != ALL
    variant = tool_variant(jinja, name=name)
    assert variant is not None
    assert abilities(variant.jinja) == ALL
    assert variant.jinja.endswith(jinja), "the published text is whole"
    assert "the published chat template loses" in variant.reason
    text = render(variant.jinja, CALLS, tools=[TOOL])
    assert spoken in text and text.index("7") < text.index("8")


def test_calls_made_at_once_are_told_one_after_the_other() -> None:
    [family] = [family for family in own_families() if family.name == "header-ids"]
    with pytest.raises(TemplateRefuses, match="one call at a time"):
        render(family.jinja, CALLS, tools=[TOOL])
    variant = tool_variant(family.jinja)
    assert variant is not None
    text = render(variant.jinja, CALLS, tools=[TOOL])
    places = [text.index(said) for said in ('"pond": "a"', '"7"', '"pond": "b"', '"8"')]
    assert places == sorted(places), "each call is followed by its own result"


def test_a_call_without_a_result_is_kept() -> None:
    variant = tool_variant(next(f.jinja for f in own_families() if f.name == "header-ids"))
    assert variant is not None
    text = render(variant.jinja, CALLS[:3], tools=[TOOL])
    assert '"pond": "a"' in text and '"pond": "b"' in text and '"7"' in text


@pytest.mark.parametrize("family", own_families(), ids=lambda family: family.name)
def test_a_template_that_does_everything_is_left_alone(family: Any) -> None:
    if family.name not in ("plain", "header-ids"):
        assert abilities(family.jinja) == ALL
        assert tool_variant(family.jinja) is None


@pytest.mark.parametrize("jinja", ["", "  ", "{% nonsense", "{{ messages.no.such.thing }}", CHATML, "plain text"])
def test_where_nobody_knows_the_dialect_nothing_is_invented(jinja: str) -> None:
    assert tool_variant(jinja, architecture="llama", name="some model") is None


def test_a_model_that_never_learnt_tools_gets_none() -> None:
    [family] = [family for family in own_families() if family.name == "plain"]
    assert tool_variant(family.jinja, architecture="gemma2", name="gemma-2-2b-it") is None


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.sampled_from(sorted(CASES)), st.booleans())
def test_a_conversation_without_tools_is_untouched(texts: list[str], case: str, system: bool) -> None:
    jinja, name, _ = CASES[case]
    variant = tool_variant(jinja, name=name)
    assert variant is not None
    roles = [*(["system"] if system else []), *["user", "assistant"] * len(texts)]
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    assert render(variant.jinja, talk) == render(jinja, talk)


def test_a_template_reaches_no_object_of_ours() -> None:
    for hostile in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ):
        try:
            text = render(hostile, CALLS)
        except TemplateRefuses:
            continue
        assert "class" not in text and "import" not in text
