"""Search: ours and the published Heretic at their default settings, side by side on small models that refuse.

    python -m bench.search                          # the whole zoo, one seed; three on the first model
    python -m bench.search --model moe              # one model; its figures are merged into bench/results.json
    python -m bench.search --real DIR               # real weights; nothing is written to bench/results.json

Same prompts, threads, seed and system prompt; both sides read the same folder and save one; one scorer that knows
neither asks both what was saved (`search_scorer`). Heretic's pick is the trial with the fewest refusals, then the least
KL. The zoo is trained on the first run and kept in the user's cache. What small models show is that methods differ, and
which is cheaper; not how real ones fare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import search_heretic
from bench.search_tables import bars, markdown, table

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = ROOT / "docs" / "reference" / "search.md"
BEGIN: Final = "<!-- made by python -m bench.search --redraw -->"
END: Final = "<!-- until here -->"
SYSTEM: Final = "You are a helpful assistant."
REFUSER: Final = "refuser"
ZOO: Final = ("llama", "postnorm", "moe", "hybrid", "delayed", "two-reasons")
SEEDS: Final = (0, 1, 2)
REAL_QUESTIONS: Final = 32  # of each class, kept for the scorer where the prompts are the built-in ones


@dataclass(frozen=True)
class Subject:
    """A model's folder, the prompts both sides draw from, and the questions the scorer asks."""

    name: str
    folder: Path
    harmful: Path
    harmless: Path
    questions: Path
    threads: int = 1


