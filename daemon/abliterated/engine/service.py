"""What both APIs are made of: a model by its name, a runner for it, an answer as events.

Does not know: HTTP, the shape of an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterated.engine import chat, completion, options
from abliterated.engine.create import Creator
from abliterated.engine.errors import ContextExceeded, RunnerGone
from abliterated.engine.models import Library, Model
from abliterated.engine.pool import Pool, Want
from abliterated.engine.store import Store
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import End, Events, Message

_MEAN = 1


@dataclass
class Clock:
    """When a request began and when its model was there; nanoseconds."""

    began: int = field(default_factory=time.perf_counter_ns)
    loaded: int = 0

    def counters(self, end: End) -> dict[str, int]:
        return {
            "total_duration": time.perf_counter_ns() - self.began,
            "load_duration": max(self.loaded - self.began, 0),
            "prompt_eval_count": end.prompt_tokens,
            "prompt_eval_duration": end.prompt_nanoseconds,
            "eval_count": end.tokens,
            "eval_duration": end.nanoseconds,
        }


@dataclass(frozen=True)
class Question:
    """One thing asked of a model: messages, or a raw prompt."""

    model: Model
    asked: str  # the name as the request spelled it
    messages: Sequence[Message] = ()
    prompt: str | None = None
    tools: Sequence[Any] = ()
    think: bool | str | None = None
    form: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    keep: float | None = options.KEEP_ALIVE
    truncate: bool = True
    logprobs: bool = False
    top_logprobs: int = 0

    def check(self, verb: str) -> None:
        """Refuse what the model can't do, before anything is loaded."""
        able = self.model.capabilities
        if "completion" not in able:
            raise Refused(400, f'"{self.asked}" does not support {verb}')
        if self.tools and "tools" not in able:
            raise Refused(400, f"{self.model.stored.name.full()} does not support tools")
        chat.thinking(self.model, self.asked, self.think)
        chat.constraint(self.form)
        options.sampling(self.settings)
        chat.messages(self.model, self.messages)

    def body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {**options.sampling(self.settings), "cache_prompt": True}
        if self.prompt is not None:
            schema = chat.schema(self.form)
            extra: dict[str, Any] = {"json_schema": schema} if schema is not None else {}
            if self.logprobs:
                extra["n_probs"] = max(self.top_logprobs, 1)
            return {**body, "prompt": self.prompt, **extra}
        body |= chat.thinking(self.model, self.asked, self.think) | chat.constraint(self.form)
        if self.tools:
            body["tools"] = list(self.tools)
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {**body, "messages": messages}


class Service:
    def __init__(self, models: Path) -> None:
        self.store = Store(models)
        self.library = Library(self.store)
        self.pool = Pool()
        self.lock = asyncio.Lock()  # one change of the store at a time
        self.creator = Creator(self.store, self.library, self.pool.probe, self.lock)

    def model(self, name: str | None) -> Model:
        return self.library.open(self.store.get(name))

    def want(self, model: Model, asked: dict[str, Any], *, embedding: bool = False) -> Want:
        pooled = f"{model.header.architecture}.pooling_type" in model.header.values
        return Want(
            name=model.name,
            digest=model.stored.digest,
            path=model.path,
            load=options.load(asked, model.context_length),
            projector=model.projector,
            embedding=embedding,
            pooling=None if pooled else _MEAN,
        )

    async def answer(self, question: Question, clock: Clock) -> Events:
        """The answer as it comes. Closing the generator aborts it."""
        for attempt in (1, 2):
            try:
                async with aclosing(self._answer(question, clock)) as events:
                    async for event in events:
                        yield event
                return
            except RunnerGone:
                if attempt == 2:
                    raise

    async def _answer(self, question: Question, clock: Clock) -> Events:
        messages: list[dict[str, Any]] | None = chat.messages(question.model, question.messages)
        async with self.pool.lease(self.want(question.model, question.settings), question.keep) as runner:
            clock.loaded = time.perf_counter_ns()
            talk = completion.chat if question.prompt is None else completion.complete
            begun = False
            while messages is not None:
                try:
                    async with aclosing(talk(runner, question.body(messages))) as events:
                        async for event in events:
                            begun = True
                            yield event
                    return
                except ContextExceeded:
                    messages = _forget(messages)
                    if begun or not question.truncate or messages is None:
                        raise

    async def render(self, question: Question) -> str:
        """The prompt the model's template makes of the question, not asked."""
        messages = chat.messages(question.model, question.messages)
        if question.prompt is not None:
            return question.prompt
        async with self.pool.lease(self.want(question.model, question.settings), question.keep) as runner:
            answer = await completion.ask(runner, "/apply-template", question.body(messages))
            return str(answer.get("prompt", ""))

    async def load(self, model: Model, asked: dict[str, Any], keep: float | None) -> None:
        async with self.pool.lease(self.want(model, asked), keep):
            pass

    async def embed(
        self, model: Model, texts: Sequence[str], asked: dict[str, Any], keep: float | None, *,
        truncate: bool = True, normalize: bool = True, clock: Clock,
    ) -> tuple[list[list[float]], int]:  # fmt: skip
        """One vector for each text, and how many tokens they had together."""
        async with self.pool.lease(self.want(model, asked, embedding=True), keep) as runner:
            clock.loaded = time.perf_counter_ns()
            body: dict[str, Any] = {"input": list(texts), "embd_normalize": 2 if normalize else -1}
            try:
                answer = await completion.ask(runner, "/v1/embeddings", body)
            except Refused as error:
                if not truncate or (error.status >= 500 and "too large" not in str(error)):
                    raise
                limit = min(runner.want.load.context, 8192) - 2
                cut = [
                    (await completion.ask(runner, "/tokenize", {"content": text, "add_special": True}))["tokens"][
                        :limit
                    ]
                    for text in texts
                ]
                answer = await completion.ask(runner, "/v1/embeddings", {**body, "input": cut})
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return [row["embedding"] for row in rows], int(answer["usage"]["prompt_tokens"])


def _forget(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation without its oldest turn; None when only the last message (and systems) would be left to drop."""
    talk = [place for place, message in enumerate(messages) if message["role"] != "system"]
    if len(talk) < 2:
        return None
    drop = {talk[0]}
    for place in talk[1:-1]:
        if messages[place]["role"] != "tool":
            break
        drop.add(place)
    return [message for place, message in enumerate(messages) if place not in drop]
