"""`abliterated evaluate`: how often any model refuses, alone or beside another, in the foreground."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.contract.errors import DiskError, ModelError, NotFound, RecipeError
from abliterate.contract.messages import Progress

if TYPE_CHECKING:
    from abliterated.pipeline.evaluate_alone import Evaluated, Questions, Subject
    from abliterated.pipeline.served import Served
    from abliterated.pipeline.source import Source

HELP = "count how often any model refuses, alone or beside another"
EXAMPLES = """\
examples:
  abliterated evaluate qwen3:8b
  abliterated evaluate qwen3-abliterated:8b --against qwen3:8b
  abliterated evaluate ./result/model.gguf --against ./base.gguf --json
  abliterated evaluate llama3:8b --served --judge qwen3:14b --suite over-refusal

MODEL is a name in Ollama, a .gguf, or a folder with safetensors. A name is read from Ollama's own file where that is
here and can be; elsewhere, and with --served, Ollama is asked, one prompt at a time, and no KL is told. Prompts are
drawn as a recipe draws them: those it would not measure come first. Answers are kept nowhere unless --answers says so.
--json prints refusal_count, total, refusal_rate (ollama-forge's keys) and more.
exit codes: 0 done; 2 an option is wrong; 3 the model can't be used; 4 a file can't be written; 7 no such model;
75 Ollama is away; 86 stopped."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name in Ollama, a .gguf, or a folder with safetensors")
    parser.add_argument("--against", metavar="BASE", help="the original, to compare answers and KL with")
    parser.add_argument("--harmful", action="append", metavar="SOURCE", help="prompts, as in a recipe; repeatable")
    parser.add_argument("--harmless", action="append", metavar="SOURCE", help="the same, for prompts anybody answers")
    parser.add_argument(
        "--prompts", "--num-prompts", type=int, default=50, metavar="N", help="of each class (default 50)"
    )
    parser.add_argument(
        "--tokens", "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="probes beside; repeatable")
    parser.add_argument("--judge", default="", metavar="MODEL", help="a model in Ollama that reads the answers")
    parser.add_argument("--refusal-markers", type=Path, metavar="FILE", help="openings that are refusals too, by line")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="write prompts, answers and verdicts there (JSONL)"
    )
    parser.add_argument("--history", type=Path, metavar="FILE", help="append the figures there as a line of JSON")
    parser.add_argument("--served", action="store_true", help="ask Ollama even where the files are here")
    parser.add_argument("--host", default="", metavar="H:P", help="Ollama's address (default $OLLAMA_HOST)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:N], mps")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    if options.prompts < 1 or options.tokens < 1:
        raise RecipeError("--prompts and --tokens count from 1", remedy="Give a positive number")
    for path, option in ((options.answers, "--answers"), (options.history, "--history")):
        if path is not None and not _may_write(path):
            raise DiskError(f"{path}: can't be written", remedy=f"Give another {option}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # What can be wrong is found before torch is read, which takes seconds.
    notes: list[str] = []
    places = [_place(name, options, notes) for name in (options.model, options.against) if name]
    questions = _questions(options)
    from abliterated.pipeline.evaluate_alone import Subject, against, evaluate_model, suites
    from abliterated.pipeline.watch import Watch

    subject, base = Subject(*places[0]), Subject(*places[1]) if len(places) > 1 else None
    if base and (base.source is None) != (subject.source is None):
        notes.append(
            "one of the two is read from files and the other asked through Ollama: no KL, and answers may differ"
        )
    with _Line(quiet=options.quiet) as line:
        watch = Watch(line.tell, stop.is_set)
        original = _evaluated(evaluate_model, base, questions, watch, None) if base else None
        one = _evaluated(evaluate_model, subject, questions, watch, original)
    figures: dict[str, Any] = dict(one.figures)
    if original:
        compared, more = against(one, original)
        figures |= compared | {"against": original.figures}
        notes += more
    if found := suites(questions, one, original):
        import msgspec

        figures["suites"] = msgspec.to_builtins(found)
    figures["notes"] = list(dict.fromkeys([*notes, *one.notes, *(original.notes if original else ())]))
    if options.answers:
        _write_answers(options.answers, questions, one, original)
    if options.history:
        _append(options.history, figures)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    else:
        _print(figures)
    return 0


def _questions(options: argparse.Namespace) -> Questions:
    from abliterate.contract.recipe import Evaluate, Prompts, Run, recipe_from_table

    recipe = recipe_from_table({"model": "./model.gguf", "run": {"device": options.device}}, "evaluate")
    wanted = Prompts(harmful=options.harmful or "builtin", harmless=options.harmless or "builtin", seed=options.seed)
    from abliterated.pipeline.prompts import read_prompts
    from abliterated.pipeline.served import Served, engine_url
    from abliterated.pipeline.suites import read_suites

    prompts, probes, markers = read_prompts(wanted), read_suites(options.suite), _markers(options.refusal_markers)
    judge = Served(engine_url(options.host), options.judge.removeprefix("ollama:")) if options.judge else None
    if judge:
        judge.check()
    from abliterated.pipeline.evaluate import Asked
    from abliterated.pipeline.evaluate_alone import Questions, all_prompts

    harmful, harmless = all_prompts(prompts, options.prompts)
    run: Run = recipe.run
    return Questions(
        Asked(harmful, harmless, probes),
        Evaluate(prompts=options.prompts, tokens=options.tokens),
        run,
        options.system,
        markers,
        judge,
    )


def _place(name: str, options: argparse.Namespace, notes: list[str]) -> tuple[str, Source | None, Served | None]:
    """What it is called and where it is: files where there are some, else the engine that serves it."""
    from abliterated.pipeline.served import Served, engine_url
    from abliterated.pipeline.source import open_source

    path = Path(name).expanduser()
    if not name.startswith("ollama:") and (path.exists() or name.endswith(".gguf") or name.startswith((".", "/", "~"))):
        if not path.exists():
            raise NotFound(f"{name}: no such file or folder", remedy="Check the path")
        return path.name, open_source(path.resolve()), None
    if name.startswith("hf:"):
        return name, open_source(_fetched(name)), None
    short = name.removeprefix("ollama:")
    served = Served(engine_url(options.host), short)
    if not options.served:
        try:
            return short, open_source(_blob(served.url, short)), served
        except (NotFound, RecipeError):
            raise
        except ModelError as error:
            notes.append(f"{error.message}: asked through Ollama instead")
    served.check()
    return short, None, served


def _evaluated(
    evaluate: Any, subject: Subject, questions: Questions, watch: Any, original: Evaluated | None
) -> Evaluated:
    """From its files; where they can't be read into memory here and an engine serves it, through that."""
    try:
        found: Evaluated = evaluate(subject, questions, watch, original)
        return found
    except ModelError as error:
        if subject.source is None or subject.served is None:
            raise
        from abliterated.pipeline.evaluate_alone import Evaluated, Subject

        found = evaluate(Subject(subject.name, None, subject.served), questions, watch, original)
        note = f"{error.message}: asked through Ollama instead"
        return Evaluated(found.figures, found.answers, found.verdicts, found.first, (*found.notes, note))


def _blob(url: str, name: str) -> Path:
    import asyncio

    from abliterated.ollama.client import OllamaClient
    from abliterated.ollama.locate import resolve_base

    async def ask() -> Path:
        async with OllamaClient(url) as client:
            return (await resolve_base(client, name)).blob_path

    return asyncio.run(ask())


def _fetched(reference: str) -> Path:
    from abliterated.pipeline.hub import fetch

    return fetch(reference, progress=lambda done, total: None, cancelled=lambda: False).folder


def _markers(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read", remedy="Give UTF-8 text, one opening a line") from error
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _may_write(path: Path) -> bool:
    """As far as that can be told before the hours of work."""
    if path.exists():
        return not path.is_dir() and os.access(path, os.W_OK)
    return os.access(path.parent, os.W_OK | os.X_OK)


def _write_answers(path: Path, questions: Questions, one: Evaluated, original: Evaluated | None) -> None:
    rows = []
    for kind in ("harmful", "harmless"):
        prompts, texts = getattr(questions.asked, kind), getattr(one.answers, kind)
        for number, prompt in enumerate(prompts):
            row = {"class": kind, "prompt": prompt, "answer": texts[number]}
            row["verdict"] = getattr(one.verdicts, kind)[number]
            if original:
                row["original"] = getattr(original.answers, kind)[number]
            rows.append(json.dumps(row, ensure_ascii=False))
    from abliterated.files import write_whole

    try:
        write_whole(path, ("\n".join(rows) + "\n").encode())
    except OSError as error:
        raise DiskError(f"{path}: can't be written ({error.strerror})", remedy="Give another --answers") from error


def _append(path: Path, figures: dict[str, Any]) -> None:
    line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **figures}, ensure_ascii=False)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise DiskError(f"{path}: can't be written ({error.strerror})", remedy="Give another --history") from error


