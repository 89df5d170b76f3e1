"""What `/api/show` and `/api/tags` say about a model. Pure.

Does not know: where the model came from, whether it is loaded.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from abliterated.engine.models import Model
from abliterated.engine.store import Stored

# Left out of model_info, as Ollama leaves them out.
_HIDDEN = ("general.name", "tokenizer.chat_template")


def stamp(seconds: float) -> str:
    """RFC 3339 with the local offset."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat()


def listing(stored: Stored, model: Model | None) -> dict[str, Any]:
    """One entry of `/api/tags`."""
    name = stored.name.short()
    entry: dict[str, Any] = {
        "name": name,
        "model": name,
        "modified_at": stamp(stored.modified),
        "size": stored.size,
        "digest": stored.digest,
        "details": {},
    }
    if model:
        lengths = {key: model.header.number(key) for key in ("context_length", "embedding_length")}
        entry["details"] = {**model.details, **lengths}
        entry["capabilities"] = model.capabilities
    return entry


def show(model: Model, *, values: dict[str, Any], system: str | None = None) -> dict[str, Any]:
    """The answer to `/api/show`; `values` are the key-values to tell (with long arrays, or with None for them)."""
    answer: dict[str, Any] = {
        "modelfile": modelfile(model, system),
        "template": model.template or model.header.chat_template,
        "details": model.details,
        "model_info": {
            **{key: value for key, value in sorted(values.items()) if key not in _HIDDEN},
            "general.parameter_count": model.header.parameters,
        },
        "tensors": [{"name": t.name, "type": t.kind, "shape": list(t.shape)} for t in model.header.tensors],
        "capabilities": model.capabilities,
        "modified_at": stamp(model.stored.modified),
    }
    optional = {
        "license": "\n".join(model.licenses),
        "system": model.system if system is None else system,
        "parameters": parameters(model.parameters),
        "messages": model.messages,
        "requires": model.config.requires,
    }
    return answer | {key: value for key, value in optional.items() if value}


def parameters(values: dict[str, Any]) -> str:
    """One `name value` a line, strings quoted, a list over several lines."""
    return "\n".join(f"{key:<30} {_literal(value)}" for key, value in _pairs(values))


def modelfile(model: Model, system: str | None = None) -> str:
    """A Modelfile that makes the model again on this machine."""
    lines = [
        "# A Modelfile of this model. On another machine, write instead of the first FROM:",
        f"# FROM {model.name}",
        "",
    ]
    lines.append(f"FROM {model.path}")
    if model.projector:
        lines.append(f"FROM {model.projector}")
    if model.template:
        lines.append(f"TEMPLATE {_quote(model.template)}")
    text = model.system if system is None else system
    if text:
        lines.append(f"SYSTEM {_quote(text)}")
    lines += [f"PARAMETER {key} {_quote(_plain(value))}" for key, value in _pairs(model.parameters)]
    lines += [f"LICENSE {_quote(text)}" for text in model.licenses]
    for word, text in (
        ("RENDERER", model.config.renderer),
        ("PARSER", model.config.parser),
        ("REQUIRES", model.config.requires),
    ):
        if text:
            lines.append(f"{word} {text}")
    lines += [f"MESSAGE {message.get('role', '')} {_quote(message.get('content', ''))}" for message in model.messages]
    return "\n".join(lines) + "\n"


def _pairs(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, item) for key, value in sorted(values.items()) for item in (value if isinstance(value, list) else [value])
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _literal(value)


def _literal(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def _quote(text: str) -> str:
    """As Ollama writes a Modelfile: bare on one line, quoted when longer, three quotes when it holds a quote."""
    if "\n" not in text and text == text.strip(" "):
        return text
    return f'"""{text}"""' if '"' in text else f'"{text}"'
