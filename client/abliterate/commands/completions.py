"""`abliterate completions`: what a shell needs to complete our verbs and options, generated from the parsers."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abliterate.introspect import Verb

_SHELLS = ("bash", "zsh", "fish")
_FILE_ARGUMENTS = ("RECIPE", "RECIPE|MODEL|-", "MODEL", "FILE")
_DESCRIPTION = "Print the completions for a shell: verbs, options, files where a file may stand."
_EPILOG = """\
examples:
  abliterate completions bash > ~/.local/share/bash-completion/completions/abliterate
  abliterate completions zsh > ~/.zfunc/_abliterate         (with ~/.zfunc in $fpath)
  abliterate completions fish > ~/.config/fish/completions/abliterate.fish"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    sys.stdout.write(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script for `shell`."""
    from abliterate.introspect import verbs

    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs())


def _bash(verbs: list[Verb]) -> str:
    cases = []
    for verb in verbs:
        words = " ".join([*(name for option in verb.options for name in option.names), *verb.choices])
        files = " -f" if _files(verb) else ""
        cases.append(f'    {verb.name}) COMPREPLY=($(compgen{files} -W "{words}" -- "$word")) ;;')
    names = " ".join(verb.name for verb in verbs)
    takers = "|".join(sorted({name for verb in verbs for o in verb.options if o.is_file for name in o.names}))
    return f"""\
# bash completions for abliterate
_abliterate() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb="" at
  case $before in {takers}) COMPREPLY=($(compgen -f -- "$word")); return ;; esac
  for ((at = 1; at < COMP_CWORD; at++)); do
    case ${{COMP_WORDS[at]}} in
      {takers}) ((at++)) ;;
      -*) ;;
      *) verb=${{COMP_WORDS[at]}}; break ;;
    esac
  done
  case $verb in
    "") COMPREPLY=($(compgen -W "{names} --help --version --config --socket" -- "$word")) ;;
{chr(10).join(cases)}
  esac
}}
complete -o filenames -F _abliterate abliterate
"""


def _zsh(verbs: list[Verb]) -> str:
    described = "\n".join(f"    {_quote(f'{verb.name}:{verb.summary}')}" for verb in verbs)
    cases = []
    for verb in verbs:
        specs = []
        for option in verb.options:
            value = (":value:_files" if option.is_file else ":value:") if option.takes_value else ""
            text = option.help.replace("[", "(").replace("]", ")").replace(":", " ")
            specs += [_quote(f"*{name}[{text}]{value}") for name in option.names]
        rest = f"*:choice:({' '.join(verb.choices)})" if verb.choices else "*:file:_files" if _files(verb) else ""
        cases.append(f"    {verb.name}) _arguments {' '.join([*specs, *([_quote(rest)] if rest else [])])} ;;")
    return f"""\
#compdef abliterate
_abliterate() {{
  local -a verbs
  verbs=(
{described}
  )
  if (( CURRENT == 2 )); then
    _describe verb verbs
    return
  fi
  local verb=$words[2]
  shift words
  (( CURRENT-- ))
  case $verb in
{chr(10).join(cases)}
  esac
}}
_abliterate "$@"
"""


def _fish(verbs: list[Verb]) -> str:
    lines = ["# fish completions for abliterate", "complete -c abliterate -f"]
    for verb in verbs:
        lines.append(f"complete -c abliterate -n __fish_use_subcommand -a {verb.name} -d {_quote(verb.summary)}")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        if _files(verb):
            lines.append(f"complete -c abliterate {seen} -F")
        if verb.choices:
            lines.append(f"complete -c abliterate {seen} -a {_quote(' '.join(verb.choices))}")
        for option in verb.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = (" -r -F" if option.is_file else " -x") if option.takes_value else ""
            lines.append(f"complete -c abliterate {seen} {names}{value} -d {_quote(option.help)}")
    return "\n".join(lines) + "\n"


def _files(verb: Verb) -> bool:
    return any(name in _FILE_ARGUMENTS for name in verb.positionals)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
