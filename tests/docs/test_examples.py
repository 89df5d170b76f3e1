"""What the documents show is what the code reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from abliterate import keys
from abliterate.cli import build_parser
from abliterate.contract.config import Config, parse_config
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.recipe import Recipe, parse_recipe
from abliterate.contract.states import STATES
from abliterated.cli import parser as daemon_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def spelt_out(page: str) -> tuple[str, list[str]]:
    """The page's tables of keys as TOML with their defaults, and the keys that have none."""
    lines, needed = [], []
    for line in (ROOT / "docs" / "reference" / page).read_text().splitlines():
        if heading := re.fullmatch(r"## `(\[\w+\])`", line):
            lines.append(heading[1])
        elif row := re.match(r"\| `(\w+)` \| (?:`(.+?)`|must be given) \| \S", line):
            needed += [] if row[2] else [row[1]]
            lines += [f"{row[1]} = {row[2]}"] if row[2] else []
    return "\n".join(lines), needed


def test_the_recipe_reference_shows_every_key_with_its_default() -> None:
    text, needed = spelt_out("recipe.md")
    assert parse_recipe(b'model = "x.gguf"\n' + text.encode()) == Recipe(model="x.gguf")
    assert needed == ["model"]
    assert len(re.findall(r"^\w+ = ", text, re.M)) == len(keys.dotted(Recipe)) - 1


def test_the_configuration_reference_shows_every_key_with_its_default() -> None:
    text, needed = spelt_out("configuration.md")
    assert parse_config(text.encode()) == Config()
    assert needed == ["pattern", "url"]
    assert len(re.findall(r"^\w+ = ", text, re.M)) == len(keys.dotted(Config)) - 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_toml_example_can_be_read(path: Path) -> None:
    for text in blocks(path, "toml"):
        config = path.name in ("configuration.md", "proxy.md") or text.startswith("# config.toml\n")
        (parse_config if config else parse_recipe)(text.encode(), path.name)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    plain = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = re.findall(r"^#+ +(.+)$", plain, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_documents_leads_somewhere(path: Path) -> None:
    plain = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        # What is linked to must be on the site too, which holds docs/ and nothing else.
        assert ROOT / "docs" not in path.parents or ROOT / "docs" in found.resolve().parents, target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_sites_list_and_the_list_has_no_other() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(listed) == len(set(listed)), "each once"
    assert set(listed) == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def commands(path: Path) -> list[str]:
    """Every call of ours that a page shows, wherever in a line it stands."""
    lines = "\n".join([*blocks(path, ""), *blocks(path, "sh")]).replace("\\\n", " ").splitlines()
    called = [part.strip() for line in lines for part in re.split(r" \| | #|  +|&&", line)]
    found = [re.search(r"(?:^|^sudo |^\$ | exec abliterated )(abliterated? [^>]*)", part) for part in called]
    return [one[1] for one in found if one]


def test_there_are_commands_to_be_looked_at() -> None:
    assert sum(len(commands(path)) for path in DOCUMENTS) > 35


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_ours_in_the_documents_is_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(path):
        program, *words = shlex.split(line)
        parser = build_parser()[0] if program == "abliterate" else daemon_parser()
        try:
            _, left = parser.parse_known_args(words)
        except SystemExit as ended:
            assert ended.code == 0, (line, capsys.readouterr().err)
        else:
            assert not left, (line, left)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_verb_and_option_named_in_a_line_of_text_is_there(path: Path) -> None:
    client, daemon = build_parser()[1], daemon_parser()
    served = next(action.choices for action in daemon._actions if isinstance(action.choices, dict))
    for line in re.findall(r"`(abliterated? [a-z][^`]*)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)):
        program, *words = line.split()
        for verb in words[0].split("|"):
            known = (client if program == "abliterate" else served)[verb]
            if program == "abliterate":
                client[verb].load()
            for option in re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", line):
                assert option in known._option_string_actions, line


def test_every_state_and_every_exit_code_is_explained() -> None:
    states = (ROOT / "docs" / "reference" / "states.md").read_text()
    for state in STATES:
        assert f"`{state}`" in states, state
    text = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    for error in AbliteratedError.__subclasses__():
        if error.__module__ == "abliterate.contract.errors":
            assert f"| {error.exit_code} |" in text, error


def test_every_module_of_the_pipeline_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folder = ROOT / "daemon" / "abliterated" / "pipeline"
    missing = [path.stem for path in folder.glob("[a-z]*.py") if f"`{path.stem}`" not in text]
    assert missing == []
