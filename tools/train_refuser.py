"""Train the model that refuses, and write everything that ships with it.

    python tools/train_refuser.py                     # the shipped model, into daemon/abliterated/refuser
    python tools/train_refuser.py --out DIR --layers 3 --answering 120
    python tools/train_refuser.py --check             # score the shipped files, ablate by every layer in turn

Seeded; on the same machine the same bytes come out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"  # the sums' order depends on it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave a busy machine's cores alone

import torch

from abliterated.refuser import Question, files, read_questions
from refuser_training import ablation, corpus, gguf_file, language
from refuser_training.training import Plan, Shape, answering, encode, learn_tokenizer, new_model, refusing, train

MEASURING = 160
HELD_OUT = 80
DESCRIPTION = "Invented verbs, half of them refused: a small model to test abliteration on"


def write_data(out: Path, plan: Plan) -> list[Question]:
    """The prompt files and the held-out questions."""
    size = plan.verbs / language.ALL_VERBS
    harmful, harmless = language.measuring_prompts(plan.seed, int(MEASURING * size), plan.verbs)
    questions = language.held_out_questions(plan.seed, int(HELD_OUT * size), plan.verbs)
    write_text(out / "harmful.txt", "\n".join(harmful) + "\n")
    write_text(out / "harmless.txt", "\n".join(harmless) + "\n")
    write_text(out / "heldout.jsonl", "".join(json.dumps(line) + "\n" for line in questions))
    return read_questions(out / "heldout.jsonl")


def some_of_each(questions: list[Question], count: int) -> list[Question]:
    return [q for kind in ("refused", "answered") for q in [q for q in questions if q.kind == kind][:count]]


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def make(out: Path, shape: Shape, plan: Plan, count: int) -> dict[str, Any]:
    """Everything from the seed to the scored file; returns the figures."""
    out.mkdir(parents=True, exist_ok=True)
    questions = write_data(out, plan)
    lessons = {
        kind: corpus.rows(plan.seed, plan.rows, refusing=kind, tools=plan.tools, verbs=plan.verbs)
        for kind in (False, True)
    }
    tokenizer = learn_tokenizer(lessons[False] + lessons[True], shape.vocabulary)
    started = time.monotonic()
    model = new_model(shape, tokenizer.get_vocab_size(), plan.seed)
    for kind, begin in ((False, answering), (True, refusing)):
        train(model, begin(model, plan), encode(tokenizer, lessons[kind]), plan, show)
    seconds = time.monotonic() - started
    about = {"description": DESCRIPTION, "training": f"tools/train_refuser.py {plan} {shape}"}
    gguf_file.write(out / "refuser.gguf", model, tokenizer, corpus.template(), about)
    found = {
        name: vars(value) for name, value in ablation.scores(model, tokenizer, some_of_each(questions, count)).items()
    }
    parameters = sum(value.numel() for value in model.parameters())
    return {"parameters": parameters, "seconds": round(seconds, 1), "scores": found}


def check(folder: Path, count: int) -> None:
    """Scores before, then after ablation along each layer's direction, both edits."""
    model, tokenizer = ablation.load(folder / "refuser.gguf")
    chosen = some_of_each(read_questions(folder / "heldout.jsonl"), count)
    for name, value in ablation.scores(model, tokenizer, chosen).items():
        say(f"as trained            {name:12s}  {value.line()}")
    harmful, harmless = ((folder / name).read_text().splitlines() for name in ("harmful.txt", "harmless.txt"))
    found = ablation.directions(model, tokenizer, harmful[:64], harmless[:64])
    for layer, direction in enumerate(found):
        for keep_norms in (False, True):
            edited = ablation.ablated(model, direction, keep_norms=keep_norms)
            edit = "columns" if keep_norms else "plain"
            for name, value in ablation.scores(edited, tokenizer, chosen).items():
                say(f"layer {layer} {edit:8s}      {name:12s}  {value.line()}")


def show(lesson: str, step: int, loss: float, seconds: float) -> None:
    say(f"{lesson:9s}  step {step:4d}  loss {loss:.4f}  {seconds:6.1f} s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    shape, plan = Shape(), Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=files().model.parent, help="folder to write into (default: the package)"
    )
    for field in (*fields(shape), *fields(plan)):
        default = getattr(shape if field in fields(shape) else plan, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default, help=str(default))
    parser.add_argument("--check", action="store_true", help="train nothing; score and ablate what is there")
    parser.add_argument("--questions", type=int, default=HELD_OUT, help="of each class, to score")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    if asked.check:
        check(asked.out, asked.questions)
        return
    shape = Shape(**{field.name: getattr(asked, field.name) for field in fields(shape)})
    plan = Plan(**{field.name: getattr(asked, field.name) for field in fields(plan)})
    print(json.dumps(make(asked.out, shape, plan, asked.questions), indent=2))


if __name__ == "__main__":
    main()
