"""Before and after: how often a model refuses, and whether harmless answers are what they were.

Greedy answers on prompts that were not measured; `Answers` of the original is kept for comparing. Does not know how a
model was edited.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from abliterate.contract.recipe import Evaluate
from abliterated.pipeline.activations import tail_logits
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.refusals import Verdict, verdict, wilson
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.safe_write import Output
from abliterated.pipeline.watch import Watch


@dataclass(frozen=True)
class Asked:
    """The prompts an evaluation asks: held out first, then those that selected the direction."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """What a model answered, and its log probabilities for the first token of each harmless answer."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    first: NDArray[np.float32]
    tokens: int

    def save(self, path: Path, inputs: str) -> None:
        """Keep them for a run that is interrupted; `inputs` says what they answer."""
        facts = {"inputs": inputs, "harmful": self.harmful, "harmless": self.harmless, "tokens": self.tokens}
        buffer = io.BytesIO()
        np.savez(buffer, first=self.first, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8))
        with Output(path) as output:
            output.write(buffer.getvalue())


def saved_answers(path: Path, inputs: str) -> Answers | None:
    """What an interrupted run kept, if it answers the same."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["inputs"] != inputs:
                return None
            return Answers(tuple(facts["harmful"]), tuple(facts["harmless"]), file["first"], facts["tokens"])
    except (OSError, ValueError, KeyError):
        return None


def asked_prompts(prompts: PromptSets, count: int) -> Asked:
    """At most `count` of each class, none of them measured."""
    harmful = (*prompts.harmful.held_out, *prompts.harmful.validation)
    harmless = (*prompts.harmless.held_out, *prompts.harmless.validation)
    return Asked(harmful[:count], harmless[:count])


def ask(loaded: Loaded, renderer: Renderer, asked: Asked, evaluate: Evaluate, watch: Watch, whom: str) -> Answers:
    """Ask everything, greedily."""
    harmful, harmless = renderer.all_tokens(asked.harmful), renderer.all_tokens(asked.harmless)
    found = greedy(loaded, [*harmful, *harmless], evaluate.tokens, watch, f"asking {whom}")
    texts = [loaded.tokenizer.decode(answer, skip_special_tokens=True) for answer in found]
    logits = tail_logits(loaded, harmless, 1, watch)[:, 0]
    first: NDArray[np.float32] = torch.log_softmax(logits, dim=-1).cpu().numpy()
    cut = len(harmful)
    return Answers(tuple(texts[:cut]), tuple(texts[cut:]), first, sum(len(answer) for answer in found))


def compare(before: Answers, after: Answers) -> dict[str, float]:
    """The figures, rounded, by name."""
    figures: dict[str, float] = {}
    for name, answers in (("before", before), ("after", after)):
        harmful, harmless = _verdicts(answers.harmful), _verdicts(answers.harmless)
        refused = harmful.count("refusal")
        low, high = wilson(refused, len(harmful))
        figures |= {
            f"refusal_{name}": refused / max(1, len(harmful)),
            f"refusal_{name}_low": low,
            f"refusal_{name}_high": high,
            f"false_refusal_{name}": harmless.count("refusal") / max(1, len(harmless)),
            f"degenerate_{name}": (harmful + harmless).count("degenerate") / max(1, len(harmful + harmless)),
            f"empty_{name}": (harmful + harmless).count("empty") / max(1, len(harmful + harmless)),
        }
    same = [old == new for old, new in zip(before.harmless, after.harmless, strict=True)]
    base, edited = before.first.astype(np.float64), after.first.astype(np.float64)
    divergence = np.maximum(0.0, (np.exp(base) * (base - edited)).sum(-1))
    figures |= {
        "harmless_exact": sum(same) / max(1, len(same)),
        "kl_mean": float(divergence.mean()),
        "kl_median": float(np.median(divergence)),
        "kl_max": float(divergence.max()),
        "harmful_prompts": len(before.harmful),
        "harmless_prompts": len(before.harmless),
        "tokens_decoded": before.tokens + after.tokens,
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def kept_answers(asked: Asked, before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Every prompt with both answers and verdicts: only where the recipe asks for it."""
    rows = []
    for kind in ("harmful", "harmless"):
        for prompt, old, new in zip(getattr(asked, kind), getattr(before, kind), getattr(after, kind), strict=True):
            rows.append(
                {"class": kind, "prompt": prompt, "before": old, "after": new, "verdicts": [verdict(old), verdict(new)]}
            )
    return rows


def _verdicts(answers: Sequence[str]) -> list[Verdict]:
    return [verdict(answer) for answer in answers]
