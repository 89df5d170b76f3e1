"""A contract's tables and keys, with their defaults, and what each takes as a person reads it.

Knows msgspec structs; does not know which contract, nor what a key is for. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import inspect


@dataclass(frozen=True)
class Table:
    """One table of a document: its name, how its heading is written, and its keys' struct."""

    name: str
    heading: str
    kind: type[msgspec.Struct]

    @property
    def about(self) -> str:
        """What it is for, from the struct's docstring: "`[name]`: this."."""
        return " ".join((self.kind.__doc__ or "").partition(": ")[2].split()).rstrip(".")


@dataclass(frozen=True)
class Key:
    """One key: `default` is None where it must be given."""

    name: str
    annotation: Any
    default: Any

    @property
    def takes(self) -> str:
        """The choices or bounds its annotation names."""
        return allowed(self.annotation)


def tables(kind: type[msgspec.Struct]) -> Iterator[Table]:
    """The tables of a document, in order."""
    for field in msgspec.structs.fields(kind):
        if inner := _struct(field.type):
            name = field.encode_name
            yield Table(name, f"[{name}]" if inner is field.type else f"[[{name}]]", inner)


def keys(kind: type[msgspec.Struct]) -> list[Key]:
    """The keys of a table that are no tables themselves."""
    return [
        Key(field.encode_name, field.type, _default(field))
        for field in msgspec.structs.fields(kind)
        if not _struct(field.type)
    ]


def dotted(kind: type[msgspec.Struct]) -> list[str]:
    """Every key of a document, as `table.key`."""
    inner = [f"{table.name}.{key.name}" for table in tables(kind) for key in keys(table.kind)]
    return [key.name for key in keys(kind)] + inner


def toml(value: Any) -> str:
    """A TOML value; JSON's spelling of text, numbers, booleans and lists is TOML's as well."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def allowed(annotation: Any) -> str:
    """The choices or bounds an annotation names, as a person reads them."""
    info = inspect.type_info(annotation)
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    for option in (annotation, *get_args(annotation)):  # msgspec's own list of the values is sorted
        if get_origin(option) is Literal and len(get_args(option)) > 1:
            return " | ".join(str(value) for value in get_args(option))
    if len(options) == 1 and isinstance(options[0], inspect.IntType | inspect.FloatType):
        low = options[0].ge if options[0].ge is not None else options[0].gt
        high = options[0].le
        if low is not None and high is not None and high < 2**31:
            return f"{low:.12g} to {high:.12g}"
    return ""


def _struct(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct of a table, or of a list of tables."""
    (inner,) = get_args(annotation) if get_origin(annotation) is list else (annotation,)
    return inner if isinstance(inner, type) and issubclass(inner, msgspec.Struct) else None


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.default is msgspec.NODEFAULT else field.default