def cache() -> Path:
    """The user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("abliterated"))


def subject(name: str) -> Subject:
    """A model of the zoo, trained now if it never was."""
    folder = cache() / "zoo" / name
    if name == REFUSER:
        _refuser(folder)
    elif not (folder / "trained.json").is_file():
        print(f"training {name}: about three minutes …", file=sys.stderr)
        command = [sys.executable, str(ROOT / "tools" / "train_zoo.py"), "--out", str(folder.parent), "--only", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Subject(name, folder, folder / "harmful.txt", folder / "harmless.txt", folder / "questions.jsonl")


def real(folder: Path, place: Path, prompts: dict[str, Path | None]) -> Subject:
    """Any folder of safetensors, with the built-in prompts or one's own: the last of each class are kept for the
    scorer."""
    from importlib import resources

    place.mkdir(parents=True, exist_ok=True)
    asked = []
    for name, kind in (("harmful", "refused"), ("harmless", "answered")):
        file = prompts.get(name) or resources.files("abliterated.pipeline") / f"prompts/{name}.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        (place / f"{name}.txt").write_text("\n".join(lines[:-REAL_QUESTIONS]) + "\n")
        asked += [{"prompt": line, "class": kind, "right": [[]]} for line in lines[-REAL_QUESTIONS:]]
    (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = (place / name for name in ("harmful.txt", "harmless.txt", "questions.jsonl"))
    return Subject(folder.name, folder.resolve(), *files, threads=os.cpu_count() or 1)


def _refuser(folder: Path) -> None:
    """The shipped refuser as a folder that both sides read, its thinking switched off, with its own questions."""
    if (folder / "questions.jsonl").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from abliterated.refuser import files, held_out

    shipped = files()
    folder.mkdir(parents=True, exist_ok=True)
    where = {"pretrained_model_name_or_path": str(shipped.model.parent), "gguf_file": shipped.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    template = shipped.template_jinja.read_text(encoding="utf-8")
    tokenizer.chat_template = "{%- set enable_thinking = false %}" + template
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(**where, dtype="float32").save_pretrained(folder)
    shutil.copy(shipped.harmful, folder / "harmful.txt")
    shutil.copy(shipped.harmless, folder / "harmless.txt")
    asked = [{"prompt": one.prompt, "class": one.kind, "right": [[one.expected]]} for one in held_out()]
    text = "".join(json.dumps(line) + "\n" for line in asked)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def ours(about: Subject, place: Path, seed: int, target: float | None = None) -> dict[str, Any]:
    """One default run of `abliterated work`, or one with another target; the saved folder is `place/out/edited`."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    recipe = [
        f"model = {json.dumps(str(about.folder))}",
        'name = "edited"',
        "[prompts]",
        f"harmful = {json.dumps(str(about.harmful))}",
        f"harmless = {json.dumps(str(about.harmless))}",
        f"system = {json.dumps(SYSTEM)}",
        f"seed = {seed}",
        "[export]",
        'format = "safetensors"',
        *([] if target is None else ["[search]", f"refusal_target = {target:.4f}"]),
    ]
    (place / "recipe.toml").write_text("\n".join(recipe) + "\n", encoding="utf-8")
    began = time.monotonic()
    command = [sys.executable, "-m", "abliterated.cli", "work", str(place / "recipe.toml"), "--out", str(place / "out")]
    threads = {"OMP_NUM_THREADS": str(about.threads), "MKL_NUM_THREADS": str(about.threads)}
    with (place / "output.txt").open("w") as output:
        process = subprocess.Popen([*command, "--quiet"], stdout=output, stderr=output, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    result = place / "out" / "result.json"
    if not result.is_file():
        raise SystemExit(f"our run on {about.name} failed: {(place / 'output.txt').read_text()[-800:]}")
    told = json.loads(result.read_text())
    return {
        "wall_s": round(seconds, 2),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
        "exit_code": process.returncode,
        "tokens_decoded": told["metrics"]["tokens_decoded_run"],
        "tokens_prefilled": told["metrics"]["tokens_prefilled_run"],
        "rank": told["direction"]["rank"],
        "direction": told["direction"]["digest"],
        "content": told["content"],
        "seconds": told["seconds"],
    }


def heretic(about: Subject, place: Path, seed: int, trials: int) -> dict[str, Any]:
    """One default run of Heretic on the prompts that our run draws; the saved folder is `place/edited`."""
    from abliterate.contract.recipe import Prompts
    from abliterated.pipeline.prompts import read_prompts

    drawn = read_prompts(Prompts(harmful=str(about.harmful), harmless=str(about.harmless), seed=seed))
    prompts: dict[str, Sequence[str]] = {}
    for name, split in (("good", drawn.harmless), ("bad", drawn.harmful)):
        prompts[name] = split.training
        prompts[f"{name}_evaluation"] = (*split.validation, *split.held_out)[:100]
    return search_heretic.run(
        search_heretic.environment(cache()),
        about.folder,
        prompts,
        place / "edited",
        place / "heretic",
        trials=trials,
        seed=seed,
        system=SYSTEM,
        threads=about.threads,
    )


def scored(about: Subject, edited: Path) -> dict[str, float | None]:
    """What the one scorer says."""
    command = [sys.executable, "-m", "bench.search_scorer", str(about.folder), str(edited), str(about.questions)]
    done = subprocess.run([*command, SYSTEM], cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(about: Subject, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one model with one seed."""
    place = cache() / "bench-search" / f"{about.name}-{seed}"
    kept = place / "heretic.json"
    if "heretic" in options.side and not (options.reuse and kept.is_file()):
        print(f"{about.name}, seed {seed}: Heretic …", file=sys.stderr)
        try:
            found = heretic(about, place, seed, options.heretic_trials)
            found["score"] = scored(about, place / "edited")
        except search_heretic.NoHeretic as error:
            found = {"failed": str(error)}
        place.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2))
    theirs = json.loads(kept.read_text()) if kept.is_file() else {"failed": "not run"}
    if "ours" not in options.side:
        return {"seed": seed, "heretic": theirs}
    print(f"{about.name}, seed {seed}: ours …", file=sys.stderr)
    first = ours(about, place / "ours", seed)
    first["score"] = scored(about, place / "ours" / "out" / "edited")
    again = ours(about, place / "again", seed) if options.again else first
    matched = None
    if _unmatched(first, theirs):
        # Fewer refusals for more KL: which method does less harm is told by ours where it may leave as many as theirs.
        allowed = theirs["score"]["refusals"] / theirs["score"]["questions"]
        matched = ours(about, place / "matched", seed, allowed)
        matched["score"] = scored(about, place / "matched" / "out" / "edited")
    same = (first["direction"], first["content"]) == (again["direction"], again["content"])
    found = {"seed": seed, "ours": first, "heretic": theirs, "rerun_identical": same if options.again else None}
    return found | ({"matched": matched} if matched else {})


def _unmatched(first: dict[str, Any], theirs: dict[str, Any]) -> bool:
    one, other = first["score"], theirs.get("score")
    return other is not None and one["refusals"] < other["refusals"] and one["kl32"] > other["kl32"]


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json keeps of one model: medians over the seeds."""

    def middle(side: str, *keys: str) -> float | None:
        found = []
        for run in runs:
            value: Any = run.get(side, {})
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found.append(float(value))
        return statistics.median(found) if found else None

    kept: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    kept |= {"date": time.strftime("%Y-%m-%d"), "heretic": search_heretic.PACKAGE, "cores": os.cpu_count()}
    if any("matched" in run for run in runs):
        for key, name in (("refusals", "refusals"), ("kl32", "kl")):
            kept[f"{name}_matched"] = middle("matched", "score", key)
    for side in ("ours", "heretic"):
        for key in ("wall_s", "processor_s", "peak_mb", "tokens_decoded", "tokens_prefilled"):
            kept[f"{key}_{side}"] = middle(side, key)
        for key, name in (("refusals", "refusals"), ("kl32", "kl"), ("exact", "exact"), ("complied", "complied")):
            kept[f"{name}_{side}"] = middle(side, "score", key)
    kept["trials_heretic"] = middle("heretic", "trials")
    kept["questions"] = middle("ours", "score", "questions")
    kept["rank_ours"] = middle("ours", "rank")
    for key in ("wall", "processor"):
        one, other = kept[f"{key}_s_ours"], kept[f"{key}_s_heretic"]
        kept[f"{key}_ratio"] = one / other if one and other else None
    reruns = [run["rerun_identical"] for run in runs if run.get("rerun_identical") is not None]
    kept["rerun_identical"] = all(reruns) if reruns else None
    failed = [run["heretic"]["failed"] for run in runs if "failed" in run.get("heretic", {})]
    return kept | ({"heretic_failed": failed[0]} if failed else {})


def merge(models: dict[str, Any]) -> None:
    """Into bench/results.json, beside what others measured."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    search = known.setdefault("search", {})
    search.setdefault("models", {}).update(models)
    _replace(RESULTS, json.dumps(known, indent=2, sort_keys=True) + "\n")
    redraw()


def redraw() -> None:
    """The page's table from bench/results.json."""
    models = json.loads(RESULTS.read_text())["search"]["models"]
    known = {name: models[name] for name in (*ZOO, REFUSER) if name in models}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, behind = rest.partition(END)
    _replace(PAGE, f"{before}{BEGIN}\n{markdown(known)}{END}{behind}")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench-search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=(*ZOO, REFUSER), help="these alone")
    parser.add_argument("--seeds", type=int, help="so many seeds on each model (default: 3 on the first, then 1)")
    parser.add_argument("--seed", type=int, action="append", help="these seeds, rather than the first so many")
    parser.add_argument(
        "--heretic-trials", type=int, default=search_heretic.DEFAULT_TRIALS, help="fewer, to try it out"
    )
    parser.add_argument("--side", action="append", choices=("ours", "heretic"), help="this side alone")
    parser.add_argument(
        "--reuse", action="store_true", help="take Heretic's result of an earlier run where there is one"
    )
    parser.add_argument("--real", type=Path, metavar="DIR", help="a folder of safetensors, with the built-in prompts")
    for name in ("harmful", "harmless"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help="with --real: these prompts, one a line")
    parser.add_argument("--again", action="store_true", help="run ours twice and compare the bytes")
    parser.add_argument("--redraw", action="store_true", help="only the table in docs/reference/search.md")
    options = parser.parse_args()
    if options.redraw:
        redraw()
        return 0
    options.side = options.side or ["ours", "heretic"]
    models = {}
    if options.real:
        place = cache() / "bench-search" / f"{options.real.name}-real"
        about = real(options.real, place, {"harmful": options.harmful, "harmless": options.harmless})
        models[about.name] = figures([compared(about, 0, options)])
        print(table(models))
        return 0
    for number, name in enumerate(options.model or (*ZOO, REFUSER)):
        few = options.seeds or (len(SEEDS) if number == 0 and not options.model else 1)
        seeds = options.seed or SEEDS[:few]
        runs = [compared(subject(name), seed, options) for seed in seeds]
        if "ours" in options.side:
            models[name] = figures(runs)
            merge({name: models[name]})
    print(table(models))
    return 0 if bars(models) else 1


if __name__ == "__main__":
    sys.exit(main())
