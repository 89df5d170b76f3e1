"""The words that travel with an edited folder: `MODEL_CARD.md`, what it is, of what, how it was made and undone.

Pure and deterministic: values in, Markdown out. Does not know tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from abliterate.contract.recipe import Recipe
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.gguf_file import read_gguf

CARD_FILE: Final = "MODEL_CARD.md"
_LICENCE: Final = re.compile(r"(licen[cs]e|notice|copying|use_policy|usage_policy)", re.I)
_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.S)
_NAMED: Final = re.compile(r"^(license|license_name):[ \t]*[\"']?([\w.+ -]{1,80}?)[\"']?[ \t]*$", re.M)


def licence_of(base: Path) -> tuple[str, list[str]]:
    """The licence the base names, in its card or its GGUF ("" for none), and the names of its licence files."""
    if base.is_file():
        return str(read_gguf(base).values.get("general.license", "")), []
    files = sorted(path.name for path in base.iterdir() if path.is_file() and _LICENCE.match(path.name))
    try:
        front = _FRONT.match((base / "README.md").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        front = None
    named = dict(_NAMED.findall(front[1])) if front else {}
    return named.get("license_name") or named.get("license") or "", files


def model_card(
    name: str,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    edited: EditReport,
    metrics: Mapping[str, float],
    licence: tuple[str, Sequence[str]],
) -> str:
    """The card's text. `provenance` as the sidecar has it, keys with their prefix."""
    facts = {key.removeprefix("abliterated."): value for key, value in provenance.items()}
    base, digest = facts.get("base.name", ""), facts.get("base.digest", "")
    what = "strengthened" if recipe.edit.invert else "removed"
    lines = [
        f"# {name}",
        "",
        f"`{base}`{f' ({digest})' if digest else ''}, with its refusal direction {what} from the weights by",
        f"abliterated {facts.get('version', '')}. Nothing was trained; tokenizer, chat template and configuration are "
        "the base's.",
        "",
        "## Licence",
        "",
        _licence(*licence),
        "",
        "## What was done",
        "",
        f"- Direction: `{facts.get('direction.digest', '')}` (sha256 of its numbers), method "
        f"`{recipe.direction.method}`, rank {facts.get('direction.rank', 1)}.",
        f"- Edited: {len(edited.tensors)} tensors, {edited.coverage:.0%} of those that write to the residual stream; "
        f"norm kept by `{recipe.edit.norm}`, strength {recipe.edit.strength:g}, layers `{recipe.edit.layers}`.",
        f"- Largest share of the direction left in a tensor: {edited.residual:.2%}.",
        f"- Digest of the edited tensors: `{edited.content}`.",
        "",
    ]
    if "refusal_before" in metrics:
        lines += _figures(metrics)
    lines += [
        "## How to undo it",
        "",
        "The edit takes a component out of the weights and does not keep it: these files can't be turned back. The "
        "base is as it was; use it again, and remove this folder. `abliterated.json` names base, recipe and direction.",
        "",
    ]
    return "\n".join(lines)


def _licence(name: str, files: Sequence[str]) -> str:
    """What is known of it, and no more."""
    held = f"its terms lie here as {', '.join(f'`{file}`' for file in files)}" if files else ""
    if name and held:
        return f"The base's, `{name}`; {held}."
    if name:
        return f"The base's, `{name}`; it came without the terms' text."
    if held:
        return f"The base's; {held}."
    return "The base's; it came without one that could be found. Its source says which."


def _figures(metrics: Mapping[str, float]) -> list[str]:
    rows = [
        ("harmful prompts refused", "refusal_before", "refusal_after"),
        ("harmless prompts refused", "false_refusal_before", "false_refusal_after"),
        ("degenerate answers", "degenerate_before", "degenerate_after"),
    ]
    lines = ["## Figures", "", "| | before | after |", "|---|---|---|"]
    lines += [
        f"| {title} | {metrics[before]:.1%} | {metrics[after]:.1%} |"
        for title, before, after in rows
        if before in metrics and after in metrics
    ]
    return [
        *lines,
        "",
        f"{metrics.get('harmful_prompts', 0):.0f} harmful and {metrics.get('harmless_prompts', 0):.0f} harmless "
        f"prompts that were not measured on; {metrics.get('harmless_exact', 0):.1%} of the harmless answers are word "
        f"for word the base's; mean divergence of their first token {metrics.get('kl_mean', 0):.4f} nats.",
        "",
    ]