def _print(figures: dict[str, Any]) -> None:
    """A table of the one or the two."""
    both = [figures["against"], figures] if "against" in figures else [figures]
    rows = [["", *(str(one["model"]) for one in both)]]
    for name, key, count, total in (
        ("harmful prompts refused", "refusal", "refusal_count", "total"),
        ("harmless prompts refused", "false_refusal", "false_refusal_count", "harmless_total"),
    ):
        cells = [f"{one[count]} of {one[total]}  ({one[f'{key}_low']:.0%}-{one[f'{key}_high']:.0%})" for one in both]
        rows.append([name, *cells])
    for name, key in (("running in circles", "degenerate"), ("empty answers", "empty")):
        rows.append([name, *(f"{one[key]:.1%}" for one in both)])
    for name, key, shape in (
        ("harmless answers the same", "harmless_exact", ".1%"),
        ("KL, mean (nats a token)", "kl_mean", ".4f"),
        ("KL, worst prompt", "kl_max", ".4f"),
        ("KL of likeliest first tokens", "kl_first_likeliest", ".4f"),
        ("writers edited", "coverage", ".0%"),
        ("direction left", "residual", ".2%"),
    ):
        if key in figures:
            rows.append([name, *([""] * (len(both) - 1)), format(figures[key], shape)])
    for suite in figures.get("suites", ()):
        counts = [suite["before"], suite["after"]][: len(both)]
        cells = ["-" if count is None else f"{count} of {suite['total']}" for count in counts]
        rows.append([f"{suite['name']}: {suite['counted']}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    for note in figures["notes"]:
        sys.stderr.write(f"note: {note}\n")


class _Line:
    """Progress on stderr: one line that is rewritten on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._live = not quiet and sys.stderr.isatty()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")

    def tell(self, progress: Progress) -> None:
        if not self._live or not progress.message:
            return
        share = f" {progress.done / progress.total:.0%}" if progress.total else ""
        left = f", {progress.remaining:.0f} s left" if progress.remaining is not None else ""
        sys.stderr.write(f"\r\x1b[K{progress.message}{share}{left}"[:120])
        sys.stderr.flush()
