"""`abliterated export`: a model as one GGUF file, in the types asked for. The weights are not edited."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from abliterate.contract.errors import ConflictError, RecipeError
from abliterate.contract.names import name_from_stem
from abliterated.commands.foreground import MODEL_HELP, common, ran, recipe_of
from abliterated.commands.work import Bar, stop_on_signals
from abliterated.once import make_folder, model_reference, resolve

HELP = "write a model or an edited folder as one GGUF file, in the types asked for"
EXAMPLES = """\
examples:
  abliterated export result/mymodel-abliterated -o mymodel.gguf --quantize Q4_K_M
  abliterated export result/mymodel-abliterated -o mymodel.gguf --converter llama.cpp/convert_hf_to_gguf.py
  abliterated export qwen3-abliterated:8b -o qwen3.gguf
  abliterated export ./model-00001-of-00003.gguf -o model.gguf

A folder with safetensors is converted by llama.cpp's converter (--converter, or [tools] converter in config.toml), or
by the Ollama at $OLLAMA_HOST where its version still can (before 0.34.1), and keeps its provenance. A GGUF, or the one
Ollama holds under a name, is copied out, its parts put together, its tensors requantised where --quantize asks for it.
stdout: the file's path.
exit codes: 0 done; 2 an option is wrong, or there is no converter; 3 the model can't be used; 4 no room; 6 the file is
there already (--force replaces it); 7 no such model; 75 Ollama is away; 86 stopped."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .gguf to write")
    parser.add_argument(
        "--quantize", "--quant", default="keep", metavar="TYPE", help="keep, Q8_0, Q4_K_M … (default keep)"
    )
    parser.add_argument("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, for a folder")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    common(parser)


def run(options: argparse.Namespace) -> int:
    target: Path = options.output.absolute()
    if target.suffix != ".gguf":
        raise RecipeError(f"--output {options.output}: an export is a GGUF", remedy="Name it FILE.gguf")
    if target.exists() and not options.force:
        raise ConflictError(f"{options.output} is there already", remedy="Give another name, or --force")
    reference = model_reference(options.model)
    folder = Path(reference)
    if reference.startswith("hf:"):
        raise RecipeError("a model of a hub has to be fetched and edited first", remedy="Give a folder, or use `work`")
    if folder.is_dir() and (folder / "config.json").exists():
        _converted(options, folder, target)
    else:
        _copied(options, reference, target)
    sys.stdout.write(f"{options.output}\n")
    return 0


def _converted(options: argparse.Namespace, folder: Path, target: Path) -> None:
    """A folder, through the pipeline's own last step."""
    recipe = recipe_of(
        options,
        name=name_from_stem(folder.resolve().name).model,
        run={"from_checkpoint": str(folder)},
        export={"quantize": options.quantize},
    )
    with ran(recipe, target.parent, options, inside=True) as (result, made):
        from abliterated.pipeline.delivery import deliver

        named = made / target.name
        (made / result.product).rename(named)
        deliver([named], target.parent)
        for note in result.notes:
            sys.stderr.write(f"note: {note}\n")


def _copied(options: argparse.Namespace, reference: str, target: Path) -> None:
    """A GGUF: put together, requantised, or both."""
    recipe = recipe_of(options, name="export", export={"quantize": options.quantize})
    source, _ = resolve(recipe)
    cancelled = stop_on_signals()
    make_folder(target.parent)
    from abliterated.pipeline.convert import stamp
    from abliterated.pipeline.gguf_file import read_gguf
    from abliterated.pipeline.mixes import known_mix
    from abliterated.pipeline.provenance import PREFIX
    from abliterated.pipeline.source import open_source
    from abliterated.pipeline.split_gguf import merge, read_model
    from abliterated.pipeline.watch import Watch

    found, mix = open_source(Path(source)), known_mix(options.quantize)
    whole = target.with_name(f".{target.name}.whole")
    with Bar(quiet=options.quiet) as tell:
        watch = Watch(tell, cancelled)
        try:
            with watch.stage("edit"):

                def step(done: int, total: int) -> None:
                    watch.step(done, total, "bytes", "writing the GGUF")

                if len(found.parts) > 1:
                    merge(read_model(found.path), whole if mix else target, progress=step, cancelled=cancelled)
                if mix or len(found.parts) == 1:
                    path = whole if len(found.parts) > 1 else found.path
                    kept = {key: value for key, value in read_gguf(path).values.items() if key.startswith(PREFIX)}
                    stamp(path, target, kept, quantize=options.quantize, progress=step, cancelled=cancelled)
        finally:
            whole.unlink(missing_ok=True)
