"""Which chat template a product gets: the base's, or a tool-capable variant where the published one drops tools.

A base that an engine serves keeps its own: the product shall behave there as the base does. Does not know how templates
are mended (`abliterated.templates`), nor how keys are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from abliterate.contract.messages import Task
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.provenance import PREFIX
from abliterated.templates.variants import tool_variant

TEMPLATE: Final = "tokenizer.chat_template"
MENDED: Final = PREFIX + "chat_template"


def template_keys(task: Task, gguf: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys that replace that GGUF's template, and what to say about it; none to keep it."""
    if not task.recipe.export.tool_template or task.base.startswith("ollama:"):
        return {}, ()
    values = read_gguf(gguf).values
    jinja = values.get(TEMPLATE)
    if not isinstance(jinja, str):
        return {}, ()
    name = f"{values.get('general.basename', '')} {values.get('general.name', '')} {task.base}"
    variant = tool_variant(jinja, architecture=str(values.get("general.architecture", "")), name=name)
    if variant is None:
        return {}, ()
    reason = f"{variant.reason} (export.tool_template = false keeps the published one)"
    return {TEMPLATE: variant.jinja, MENDED: variant.reason}, (reason,)
