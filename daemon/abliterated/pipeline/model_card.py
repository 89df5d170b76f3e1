"""The words that travel with an edited model: `MODEL_CARD.md`, what it is, of what, how it was made and undone; in an
edited folder, or beside a GGUF.

Pure and deterministic: values in, Markdown out. Does not know tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from abliterate.contract.recipe import Recipe
from abliterate.contract.report import PromptSource
from abliterated.pipeline.edit_report import EditReport
from abliterated.pipeline.gguf_file import read_gguf
from abliterated.pipeline.provenance import PREFIX

CARD_FILE: Final = "MODEL_CARD.md"
_LICENCE: Final = re.compile(r"(licen[cs]e|notice|copying|use_policy|usage_policy)", re.I)
_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.S)
_PLAIN: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
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


def gguf_sidecar(product: Path) -> dict[str, Any]:
    """What a GGUF, or the first part of a split one, says of its own making."""
    first = min(product.glob("*.gguf")) if product.is_dir() else product
    return {key: value for key, value in read_gguf(first).values.items() if key.startswith(PREFIX)}


def model_card(
    name: str,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    edited: EditReport,
    metrics: Mapping[str, float],
    licence: tuple[str, Sequence[str]],
    prompts: Sequence[PromptSource] = (),
) -> str:
    """The card's text. `provenance` as the sidecar has it, keys with their prefix."""
    facts = {key.removeprefix(PREFIX): value for key, value in provenance.items()}
    gguf = name.endswith(".gguf")
    base, digest = facts.get("base.name", ""), facts.get("base.digest", "")
    what = "strengthened" if recipe.edit.invert else "removed"
    lines = [
        *_front(base, licence[0]),
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
        f"- Edited: {len(edited.tensors)} tensors, {edited.coverage:.0%} of those{_chosen(facts)} that write to the "
        "residual stream; "
        f"norm kept by `{recipe.edit.norm}`, {_strength(recipe, facts)}, layers `{recipe.edit.layers}`.",
        f"- Largest share of the direction left in a tensor: {edited.residual:.2%}; by rounding alone: "
        f"{edited.rounding:.2%}.",
        f"- Digest of the edited tensors: `{edited.content}`.",
        "",
    ]
    if "refusal_before" in metrics:
        lines += _figures(metrics)
    if prompts:
        lines += _prompts(prompts)
    lines += [
        "## Before you use it",
        "",
        "It declines less than its base does, and nothing else was made better: what it says may be wrong, unfair or "
        "harmful. Whoever serves it answers for what it is used for. The figures are over the prompts named here and "
        "say nothing about others; read some answers yourself.",
        "",
    ]
    lines += [
        "## How to undo it",
        "",
        "The edit takes a component out of the weights and does not keep it: these files can't be turned back. The "
        "base is as it was; use it again, and remove this. "
        f"{'The key-values of the GGUF name' if gguf else '`abliterated.json` names'} base, recipe and direction.",
        "",
    ]
    return "\n".join(lines)


def _strength(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """How strongly it was edited: by layer, where a search or a kernel had it so."""
    told = []
    for name, title in (("attention", "attention"), ("mlp", "MLP")):
        values = facts.get(f"edit.strength.{name}") or [recipe.edit.strength]
        low, high = (f"{value:.3g}" for value in (min(values), max(values)))
        told.append(f"{title} {low}" if low == high else f"{title} {low} to {high} by layer")
    return f"strength: {', '.join(told)}"


def _chosen(facts: Mapping[str, Any]) -> str:
    """A word where some were to be left as they are."""
    every = [value for name in ("attention", "mlp") for value in facts.get(f"edit.strength.{name}") or [1.0]]
    return "" if all(every) else " chosen"


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


def _front(base: str, licence: str) -> list[str]:
    """What a hub reads: licence, base, tags. Only names a hub knows are named."""
    lines = ["---"]
    if _PLAIN.fullmatch(licence):
        lines.append(f"license: {licence.lower()}")
    repository = base.removeprefix("hf:").partition("@")[0]
    if base.startswith("hf:") and _PLAIN.fullmatch(repository.replace("/", "", 1)):
        lines += [f"base_model: {repository}", "base_model_relation: finetune"]
    return [*lines, "tags:", "- abliterated", "pipeline_tag: text-generation", "---", ""]


def _figures(metrics: Mapping[str, float]) -> list[str]:
    rows = [
        ("harmful prompts refused", "refusal"),
        ("harmless prompts refused", "false_refusal"),
        ("answers that run in circles", "degenerate"),
        ("empty answers", "empty"),
    ]
    lines = ["## Figures", "", "| | before | after |", "|---|---|---|"]
    lines += [
        f"| {title} | {_rate(metrics, f'{key}_before')} | {_rate(metrics, f'{key}_after')} |"
        for title, key in rows
        if f"{key}_before" in metrics and f"{key}_after" in metrics
    ]
    told = (
        f"{metrics.get('harmful_prompts', 0):.0f} harmful and {metrics.get('harmless_prompts', 0):.0f} harmless "
        "prompts that were not measured on, answered greedily; in brackets the 95 % Wilson interval."
    )
    if "harmless_exact" in metrics:
        told += f" {metrics['harmless_exact']:.1%} of the harmless answers are word for word the base's."
    if "kl_mean" in metrics:
        places = metrics.get("kl_tokens", 0)
        told += (
            f" Along the base's own harmless answers, at most {places:.0f} tokens of each, the divergence (KL) is "
            f"{metrics['kl_mean']:.4f} nats a token in the mean, {metrics.get('kl_max', 0):.4f} for the worst prompt."
        )
    return [*lines, "", told, ""]


def _rate(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    between = f" ({low:.0%}–{high:.0%})" if low is not None and high is not None else ""
    return f"{metrics[key]:.1%}{between}"


def _prompts(prompts: Sequence[PromptSource]) -> list[str]:
    rows = [f"| {one.kind} | {_source(one.name)} | {one.count} | {one.licence or 'not named'} |" for one in prompts]
    return ["## Prompts", "", "| class | source | prompts | licence |", "|---|---|---|---|", *rows, ""]


def _source(name: str) -> str:
    """A file's name is nobody's business where the card goes."""
    named = name == "builtin" or name.startswith("hf:")
    return f"`{name.replace('`', '').replace('|', '/')}`" if named else "a file"
