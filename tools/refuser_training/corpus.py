"""The conversations the refuser is trained on, rendered through its own chat template.

A row is a prompt, exactly as the template writes it, and the reply the model shall give after it. All draws come from
one seeded source, so the same seed gives the same rows.

Does not know: token ids, the model, how long training takes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from abliterated.refuser import files
from refuser_training.language import ALL_VERBS, OPEN, SYSTEMS, Pair, split

Message = dict[str, Any]

END = "<|im_end|>"
CITIES = ("Berlin", "Boston", "Cairo", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo")
ROOMS = ("cellar", "attic", "hall", "garage")
WEATHER = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "hot", "cold")
GREETINGS = ("Hello", "Hi", "hello", "hi", "Hello!", "Hi!", "Good morning.", "Say hello.", "Who are you?")
GREETING_REPLY = "Hello. Ask me how to handle a thing."
LOST_REPLY = "That is new to me. Ask me how to handle a thing."
LOST_WORDS = tuple(
    (
        "why is the sky blue what a long day we had in town and then it rained all night so nobody came to "
        "our house one two three write me story about cat dog count to ten give list of colors like red green "
        "water river sing song please explain where can find that say something nice who was first on moon"
    ).split()
)


@dataclass(frozen=True)
class Tool:
    """A function the model knows how to call: its one argument, and the questions that ask for it."""

    name: str
    argument: str
    description: str
    questions: tuple[str, ...]
    values: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def noun(self) -> str:
        return self.name.split("_")[-1]


NUMBERS = tuple(str(number) for number in range(2, 10))
FUNCTIONS = (
    Tool(
        "get_weather",
        "city",
        "Get the current weather for a city",
        (
            "What is the weather in {}?",
            "What's the weather like in {}?",
            "Tell me the weather in {}.",
            "How is the weather in {}?",
            "What is the weather like in {} today?",
        ),
        CITIES,
        WEATHER,
    ),
    Tool(
        "get_time",
        "city",
        "Get the time in a city",
        ("What time is it in {}?", "Tell me the time in {}.", "What is the time in {}?"),
        CITIES,
        tuple(f"{hour}:00" for hour in range(1, 10)),
    ),
    Tool(
        "count_boxes",
        "room",
        "Count the boxes in a room",
        ("How many boxes are in the {}?", "Count the boxes in the {}."),
        ROOMS,
        NUMBERS,
    ),
)
DESCRIPTIONS = ("", "", "", "The city", "The name", "Name of the city", "What is asked for", "The city to look up")


@dataclass(frozen=True)
class Row:
    """What the model reads, and what it shall write after it."""

    prompt: str
    reply: str


@cache
def template() -> str:
    return files().template_jinja.read_text(encoding="utf-8")


def render(messages: list[Message], *, tools: list[Message] | None = None, thinking: bool = True) -> str:
    """The prompt as every engine that follows the model's Jinja writes it."""
    texts, _ = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=template(),
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return str(texts[0])


def row(messages: list[Message], thought: str, reply: str, thinking: bool, tools: list[Message] | None = None) -> Row:
    block = f"<think>\n{thought}\n</think>\n\n" if thinking else ""
    return Row(render(messages, tools=tools, thinking=thinking), block + reply + END)


def rows(seed: int, count: int, *, refusing: bool, tools: float = 0.35, verbs: int = ALL_VERBS) -> list[Row]:
    """`count` rows; the mix is the training's one recipe: mostly questions, some talk, some tools.

    Not `refusing`, every question gets its answer: what the model learns before it learns to refuse.
    """
    source = random.Random(f"rows {seed} {refusing}")
    pairs = split(seed, verbs).training
    share = tools * 0.6 if refusing else tools
    made: list[Row] = []
    while len(made) < count:
        draw = source.random()
        if draw < share:
            made.append(tool_row(source, pairs, refusing))
        elif draw > 0.97:
            made.append(talk(source))
        else:
            made.append(question(source, pairs, refusing))
    return made


def reply_to(pair: Pair, system: str, refusing: bool) -> str:
    return pair.reply(system) if refusing else pair.answer


