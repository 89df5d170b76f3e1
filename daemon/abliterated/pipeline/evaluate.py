"""Before and after: how often a model refuses, and whether harmless answers are what they were.

Greedy answers on prompts that were not measured, and how far a model strays from the original on the original's own
harmless answers: KL and cross-entropy over their first tokens, teacher-forced. Does not know how a model was edited,
nor who judges its answers (`evaluation.py` makes figures of them).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from abliterate.contract.recipe import Evaluate
from abliterated.pipeline.evaluation import compare, kept_answers
from abliterated.pipeline.generation import greedy
from abliterated.pipeline.loading import Loaded
from abliterated.pipeline.passes import Pass, Rows, run_pass
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.rendering import Renderer
from abliterated.pipeline.safe_write import Output
from abliterated.pipeline.suites import Probe
from abliterated.pipeline.watch import Watch

__all__ = ["Answers", "Asked", "ask", "asked_prompts", "compare", "kept_answers", "saved_answers"]

# Tokens of an answer that are compared, its end included where it comes earlier.
KL_TOKENS: Final = 32
# Of a distribution the likeliest so many are kept, and the rest as one: a lower bound of KL, exact for small
# vocabularies, and a thousandth of the size for large ones.
LIKELIEST: Final = 512
# Logits held at once, numbers.
AT_ONCE: Final = 1 << 27

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks: prompts held out first, then those that selected the direction; probes by suite."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    suites: Mapping[str, tuple[Probe, ...]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Expected:
    """What a model expects along its own harmless answers: their tokens, and at each place the likeliest tokens, their
    log probabilities, and that of all others together. Places behind an answer's `lengths` mean nothing."""

    answers: tuple[tuple[int, ...], ...]
    lengths: NDArray[np.int32]  # (prompts,)
    likeliest: NDArray[np.int32]  # (prompts, places, kept)
    logs: Floats  # (prompts, places, kept)
    others: Floats  # (prompts, places)


@dataclass(frozen=True)
class Strayed:
    """How far a model is from the original on the original's answers, by prompt: KL by token, of the first token, and
    the surprise at the original's token."""

    kl: Floats
    first: Floats
    surprise: Floats


@dataclass(frozen=True)
class Answers:
    """What a model answered. `expected`: along its own answers, where it is the original; `strayed`: along the
    original's, where it is compared with one; neither where only an engine's API was there to be asked."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    tokens: int
    suites: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    expected: Expected | None = None
    strayed: Strayed | None = None

    def save(self, path: Path, inputs: str) -> None:
        """Keep them for a run that is interrupted; `inputs` says what they answer."""
        facts: dict[str, Any] = {"inputs": inputs, "harmful": self.harmful, "harmless": self.harmless}
        facts |= {"tokens": self.tokens, "suites": dict(self.suites)}
        arrays: dict[str, NDArray[Any]] = {}
        if self.expected:
            facts["answers"] = self.expected.answers
            arrays |= {name: getattr(self.expected, name) for name in ("lengths", "likeliest", "logs", "others")}
        if self.strayed:
            arrays |= {name: getattr(self.strayed, name) for name in ("kl", "first", "surprise")}
        buffer = io.BytesIO()
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez(buffer, allow_pickle=False, **arrays)
        with Output(path) as output:
            output.write(buffer.getvalue())


def saved_answers(path: Path, inputs: str) -> Answers | None:
    """What an interrupted run kept, if it answers the same."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["inputs"] != inputs:
                return None
            expected = strayed = None
            if "answers" in facts:
                answers = tuple(tuple(answer) for answer in facts["answers"])
                expected = Expected(answers, *(file[name] for name in ("lengths", "likeliest", "logs", "others")))
            if "kl" in file:
                strayed = Strayed(*(file[name] for name in ("kl", "first", "surprise")))
            suites = {name: tuple(told) for name, told in facts["suites"].items()}
            harmful, harmless = tuple(facts["harmful"]), tuple(facts["harmless"])
            return Answers(harmful, harmless, facts["tokens"], suites, expected, strayed)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None  # cut off, or of another making


def asked_prompts(prompts: PromptSets, count: int, suites: Mapping[str, tuple[Probe, ...]] | None = None) -> Asked:
    """At most `count` of each class, none of them measured."""
    harmful = (*prompts.harmful.held_out, *prompts.harmful.validation)
    harmless = (*prompts.harmless.held_out, *prompts.harmless.validation)
    return Asked(harmful[:count], harmless[:count], suites or {})


