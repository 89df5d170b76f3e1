"""What is wrong with a model in an engine, whoever made it: lost templates, lost renderers, stops that cut calls off,
capabilities that lie.

`examine` is pure: facts in, findings out. `diagnose` asks the engine. Does not change anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from abliterate.contract.care import Diagnosis, Finding
from abliterate.contract.errors import AbliteratedError
from abliterated.ollama.certify import render_sentinel, renders, sentinels
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.facts import Facts, find_base, look_at, same_kind
from abliterated.ollama.request import MARKERS, capability_notes, differences, shows_tools
from abliterated.ollama.version import Generation

# Architectures whose library models speak through a built-in renderer and parser: without them the turns are wrong.
RENDERED = {"gemma4": "gemma4", "lfm2": "lfm2", "lfm2moe": "lfm2", "qwen35": "qwen3.5", "qwen35moe": "qwen3.5"}

# A finding that only repeats what one of these has said.
_SAID_BY = {
    "template-lost": frozenset({"template-missing", "template-dummy"}),
    "tools-lost": frozenset({"template-missing", "template-dummy", "capability-tools"}),
}


async def diagnose(client: OllamaClient, name: str, base: str = "", *, deep: bool = False) -> Diagnosis:
    """A model held against `base`, else against the model of this engine it was probably made from.

    `deep`: the engine renders conversations, for which it may load the model. Raises NotFound, ModelError.
    """
    facts = await look_at(client, name)
    other = await look_at(client, base, facts.version) if base else await find_base(client, facts)
    findings = examine(facts, other)
    if deep:
        findings += await _rendered(client, facts)
    if all(finding.level == "ok" for finding in findings):
        findings = [*findings, Finding(key="healthy", level="ok", text="nothing wrong was found")]
    return Diagnosis(
        model=facts.name,
        engine=facts.version.text,
        base=other.name if other else "",
        capabilities=sorted(facts.capabilities),
        findings=findings,
    )


def examine(facts: Facts, base: Facts | None = None) -> list[Finding]:
    """Everything that can be said without loading the model, the worst first."""
    found = [*_engine(facts), *_template(facts, base), *_stops(facts), *_lies(facts)]
    if base is not None:
        found += _against(facts, base)
    keys = {finding.key for finding in found}
    found = [finding for finding in found if not _SAID_BY.get(finding.key, frozenset()) & keys]
    order = {"problem": 0, "warning": 1, "note": 2, "ok": 3}
    unique = {finding.text: finding for finding in found}
    return sorted(unique.values(), key=lambda finding: order[finding.level])


def mend(facts: Facts, base: Facts | None) -> str:
    """The command that puts it right."""
    source = f" --from {base.name}" if base is not None else " --from BASE (a model of the same family)"
    return f"`abliterate repair {facts.name}{source}`"


def _engine(facts: Facts) -> list[Finding]:
    return [Finding(key="engine", level="warning", text=note) for note in facts.version.notes()]


def _template(facts: Facts, base: Facts | None) -> list[Finding]:
    """Who turns a conversation into a prompt: a renderer, a Go template, the Jinja inside, or nobody."""
    if "completion" not in facts.capabilities or facts.modelfile.renderer:
        return []
    legacy = facts.version.generation is Generation.LEGACY
    remedy = mend(facts, base)
    found: list[Finding] = []
    if not facts.template:
        if legacy:
            lost = "; the one inside the GGUF is not read by this version" if facts.jinja else ""
            text = f"no TEMPLATE: turns are run together and tools can't be offered{lost}"
            found.append(Finding(key="template-missing", level="problem", text=text, remedy=remedy))
        elif facts.jinja == "":
            text = "no TEMPLATE, and no chat template inside the GGUF: it continues text, it does not chat"
            found.append(Finding(key="template-missing", level="problem", text=text, remedy=remedy))
        elif facts.dummy and facts.jinja:
            text = "the TEMPLATE is the dummy {{ .Prompt }}, and the engine uses it instead of the one inside the GGUF"
            found.append(Finding(key="template-dummy", level="problem", text=text, remedy=remedy))
        elif facts.dummy and facts.jinja is None:
            text = "the TEMPLATE is the dummy {{ .Prompt }}; whether the GGUF has one can't be seen from here"
            found.append(Finding(key="template-dummy", level="warning", text=text, remedy=remedy))
    elif facts.jinja == "":
        text = "the GGUF has no chat template of its own; the TEMPLATE line is all there is"
        found.append(Finding(key="chat-template-missing", level="note", text=text))
    if facts.jinja and shows_tools(facts.jinja) and "tools" not in facts.capabilities:
        text = "the chat template inside the GGUF offers tools, the model as registered does not"
        found.append(Finding(key="tools-lost", level="problem", text=text, remedy=remedy))
    family = RENDERED.get(facts.architecture)
    if family and not facts.modelfile.parser and (legacy or not facts.jinja):
        text = f"{facts.architecture} models speak through RENDERER and PARSER {family}; this one has neither"
        found.append(Finding(key="renderer-lost", level="problem", text=text, remedy=remedy))
    return found


def _stops(facts: Facts) -> list[Finding]:
    markers = [
        str(value) for key, value in facts.modelfile.parameters if key == "stop" and str(value).strip() in MARKERS
    ]
    if not markers:
        return []
    text = f"stop strings cut tool calls or thoughts off before they are read: {', '.join(markers)}"
    return [Finding(key="stop-markers", level="problem", text=text, remedy=f"`abliterate repair {facts.name}`")]


def _lies(facts: Facts) -> list[Finding]:
    """Capabilities the engine tells of and the template can't keep."""
    said, found = facts.modelfile, list[Finding]()
    if "tools" in facts.capabilities and not (said.renderer or said.parser):
        if facts.template and facts.version.generation is Generation.LEGACY and ".Tools" not in facts.template:
            text = "the engine claims tools, but the TEMPLATE never shows them to the model"
            found.append(Finding(key="tools-lie", level="problem", text=text))
        elif not facts.template and facts.jinja and not shows_tools(facts.jinja):
            text = (
                "the engine claims tools, but the chat template only speaks of them and never shows them to the model"
            )
            found.append(
                Finding(
                    key="tools-lie",
                    level="problem",
                    text=text,
                    remedy="Register it anew: abliterated bakes in a template that does",
                )
            )
        elif facts.template and ".ToolCalls" not in facts.template:
            text = "the TEMPLATE shows tools but not the calls made before: the model won't see what it asked for"
            found.append(Finding(key="tools-one-way", level="warning", text=text))
    if bool(said.renderer) != bool(said.parser) and said.parser != "harmony":
        one, other = ("RENDERER", "PARSER") if said.renderer else ("PARSER", "RENDERER")
        text = f"there is a {one} and no {other}: what is written and what is read may not fit"
        found.append(Finding(key="renderer-unpaired", level="warning", text=text))
    return found


