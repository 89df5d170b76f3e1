"""Renders a chat template as Hugging Face and llama.cpp do: jinja2, sandboxed, with the few extras templates rely on.

A template is a program by a stranger: the sandbox keeps it from objects, not from running long; who renders an unknown
one gives it a process (see `worker`). Does not know: models, engines.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from abliterate.contract.errors import ModelError

BEGIN, END = "<s>", "</s>"  # what `bos_token` and `eos_token` stand for unless told


class TemplateRefuses(ModelError):
    """The template raises on this conversation, or is no Jinja at all."""


def render(
    jinja: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generate: bool = True,
    **values: Any,
) -> str:
    """The prompt. `generate`: with the opening of the answer. Raises TemplateRefuses."""
    import jinja2

    given: dict[str, Any] = {
        "messages": copy.deepcopy(list(messages)),
        "add_generation_prompt": generate,
        "bos_token": BEGIN,
        "eos_token": END,
        **values,
    }
    try:
        template = _template(jinja)
        if tools:
            return str(template.render(tools=copy.deepcopy(list(tools)), **given))
        try:
            return str(template.render(tools=None, **given))
        except TypeError:  # takes it for a list all the same: llama.cpp leaves it undefined
            return str(template.render(**given))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise TemplateRefuses(f"the chat template refuses: {error}", remedy="Nothing: it is the model's own") from error
    except (RecursionError, MemoryError) as error:
        raise TemplateRefuses("the chat template never ends", remedy="Get another GGUF of this model") from error


@functools.lru_cache(maxsize=16)
def _template(jinja: str) -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(str(message))

    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment.from_string(jinja)


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """JSON as it is, without the escapes that are for web pages."""
    separators = more.get("separators")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=bool(more.get("sort_keys"))
    )
