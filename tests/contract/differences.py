"""Where engines may differ, as data; everything else every engine must answer alike.

The embedded engine follows the newest generation, but for what is said here.

Does not know: how an engine is started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engines import Engine


@dataclass(frozen=True)
class Expected:
    """What one engine answers where generations differ."""

    #: Without a TEMPLATE layer, chats use the GGUF's own Jinja, and /api/show tells it (and its tools). Since 0.30.
    reads_jinja: bool = True
    #: /v1 errors have a type of their own kind; before 0.14 it was always `api_error`.
    openai_error_types: bool = True
    #: /api/show lists tensors though nobody asked with `verbose`. No longer at 0.34.
    tensors_unasked: bool = False
    #: Embeddings come from any model. Since 0.30 only from one whose GGUF names a pooling type; the others get 501.
    embeds_any_model: bool = False
    #: /api/tags lists capabilities. Since 0.30.
    tags_capabilities: bool = True
    #: The name in "model '…' not found" of /api/show carries its default tag.
    shows_full_name_missing: bool = True
    #: A TEMPLATE layer is rendered; ours stores it verbatim and renders the GGUF's Jinja, whose tools count.
    renders_go_template: bool = True
    #: /api/create checks what it was given before the first byte: a status, where Ollama has a last line in the stream.
    creates_checked: bool = False
    #: The status for a `files` entry that names no blob there is.
    missing_blob_status: int = 500
    #: `/v1/responses`. Since 0.13.3.
    has_responses: bool = True
    #: `/v1/messages`. Since 0.14.
    has_messages: bool = True
    #: `_debug_render_only` shows the prompt. Since 0.11.5; before, the field is not known and the model answers.
    shows_prompts: bool = True
    #: `/api/show` says `thinking` only of a template with `<think>` tags; ours also of other marks llama.cpp splits at.
    thinks_in_tags_alone: bool = True


NEWEST = Expected()


def expected(engine: Engine) -> Expected:
    if engine.embedded:
        return replace(
            NEWEST,
            tensors_unasked=True,
            embeds_any_model=True,
            shows_full_name_missing=False,
            renders_go_template=False,
            creates_checked=True,
            missing_blob_status=400,
            thinks_in_tags_alone=False,
        )
    assert engine.version is not None
    if engine.version >= (0, 30, 0):
        return NEWEST
    return Expected(
        reads_jinja=False,
        openai_error_types=engine.version >= (0, 14, 0),
        tensors_unasked=True,
        embeds_any_model=True,
        tags_capabilities=False,
        shows_full_name_missing=False,
        has_responses=engine.version >= (0, 13, 3),
        has_messages=engine.version >= (0, 14, 0),
        shows_prompts=engine.version >= (0, 11, 5),
    )
