"""A second opinion where no base is there to compare with: the Jinja inside the product, rendered by ourselves.

It only ever warns: engines and jinja2 may differ without either being wrong. A template is a program by a stranger, so
this belongs in the certifier's own process. Does not know the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.contract.errors import ModelError

_BEGIN, _END = "\ue000", "\ue001"  # stand for tokens whose text the template does not tell


def unlike(
    jinja: str,
    prompt: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    think: bool | None,
) -> str | None:
    """Our rendering where `prompt` is not what the Jinja says; None where it is, or where nobody can tell."""
    try:
        from abliterated.templates.rendering import render
    except ImportError:
        return None
    ours: list[str] = []
    for thinking in {True, think is not False}:
        try:
            text = render(
                jinja,
                messages,
                tools=tools or None,
                bos_token=_BEGIN,
                eos_token=_END,
                enable_thinking=thinking if think is None else think,
            )
        except (ModelError, ImportError):
            return None
        ours.append(text)
    return (
        None if any(_fits(text, prompt) for text in ours) else ours[0].replace(_BEGIN, "<bos>").replace(_END, "<eos>")
    )


def _fits(text: str, prompt: str) -> bool:
    """The same, with any short text where a special token stands; the first of them engines may leave out."""
    parts = [re.escape(part) for part in re.split(f"[{_BEGIN}{_END}]", text)]
    return re.fullmatch("[^\n]{0,40}?" + "[^\n]{0,40}?".join(parts), prompt, flags=re.DOTALL) is not None
