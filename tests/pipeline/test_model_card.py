"""The card beside an edited folder: what a hub reads and what a person should know, whatever the names hold."""

from __future__ import annotations

from abliterate.contract.recipe import recipe_from_table
from abliterate.contract.report import PromptSource
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.model_card import model_card

PROVENANCE = {
    "abliterated.version": "0.1.0",
    "abliterated.base.name": "hf:org/model@" + "0f" * 20,
    "abliterated.base.digest": "git:" + "0f" * 20,
    "abliterated.direction.digest": "ab" * 32,
}
METRICS = {
    "refusal_before": 0.97,
    "refusal_before_low": 0.91,
    "refusal_before_high": 0.99,
    "refusal_after": 0.0,
    "harmful_prompts": 32.0,
    "harmless_prompts": 32.0,
    "harmless_exact": 0.9,
    "kl_mean": 0.0042,
    "kl_max": 0.05,
    "kl_tokens": 32.0,
}
SOURCES = [PromptSource(kind="harmless", name="hf:org/set#text", count=416, licence="mit")]


def card(**changed: object) -> str:
    recipe = recipe_from_table({"model": "hf:org/model"})
    given = {"provenance": PROVENANCE, "metrics": METRICS, "licence": ("Apache-2.0", ["LICENSE"]), "prompts": SOURCES}
    return model_card("model-abliterated", recipe, edited=EditReport((), 0, 0), **(given | changed))  # type: ignore[arg-type]


def test_a_hub_reads_licence_base_and_tags() -> None:
    front = card().split("---\n")[1]
    assert front.splitlines() == [
        "license: apache-2.0",
        "base_model: org/model",
        "base_model_relation: finetune",
        "tags:",
        "- abliterated",
        "pipeline_tag: text-generation",
    ]


def test_a_person_reads_the_figures_with_their_intervals_and_where_prompts_came_from() -> None:
    text = card()
    assert "| harmful prompts refused | 97.0% (91%–99%) | 0.0% |" in text
    assert "0.0042 nats a token" in text
    assert "at most 32 tokens" in text
    assert "| harmless | `hf:org/set#text` | 416 | mit |" in text
    assert "## Before you use it" in text


def test_strengths_are_those_it_was_edited_with() -> None:
    """A search has its own, whatever the recipe began with."""
    searched = {"abliterated.edit.strength.attention": [0.1479, 1.5], "abliterated.edit.strength.mlp": [0.5, 0.5]}
    text = card(provenance=PROVENANCE | searched)
    assert "strength: attention 0.148 to 1.5 by layer, MLP 0.5, layers `all`" in text
    assert "strength: attention 1, MLP 1, layers `all`" in card()
    assert "of those that write" in text
    assert "of those chosen that write" in card(provenance=PROVENANCE | {"abliterated.edit.strength.mlp": [0.0, 1.0]})


def test_what_is_not_known_is_not_claimed() -> None:
    text = card(metrics={}, prompts=(), licence=("", []), provenance={"abliterated.base.name": "base.gguf"})
    assert "## Figures" not in text
    assert "license:" not in text
    assert "base_model:" not in text
    assert "came without one that could be found" in text


def test_no_name_breaks_the_front_matter() -> None:
    text = card(
        licence=("mit\nbase_model: evil/x", []), provenance=PROVENANCE | {"abliterated.base.name": "hf:a/b\nx: y"}
    )
    front = text.split("---\n")[1]
    assert "evil" not in front
    assert "x: y" not in front
