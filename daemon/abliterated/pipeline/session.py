"""What needs the model in memory: finding the direction, and asking before and after. The only way from the recipe's
story to torch, so a run with a direction from a file and no evaluation never imports it.

Keeps what it found in the work folder, so that an interrupted run need not find it again. Does not know edits.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from abliterate import __version__
from abliterate.contract.errors import ModelError
from abliterate.contract.messages import Task
from abliterate.contract.report import LayerSeparation
from abliterated.pipeline.direction_files import read_direction, write_direction
from abliterated.pipeline.directions import RefusalDirection
from abliterated.pipeline.kept import fingerprint
from abliterated.pipeline.prompts import PromptSets
from abliterated.pipeline.source import Source, open_source
from abliterated.pipeline.watch import Watch

if TYPE_CHECKING:
    from abliterated.pipeline.choose import Choice
    from abliterated.pipeline.evaluate import Answers, Asked
    from abliterated.pipeline.loading import Loaded
    from abliterated.pipeline.rendering import Renderer
    from abliterated.pipeline.search import Searched

# Validation prompts that a finalist of the search must answer once written.
VERIFIED = 16
DIRECTION = "direction.safetensors"
BASELINE = "baseline.npz"


@dataclass(frozen=True)
class Found:
    """A direction with what it was chosen from."""

    direction: RefusalDirection
    candidates: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    separation: tuple[LayerSeparation, ...] = ()


class Session:
    """One model, loaded when first needed and let go by `close`."""

    def __init__(self, task: Task, source: Source, prompts: PromptSets, watch: Watch) -> None:
        self.task, self.source, self.prompts, self.watch = task, source, prompts, watch
        self.work = Path(task.work)
        self._loaded: Loaded | None = None
        self._choice: Choice | None = None
        self._product: Path | None = None  # what is loaded, where it is not the original

    def close(self) -> None:
        """Give the memory back."""
        if self._loaded is None:
            return
        import torch

        self._loaded = self._choice = self._product = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def direction(self) -> Found:
        """The direction the recipe asks for, found now or by an earlier attempt at the same."""
        inputs = self._inputs("direction")
        if (kept := self._kept(inputs)) is not None:
            return kept
        loaded, renderer = self._open()
        from abliterated.pipeline.choose import find_direction
        from abliterated.pipeline.separation import separation

        with self.watch.stage("direction"):
            choice = find_direction(loaded, renderer, self.prompts, self.task.recipe, self.watch)
            self._choice = choice
            candidates = tuple(_plain(asdict(candidate)) for candidate in choice.candidates)
            drawn = separation(loaded, renderer, self.prompts, choice.direction, self.watch)
            facts = {
                "inputs": inputs,
                "origin": dict(choice.direction.origin),
                "candidates": candidates,
                "separation": msgspec.to_builtins(drawn),
                "notes": [*loaded.notes, *choice.notes],
            }
            write_direction(self.work / DIRECTION, choice.direction, facts)
            return Found(choice.direction, candidates, (*loaded.notes, *choice.notes), drawn)

    def search(self, chosen: RefusalDirection) -> Searched:
        """Strengths by layer, and a direction to go with them, found now or by an earlier attempt at the same."""
        from abliterated.pipeline.search_stage import kept_search, search

        recipe = self.task.recipe
        inputs = self._inputs("search", recipe.search, recipe.edit, chosen.digest())
        if (kept := kept_search(self.work, inputs, self.source.hidden_size, self.source.layers)) is not None:
            return kept
        loaded, renderer = self._open()
        if self._choice is None and recipe.direction.method != "file":
            from abliterated.pipeline.choose import find_direction

            with self.watch.stage("direction"):
                self._choice = find_direction(loaded, renderer, self.prompts, recipe, self.watch)
        with self.watch.stage("search"):
            place = self.work, inputs
            return search(loaded, renderer, self.prompts, recipe, self._choice, chosen, place, self.watch)

    def refuses(self, product: Path) -> float:
        """The share of some validation prompts that the written model refuses, by its greedy answers."""
        from abliterated.pipeline.generation import greedy
        from abliterated.pipeline.refusals import verdict

        self.close()  # what lies there now may be another finalist's
        with self.watch.stage("search"):
            loaded, renderer = self._reopened(product)
            rows = renderer.all_tokens(self.prompts.harmful.validation[:VERIFIED])
            answers = greedy(loaded, rows, self.task.recipe.evaluate.tokens, self.watch, "asking what was written")
            verdicts = [verdict(loaded.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
            return round(sum(one != "answer" for one in verdicts) / max(1, len(verdicts)), 4)

    def before(self) -> Answers:
        """What the original answers, asked now or by an earlier attempt at the same."""
        from abliterated.pipeline.evaluate import ask, saved_answers

        inputs, evaluate = self._inputs("baseline"), self.task.recipe.evaluate
        if (kept := saved_answers(self.work / BASELINE, inputs)) is not None:
            return kept
        loaded, renderer = self._open()
        with self.watch.stage("evaluate"):
            answers = ask(loaded, renderer, self.asked(), evaluate, self.watch, "the original")
            answers.save(self.work / BASELINE, inputs)
            return answers

    def asked(self) -> Asked:
        """What both are asked."""
        from abliterated.pipeline.evaluate import asked_prompts
        from abliterated.pipeline.suites import read_suites

        evaluate = self.task.recipe.evaluate
        return asked_prompts(self.prompts, evaluate.prompts, read_suites(evaluate.suites))

    def after(self, product: Path, original: Answers | None = None) -> Answers:
        """What the written model answers, read again from its file, and how far it strays from the original."""
        from abliterated.pipeline.evaluate import ask

        with self.watch.stage("evaluate"):
            evaluate = self.task.recipe.evaluate
            loaded, rendering = self._reopened(product)
            return ask(loaded, rendering, self.asked(), evaluate, self.watch, "the edited model", original)

    def _open(self) -> tuple[Loaded, Renderer]:
        with self.watch.stage("load"):
            from abliterated.pipeline.loading import load
            from abliterated.pipeline.rendering import renderer

            if self._loaded is None:
                self._loaded = load(self.source, self.task.recipe.run, self.watch)
            return self._loaded, renderer(self._loaded.tokenizer, self.source.context, self.prompts.system)

    def _reopened(self, product: Path) -> tuple[Loaded, Renderer]:
        """The written model in memory, read from its file, in place of whatever was there."""
        from abliterated.pipeline.loading import load
        from abliterated.pipeline.rendering import renderer

        source = open_source(product)
        if self._loaded is None or self._product != product:
            self.close()
            self._loaded = load(source, self.task.recipe.run, self.watch)
            self._product = product
        return self._loaded, renderer(self._loaded.tokenizer, source.context, self.prompts.system)

    def _inputs(self, stage: str, *more: Any) -> str:
        """sha256 (hex) of everything the stage's outcome depends on."""
        recipe = self.task.recipe
        # Of a folder every file counts, templates too: its own time stays where one of them is written over.
        path = self.source.path
        files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else self.source.parts
        base = self.task.base_digest or str([fingerprint(one) for one in files])
        content = hashlib.sha256(f"{stage} {__version__} {base} {self.prompts.digest()}\n".encode())
        parts = [recipe.run] + ([recipe.evaluate] if stage == "baseline" else [recipe.direction, recipe.edit.invert])
        for part in [*parts, *more]:
            content.update(msgspec.json.encode(part) + b"\n")
        return content.hexdigest()

    def _kept(self, inputs: str) -> Found | None:
        path = self.work / DIRECTION
        try:
            facts = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
            if facts["inputs"] != inputs:
                return None
            found = read_direction(path, self.source.hidden_size, self.source.layers)
            if found.digest() != facts["digest"]:
                return None
        except (OSError, ValueError, KeyError, ModelError):
            return None
        kept = RefusalDirection(found.vectors, found.per_layer, facts["origin"])
        drawn = msgspec.convert(facts.get("separation", []), tuple[LayerSeparation, ...])
        return Found(kept, tuple(facts["candidates"]), tuple(facts["notes"]), drawn)


def _plain(candidate: dict[str, Any]) -> dict[str, Any]:
    """Without what was not scored, and rounded."""
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in candidate.items()
        if value == value
    }