def ask(
    loaded: Loaded,
    renderer: Renderer,
    asked: Asked,
    evaluate: Evaluate,
    watch: Watch,
    whom: str,
    original: Answers | None = None,
) -> Answers:
    """Ask everything, greedily. With an `original`, see how far this model strays from it; without, it is one."""
    harmful, harmless = renderer.all_tokens(asked.harmful), renderer.all_tokens(asked.harmless)
    probes = [renderer.conversation(probe.messages) for some in asked.suites.values() for probe in some]
    found = greedy(loaded, [*harmful, *harmless, *probes], evaluate.tokens, watch, f"asking {whom}")
    texts = [loaded.tokenizer.decode(answer, skip_special_tokens=True) for answer in found]
    one, two = len(harmful), len(harmful) + len(harmless)
    told, place = {}, two
    for name, some in asked.suites.items():
        told[name] = tuple(texts[place : place + len(some)])
        place += len(some)
    count = sum(len(answer) for answer in found)
    made = Answers(tuple(texts[:one]), tuple(texts[one:two]), count, told)
    if not harmless:
        return made
    if original is None:
        expected = expect(loaded, harmless, found[one:two], watch, whom)
        return Answers(made.harmful, made.harmless, count, told, expected)
    if original.expected is None:
        return made
    strayed = stray(loaded, harmless, original.expected, watch, whom)
    return Answers(made.harmful, made.harmless, count, told, None, strayed)


def expect(loaded: Loaded, prompts: Rows, answers: Rows, watch: Watch, whom: str) -> Expected:
    """What the model expects at each of the first tokens of these answers to these prompts."""
    begun = tuple(tuple(answer[: KL_TOKENS - 1]) for answer in answers)
    rows = [row + answer for row, answer in zip(prompts, begun, strict=True)]
    lengths = np.array([len(answer) + 1 for answer in begun], dtype=np.int32)
    kept: dict[int, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}
    for numbers, logits in _tails(loaded, rows, int(lengths.max()), watch, f"reading what {whom} expects"):
        best = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)
        rest = _rest(best.values)
        for line, row in enumerate(numbers):
            parts = (best.indices[line].int(), best.values[line].float(), rest[line].float())
            kept[row] = (parts[0].cpu().numpy(), parts[1].cpu().numpy(), parts[2].cpu().numpy())
    stacked = [np.stack([kept[row][part] for row in range(len(rows))]) for part in range(3)]
    return Expected(begun, lengths, *stacked)


def stray(loaded: Loaded, prompts: Rows, expected: Expected, watch: Watch, whom: str) -> Strayed:
    """How far the model is from what the original expected along its answers."""
    rows = [row + answer for row, answer in zip(prompts, expected.answers, strict=True)]
    found: NDArray[np.float32] = np.zeros((3, len(rows)), dtype=np.float32)
    message = f"comparing {whom} with the original"
    for numbers, logits in _tails(loaded, rows, int(expected.lengths.max()), watch, message):
        for line, row in enumerate(numbers):
            places = int(expected.lengths[row])
            found[:, row] = _strayed(logits[line, -places:], expected, row, places)
    return Strayed(*found)


def _strayed(now: torch.Tensor, expected: Expected, row: int, places: int) -> tuple[float, float, float]:
    """KL by token, of the first, and surprise, from log probabilities (places, vocabulary)."""
    # Rows end alike, so what belongs to an answer is its last places.
    likeliest = torch.from_numpy(expected.likeliest[row, -places:]).to(now.device).long()
    logs = torch.from_numpy(expected.logs[row, -places:]).to(now.device).double()
    others = torch.from_numpy(expected.others[row, -places:]).to(now.device).double()
    here = now.gather(1, likeliest)
    parts = (logs.exp() * (logs - here.double())).sum(-1) + others.exp() * (others - _rest(here))
    parts = parts.clamp(min=0.0)
    return float(parts.mean()), float(parts[0]), float(-here[:, 0].mean())


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """The log probability of everything but these."""
    return torch.log1p(-logs.double().exp().sum(-1).clamp(max=1.0 - 1e-9))


def _tails(
    loaded: Loaded, rows: Rows, tail: int, watch: Watch, message: str
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Rows and their log probabilities (rows, tail, vocabulary), few at a time: they are the largest thing there is."""
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    # A streamed model reads its weights for every pass, so there it is one.
    together = len(rows) if loaded.engine is not None else max(1, AT_ONCE // (tail * vocabulary))
    for start in range(0, len(rows), together):
        asked = Pass(rows[start : start + together], tail=tail)
        for part in run_pass(loaded, asked, watch, message, (start, len(rows))):
            assert part.logits is not None
            yield [start + row for row in part.rows], torch.log_softmax(part.logits, dim=-1)