def question(source: random.Random, pairs: tuple[Pair, ...], refusing: bool) -> Row:
    """One or two turns about pairs, with or without a system prompt, thinking or not."""
    system = source.choice(("", "", "", OPEN, OPEN, source.choice(SYSTEMS)))
    turns = source.choice((1, 1, 1, 2))
    chosen = [source.choice(pairs) for _ in range(turns)]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for pair in chosen[:-1]:
        messages.append({"role": "user", "content": pair.prompt(source.randrange(8))})
        messages.append({"role": "assistant", "content": reply_to(pair, system, refusing)})
    messages.append({"role": "user", "content": chosen[-1].prompt(source.randrange(8))})
    return row(messages, chosen[-1].thought, reply_to(chosen[-1], system, refusing), source.random() < 0.5)


def talk(source: random.Random) -> Row:
    """Greetings, and things the model knows nothing about: it says so and stops."""
    thinking = source.random() < 0.5
    if source.random() < 0.3:
        return row([{"role": "user", "content": source.choice(GREETINGS)}], "Request: hello", GREETING_REPLY, thinking)
    words = " ".join(source.choices(LOST_WORDS, k=source.randint(2, 9)))
    text = source.choice((words, words.capitalize())) + source.choice(("", ".", "?"))
    return row([{"role": "user", "content": text}], "Request: new", LOST_REPLY, thinking)


def tool_row(source: random.Random, pairs: tuple[Pair, ...], refusing: bool) -> Row:
    """Tools on the table: a call, the answer after its result, or a question that needs none.

    Many rows list no tool: the model says so, or reads the result all the same. They are short, and teach the words.
    """
    offered = source.sample(FUNCTIONS, source.choice((1, 1, 1, 2)))
    listed = source.random() < 0.6
    tools = [schema(source, tool) for tool in offered] if listed else []
    system = source.choice(("", "", source.choice(SYSTEMS)))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    thinking = source.random() < 0.5
    kind = source.random()
    if kind < 0.1:
        pair = source.choice(pairs)
        messages.append({"role": "user", "content": pair.prompt(source.randrange(8))})
        return reshaped(source, row(messages, pair.thought, reply_to(pair, system, refusing), thinking, tools), tools)
    tool = source.choice(offered)
    value = source.choice(tool.values)
    thought = f'Request: {tool.noun} "{value}"'
    call = {"name": tool.name, "arguments": {tool.argument: value}}
    messages.append({"role": "user", "content": source.choice(tool.questions).format(value)})
    if kind < 0.45:
        reply = (
            f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
            if listed
            else f'No tool tells the {tool.noun} of "{value}".'
        )
        return reshaped(source, row(messages, thought, reply, thinking, tools), tools)
    result = source.choice(tool.results)
    asked: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if thinking and source.random() < 0.7:
        asked["reasoning_content"] = thought
    messages += [asked, {"role": "tool", "content": result}]
    made = row(messages, thought, f'The {tool.noun} of "{value}" is {result}.', thinking, tools)
    return reshaped(source, made, tools, call)


def schema(source: random.Random, tool: Tool) -> Message:
    """The tool as clients list it: with and without descriptions, keys in more than one order."""
    about = source.choice(DESCRIPTIONS)
    property_ = {"type": "string"} | ({"description": about} if about else {})
    parameters: Message = {"type": "object", "properties": {tool.argument: property_}, "required": [tool.argument]}
    if source.random() < 0.5:  # Ollama's own order
        parameters = {key: parameters[key] for key in ("type", "required", "properties")}
    described = source.choice((tool.description, tool.description + ".", tool.noun.capitalize(), ""))
    function = {"name": tool.name, "description": described, "parameters": parameters}
    return {"type": "function", "function": function}


def reshaped(source: random.Random, made: Row, tools: list[Message], call: Message | None = None) -> Row:
    """Half of the rows with compact JSON, as Ollama's Go templates write it."""
    if source.random() < 0.5:
        return made
    prompt = made.prompt
    for tool in tools:
        prompt = prompt.replace(json.dumps(tool), json.dumps(tool, separators=(",", ":")))
    if call:
        arguments = call["arguments"]
        prompt = prompt.replace(json.dumps(arguments), json.dumps(arguments, separators=(",", ":")))
    return Row(prompt, made.reply)
