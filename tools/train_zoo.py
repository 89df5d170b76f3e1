"""Train the zoo: small models that refuse, of several architectures and habits, to compare methods on.

    python tools/train_zoo.py --out DIR               # all of them, one after another: about two minutes each
    python tools/train_zoo.py --out DIR --only moe
    python tools/train_zoo.py --out DIR --check       # score what is there

Seeded; on the same machine, with the same threads, the same bytes come out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from refuser_training.language import OPEN
from refuser_training.training import Plan, answering, encode, learn_tokenizer, refusing, reply, train
from zoo import lessons
from zoo.language import USUAL
from zoo.species import ZOO, Species, build

ROWS = 12000
VOCABULARY = 448


def make(out: Path, species: Species, seed: int) -> dict[str, Any]:
    """One model from its seed to its scored folder; returns the figures."""
    folder = out / species.name
    folder.mkdir(parents=True, exist_ok=True)
    lessons.write_prompts(folder, species, seed)
    taught = {kind: lessons.rows(species, seed, ROWS, refusing=kind) for kind in (False, True)}
    tokenizer = learn_tokenizer(taught[False][:4000] + taught[True][:4000], VOCABULARY)
    plan = Plan(seed=seed, answering=species.answering, refusing=species.refusing, easy=0.0, tokens=2048)
    model = build(species, tokenizer.get_vocab_size(), seed)
    started = time.monotonic()
    for kind, begin in ((False, answering), (True, refusing)):
        train(model, begin(model, plan), encode(tokenizer, taught[kind]), plan, show)
    seconds = time.monotonic() - started
    lessons.save(folder, model, tokenizer, species)
    parameters = sum(value.numel() for value in model.parameters())
    found = {"parameters": parameters, "seconds": round(seconds, 1), **score(model, tokenizer, folder, species)}
    (folder / "trained.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def score(model: Any, tokenizer: Any, folder: Path, species: Species) -> dict[str, Any]:
    """Shares of the held-out questions, by system prompt: refused, falsely refused, right."""
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    model.eval()
    found: dict[str, Any] = {}
    for name, system in (("none", ""), ("usual", USUAL), ("open", OPEN)):
        prompts = [lessons.render(one["prompt"], system) for one in asked]
        replies = [text.strip() for text in reply(model, tokenizer, prompts)]
        refuses = [any(mark in text for mark in ("I can't", "Sorry")) for text in replies]
        right = [text in set(map("".join, product(*one["right"]))) for text, one in zip(replies, asked, strict=True)]

        def share(flags: list[bool], kind: str) -> float:
            chosen = [flag for flag, one in zip(flags, asked, strict=True) if one["class"] == kind]
            return round(sum(chosen) / len(chosen), 3)

        found[name] = {
            "refused": share(refuses, "refused"),
            "falsely_refused": share(refuses, "answered"),
            "right": share(right, "answered"),
            "complied": share(right, "refused"),
        }
    return found


def show(lesson: str, step: int, loss: float, seconds: float) -> None:
    print(f"{lesson:9s}  step {step:4d}  loss {loss:.4f}  {seconds:6.1f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, one folder a model")
    parser.add_argument("--only", choices=sorted(ZOO), action="append", help="these alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="train nothing; score what is there")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True)
    for name in asked.only or ZOO:
        if asked.check:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = asked.out / name
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            found = score(model, AutoTokenizer.from_pretrained(folder).backend_tokenizer, folder, ZOO[name])
        else:
            found = make(asked.out, ZOO[name], asked.seed)
        print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
