"""The figures of an evaluation: from two models' answers and their verdicts to numbers by name. Pure.

Does not know models, prompts' meaning, or who gave the verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.contract.report import Suite
from abliterated.pipeline.refusals import Verdict, verdict, wilson

if TYPE_CHECKING:
    from abliterated.pipeline.evaluate import Answers, Asked
    from abliterated.pipeline.suites import Probe


@dataclass(frozen=True)
class Verdicts:
    """What each answer is, by class."""

    harmful: tuple[Verdict, ...]
    harmless: tuple[Verdict, ...]


def by_wording(answers: Answers) -> Verdicts:
    """The verdicts that the answers' wording gives."""
    return Verdicts(tuple(map(verdict, answers.harmful)), tuple(map(verdict, answers.harmless)))


def compare(before: Answers, after: Answers, judged: tuple[Verdicts, Verdicts] | None = None) -> dict[str, float]:
    """The figures of both, rounded, by name; `judged`: where somebody else gave the verdicts."""
    verdicts = judged or (by_wording(before), by_wording(after))
    figures: dict[str, float] = {"harmful_prompts": len(before.harmful), "harmless_prompts": len(before.harmless)}
    for name, found in zip(("before", "after"), verdicts, strict=True):
        figures |= {f"{key}_{name}{end}": value for (key, end), value in rates(found).items()}
    same = [old == new for old, new in zip(before.harmless, after.harmless, strict=True)]
    if same:
        figures["harmless_exact"] = sum(same) / len(same)
    figures |= closeness(before, after)
    figures["tokens_decoded"] = before.tokens + after.tokens
    return {name: round(float(value), 4 if abs(value) >= 1e-3 else 7) for name, value in figures.items()}


def rates(found: Verdicts) -> dict[tuple[str, str], float]:
    """Refusals with their interval, false ones too, and what is no answer at all, by (name, end of the name)."""
    figures: dict[tuple[str, str], float] = {}
    for key, some in (("refusal", found.harmful), ("false_refusal", found.harmless)):
        refused = some.count("refusal")
        low, high = wilson(refused, len(some))
        figures |= {(key, ""): refused / max(1, len(some)), (key, "_low"): low, (key, "_high"): high}
    everything = (*found.harmful, *found.harmless)
    for kind in ("degenerate", "empty"):
        figures[kind, ""] = everything.count(kind) / max(1, len(everything))
    return figures


def closeness(before: Answers, after: Answers) -> dict[str, float]:
    """KL and cross-entropy along the original's harmless answers; nothing where they were not read."""
    strayed, expected = after.strayed, before.expected
    if strayed is None or expected is None:
        return {}
    own = [-float(logs[-places:, 0].mean()) for logs, places in zip(expected.logs, expected.lengths, strict=True)]
    kl = strayed.kl.astype(np.float64)
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_max": float(kl.max()),
        "kl_first": float(strayed.first.mean()),
        "kl_tokens": float(expected.lengths.max()),
        "cross_entropy_before": sum(own) / len(own),
        "cross_entropy_after": float(strayed.surprise.mean()),
    }


def suite_figures(asked: Mapping[str, tuple[Probe, ...]], before: Answers, after: Answers | None) -> list[Suite]:
    """How many probes of each suite were caught, before and after."""
    found = []
    for name, probes in asked.items():
        counts = [_caught(probes, answers.suites.get(name) if answers else None) for answers in (before, after)]
        found.append(Suite(name=name, counted=probes[0].counted, total=len(probes), before=counts[0], after=counts[1]))
    return found


def _caught(probes: Sequence[Probe], answers: Sequence[str] | None) -> int | None:
    if answers is None:
        return None
    return sum(probe.caught(answer) for probe, answer in zip(probes, answers, strict=True))


def kept_answers(asked: Asked, before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Every prompt with both answers and verdicts: only where the recipe asks for it."""
    rows = []
    for kind in ("harmful", "harmless"):
        for prompt, old, new in zip(getattr(asked, kind), getattr(before, kind), getattr(after, kind), strict=True):
            rows.append(
                {"class": kind, "prompt": prompt, "before": old, "after": new, "verdicts": [verdict(old), verdict(new)]}
            )
    for name, probes in asked.suites.items():
        for probe, old, new in zip(probes, before.suites[name], after.suites[name], strict=True):
            caught = [probe.caught(old), probe.caught(new)]
            prompt = probe.messages[-1]["content"]
            rows.append({"class": name, "prompt": prompt, "before": old, "after": new, "caught": caught})
    return rows
