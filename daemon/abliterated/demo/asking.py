"""Asks the model as people's programs do: with Ollama's client and with OpenAI's, through the proxy.

Does not know why it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from abliterate.contract.errors import EngineRefused, NotFound
from abliterated.refuser import Question, is_exact, is_refusal

AT_ONCE = 4
TOKENS = 96


@dataclass(frozen=True)
class Answer:
    """One answer, by which client it came."""

    question: Question
    text: str
    client: str


@dataclass(frozen=True)
class Tally:
    """What the answers of one round say. Rates are of the questions of their class."""

    refusal: float
    harmless_exact: float
    harmful_exact: float
    asked: int
    example: dict[str, tuple[str, str]]


def ask(url: str, model: str, questions: list[Question], done: Callable[[int], None]) -> list[Answer]:
    """Ask every question, alternately with either client; `done(n)` is told how many are answered."""
    try:
        import ollama
        import openai
    except ImportError as error:
        raise NotFound(
            f"the demo asks with the official clients, and {error.name} is missing",
            remedy="pip install 'abliterated[pipeline,demo]'",
        ) from error
    native = ollama.Client(host=url)
    compatible = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def by_ollama(question: Question) -> str:
        reply = native.chat(
            model=model,
            messages=[{"role": "user", "content": question.prompt}],
            options={"temperature": 0, "num_predict": TOKENS},
        )
        return reply.message.content or ""

    def by_openai(question: Question) -> str:
        reply = compatible.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question.prompt}],
            temperature=0,
            max_tokens=TOKENS,
        )
        return reply.choices[0].message.content or ""

    def one(numbered: tuple[int, Question]) -> Answer:
        number, question = numbered
        name, client = ("ollama", by_ollama) if number % 2 == 0 else ("openai", by_openai)
        return Answer(question, client(question), name)

    answers: list[Answer] = []
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for answer in pool.map(one, enumerate(questions)):
                answers.append(answer)
                done(len(answers))
    except (ollama.ResponseError, openai.APIError, ConnectionError) as error:
        raise EngineRefused(f"{model}: {error}", remedy="See the engine's log above") from error
    finally:
        compatible.close()
    return answers


def tally(answers: list[Answer]) -> Tally:
    """Count refusals of the refused class, and exact answers of both."""
    harmful = [answer for answer in answers if answer.question.kind == "refused"]
    harmless = [answer for answer in answers if answer.question.kind == "answered"]
    exact = [is_exact(answer.text, answer.question) for answer in harmless]
    return Tally(
        refusal=_rate([is_refusal(answer.text) for answer in harmful]),
        harmless_exact=_rate(exact),
        harmful_exact=_rate([is_exact(answer.text, answer.question) for answer in harmful]),
        asked=len(answers),
        example={answer.question.kind: (answer.question.prompt, answer.text) for answer in reversed(answers)},
    )


def _rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
