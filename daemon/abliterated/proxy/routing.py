"""Names and where they lead: routes that name a model, patterns, aliases, further upstreams. Pure.

Does not know: which models exist, sockets, bodies.
"""

from __future__ import annotations

import fnmatch
import functools
from typing import Final

import msgspec

from abliterate.contract.errors import RecipeError
from abliterate.contract.names import SUFFIX, ModelName, parse_name

DEFAULT_UPSTREAM: Final = 0


class Route(msgspec.Struct, frozen=True):
    """A request that names a model in its body."""

    name: str
    inference: bool
    second: bool = False  # `name` is an older spelling of `model` here


def _routes() -> dict[bytes, Route]:
    found = {}
    for path in (
        "/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions",
        "/v1/embeddings", "/v1/responses", "/v1/messages",
    ):  # fmt: skip
        found[b"POST " + path.encode()] = Route(path, inference=True)
    for path in ("/api/show", "/api/pull", "/api/push"):
        found[b"POST " + path.encode()] = Route(path, inference=False, second=True)
    found[b"DELETE /api/delete"] = Route("/api/delete", inference=False, second=True)
    return found


ROUTES: Final = _routes()


def route_of(method: bytes, target: bytes) -> Route | None:
    return ROUTES.get(method + b" " + target.partition(b"?")[0])


class Rules(msgspec.Struct, frozen=True):
    """What the configuration says of names. `others`: pattern and place of each further upstream (1, 2, …)."""

    patterns: tuple[str, ...] = ("*" + SUFFIX,)
    aliases: tuple[tuple[str, str], ...] = ()  # by key, to the name as it is to be said
    others: tuple[tuple[str, int], ...] = ()

    @property
    def steer(self) -> bool:
        """Must a name be known before anything goes on?"""
        return bool(self.aliases or self.others)


def make_rules(patterns: list[str], aliases: dict[str, str], others: list[tuple[str, int]]) -> Rules:
    """Check what a person wrote. Raises RecipeError."""
    keyed: list[tuple[str, str]] = []
    for alias, name in aliases.items():
        try:
            parse_name(name)
            keyed.append((parse_name(alias).key(), name))
        except RecipeError as error:
            raise RecipeError(f"proxy.aliases: {error.message}", remedy=error.remedy) from error
    for pattern in (*patterns, *(pattern for pattern, _ in others)):
        if not pattern.strip():
            raise RecipeError("an empty pattern matches no model", remedy="write one such as '*-abliterated'")
    return Rules(tuple(patterns), tuple(keyed), tuple(others))


class Place(msgspec.Struct, frozen=True):
    """Where a name leads."""

    name: str  # as it is to be said upstream
    renamed: bool
    upstream: int
    abliterated: bool
    cloud: bool
    base: str = ""  # of an abliterated name: the model it would be made of, "" where that can't be told
    said_by_default: bool = True  # the name is the one `submit BASE` would give


UNKNOWN: Final = Place("", renamed=False, upstream=DEFAULT_UPSTREAM, abliterated=False, cloud=False)


@functools.lru_cache(maxsize=1024)
def place_of(said: str, rules: Rules) -> Place:
    """Where the model `said` leads; a name Ollama would refuse leads where every other does."""
    try:
        name = parse_name(said)
    except RecipeError:
        return UNKNOWN
    renamed = dict(rules.aliases).get(name.key())
    if renamed is not None:
        name = parse_name(renamed)
    upstream = next((place for pattern, place in rules.others if matches(pattern, name)), DEFAULT_UPSTREAM)
    pattern = next((pattern for pattern in rules.patterns if matches(pattern, name)), "")
    base, by_default = base_of(pattern, name) if pattern else (None, True)
    return Place(
        renamed if renamed is not None else said,
        renamed is not None,
        upstream,
        bool(pattern),
        name.tag == "cloud" or name.tag.endswith("-cloud"),
        base.short() if base is not None else "",
        by_default,
    )


def matches(pattern: str, name: ModelName) -> bool:
    """Name part, tag part, or the whole as people write it; without case, as Ollama compares."""
    wanted = pattern.lower()
    short = name.short().lower()
    texts = (name.model.lower(), name.tag.lower(), f"{name.model}:{name.tag}".lower(), short, name.key())
    return any(fnmatch.fnmatchcase(text, wanted) for text in texts)


def base_of(pattern: str, name: ModelName) -> tuple[ModelName | None, bool]:
    """The model an abliterated name speaks of, and whether `submit` would give the product that very name."""
    fixed = pattern.strip("*")
    if not fixed or any(character in fixed for character in "*?[:/"):
        return None, True
    for part in ("model", "tag"):
        text: str = getattr(name, part)
        if not fnmatch.fnmatchcase(text.lower(), pattern.lower()):
            continue
        place = text.lower().rfind(fixed.lower()) if pattern.startswith("*") else 0
        rest = (text[:place] + text[place + len(fixed) :]).strip("-_.")
        if not rest and part == "tag":
            rest = "latest"
        if not rest:
            return None, True
        base = _with(name, part, rest)
        return base, part == "model" and name.model == base.model + SUFFIX
    return None, True


def _with(name: ModelName, part: str, text: str) -> ModelName:
    values = {"host": name.host, "namespace": name.namespace, "model": name.model, "tag": name.tag}
    return ModelName(**(values | {part: text}))