def _against(facts: Facts, base: Facts) -> list[Finding]:
    """What the base has and this model lost."""
    if not same_kind(facts, base):
        text = f"{base.name} is {base.architecture}, this model {facts.architecture}: they are not of one kind"
        return [Finding(key="base-differs", level="warning", text=text)]
    found, remedy = list[Finding](), mend(facts, base)
    for name in ("renderer", "parser"):
        if getattr(base.modelfile, name) and not getattr(facts.modelfile, name):
            text = f"lost {name.upper()} {getattr(base.modelfile, name)}, which {base.name} has"
            found.append(Finding(key=f"{name}-lost", level="problem", text=text, remedy=remedy))
    if base.template and not facts.template and not facts.modelfile.renderer and not _speaks(facts):
        text = f"lost the TEMPLATE that {base.name} has"
        found.append(Finding(key="template-lost", level="problem", text=text, remedy=remedy))
    for note in capability_notes(base.capabilities, facts.capabilities):
        lost = note.endswith("does not")
        key = note.split(":")[0].replace(" ", "-")
        found.append(Finding(key=key, level="problem" if lost else "warning", text=note, remedy=remedy if lost else ""))
    if base.jinja and facts.jinja == "":
        text = f"the GGUF lost the chat template that {base.name} has inside"
        found.append(Finding(key="chat-template-lost", level="warning", text=text))
    told = {"RENDERER", "PARSER", "TEMPLATE"}
    for note in differences(base.modelfile, facts.modelfile):
        if note.split(":")[0] not in told and not _stop_marker(note):
            level: str = "warning" if note.startswith(("PARAMETER stop", "the projector")) else "note"
            text = f"against {base.name}: {note}"
            found.append(Finding(key=note.split(":")[0].lower().replace(" ", "-"), level=level, text=text))  # type: ignore[arg-type]
    return found


def _speaks(facts: Facts) -> bool:
    """Does the engine use the Jinja inside?"""
    return facts.version.generation is not Generation.LEGACY and bool(facts.jinja) and not facts.dummy


def _stop_marker(note: str) -> bool:
    return note.startswith("PARAMETER stop") and any(marker in note for marker in MARKERS)


async def _rendered(client: OllamaClient, facts: Facts) -> list[Finding]:
    """What the engine really writes for the conversations the model claims to take."""
    if not renders(facts.version):
        text = f"Ollama {facts.version.text} does not show rendered prompts"
        return [Finding(key="rendered", level="note", text=text)]
    wanted = {"tools": ("count_ducks",), "tool round trip": ("ducks", "north"), "system": ("say nothing else",)}
    found: list[Finding] = []
    loaded = {str(row.get("name")) for row in await client.ps()}
    try:
        for sentinel in sentinels(facts.capabilities):
            prompt = await render_sentinel(client, facts.name, sentinel)
            if prompt is None:
                text = f"{sentinel.name}: the engine refuses to render it"
                found.append(Finding(key="rendered", level="warning", text=text))
            elif missing := _missing(prompt, wanted.get(sentinel.name, ())):
                text = f"{sentinel.name}: the prompt does not hold {missing}: what was said is lost on the way"
                found.append(Finding(key="rendered", level="problem", text=text))
    finally:
        if facts.name not in loaded:
            try:
                await client.unload(facts.name, seconds=10)
            except AbliteratedError as error:
                found.append(Finding(key="rendered", level="note", text=f"it is still loaded ({error.message})"))
    if not any(finding.level in ("problem", "warning") for finding in found):
        found.append(Finding(key="rendered", level="ok", text="every conversation reaches the prompt whole"))
    return found


def _missing(prompt: str, words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words if word not in prompt)
