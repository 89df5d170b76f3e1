"""`abliterated work`: one recipe in the foreground, without daemon or engine."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from abliterate.contract.config import load_config, local_path
from abliterate.contract.errors import RecipeError
from abliterate.contract.messages import Progress, Result
from abliterate.contract.recipe import parse_recipe, target_name
from abliterate.contract.report import PAGE_FILE
from abliterated.once import Tell, absolute_paths, run_once

HELP = "run one recipe in the foreground, without daemon or engine"
EXAMPLES = """\
examples:
  abliterated work refuser.toml --out result/
  abliterated work refuser.toml --out result/ --json >summary.json

The folder gets one product (a .gguf, or a folder with config.json) beside the reports. A product abliterated
made there before under that name is replaced; other files are left alone. Relative paths in the recipe are read
from the recipe's own folder. Nothing is registered. A run that was killed goes on when started again.
exit codes: 0 done; 2 wrong recipe; 3 the model can't be used; 4 no room; 6 the name is taken in --out;
8 done, but more is refused than search.refusal_target allows; 70 out of memory; 75 engine away, or another run works
in --out; 86 stopped."""
# Delivered all the same; other codes mean that nothing was.
SHORT_OF_TARGET = 8


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="the recipe's TOML file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the product and the reports")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file, for [tools] and [trust]")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    try:
        data = options.recipe.read_bytes()
    except OSError as error:
        raise RecipeError(f"{options.recipe}: can't be read ({error.strerror})", remedy="Check the path") from error
    recipe = absolute_paths(parse_recipe(data, str(options.recipe)), options.recipe.resolve().parent)
    if recipe.matrix:
        raise RecipeError("matrix: this version runs one recipe at a time", remedy="Run it once for each combination")
    target_name(recipe)
    config = load_config(options.config)
    converter = config.tools.converter
    with run_once(
        recipe,
        options.out,
        Bar(quiet=options.quiet),
        stop_on_signals(),
        converter=str(local_path(converter)) if converter else "",
        remote_code=config.trust.remote_code,
        called="--out",
    ) as (result, _):
        pass
    print_result(result, options)
    return SHORT_OF_TARGET if result.short_of_target else 0


def stop_on_signals() -> Callable[[], bool]:
    """Whether Ctrl-C or SIGTERM has come since."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop.is_set


def print_result(result: Result, options: argparse.Namespace) -> None:
    """The product's path on stdout, or the whole result as JSON; the rest on stderr."""
    if options.json:
        import msgspec

        body = msgspec.to_builtins(result) | {"out": str(options.out.resolve())}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(body), indent=2).decode() + "\n")
        return
    sys.stdout.write(f"{options.out / result.product}\n")
    edited = result.format != "direction"
    told = [f"coverage {result.coverage:.0%}"] if edited else []
    if edited and "trial" not in result.direction:  # a search leaves on purpose what does no harm
        told.append(f"residual {result.residual:.2%}")
    if "refusal_before" in result.metrics:
        told.insert(
            0, f"refusals {result.metrics['refusal_before']:.0%} → {result.metrics.get('refusal_after', 0):.0%}"
        )
    sys.stderr.write(", ".join([*told, f"{sum(result.seconds.values()):.1f} s"]) + "\n")
    sys.stderr.write(f"report: {options.out / PAGE_FILE}\n")
    for note in result.notes:
        sys.stderr.write(f"note: {note}\n")


class Bar:
    """Progress on stderr: a live bar on a terminal, a line a stage elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._live: contextlib.AbstractContextManager[object] | None = None
        self._progress: object = None
        self._task: int | None = None

    def __enter__(self) -> Tell:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Drawn

            drawn = Drawn(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress, self._live = drawn, drawn
            drawn.__enter__()
        return self.tell

    def __exit__(self, *failure: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def tell(self, event: Progress) -> None:
        if self._quiet:
            return
        text = f"{event.stage} {event.message}".strip()
        if self._progress is not None:
            drawn = self._progress
            if event.stage != self._stage:
                self._task = drawn.add_task(text, total=event.total or None)  # type: ignore[attr-defined]
            drawn.update(  # type: ignore[attr-defined]
                self._task, description=text[:28], completed=event.done, total=event.total or None
            )
        elif event.stage != self._stage:
            sys.stderr.write(f"{text} …\n")
        self._stage = event.stage
