"""Tool calls: choose one of the listed tools, fill in its arguments, and report its result."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import words
from .chat import Message, dump
from .example import Example, same, same_call
from .tasks_basic import made_up_word

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool with the ways to ask for it and a sentence that reports its result."""

    name: str
    description: str
    parameters: dict[str, str]
    arguments: Callable[[random.Random], Arguments]
    requests: Sequence[str]
    result: Callable[[random.Random], str]
    report: str

    def schema(self) -> dict[str, Any]:
        """The OpenAI form of the description."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(self.parameters),
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _number(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randint(low, high))


def _word(*choices: str) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


def _city(rng: random.Random) -> str:
    return rng.choice((rng.choice(words.CITIES), made_up_word(rng).capitalize()))


TOOLS = (
    Tool(
        "get_weather",
        "Weather of a city",
        {"city": "string"},
        lambda rng: {"city": _city(rng)},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Tell me the weather in {city}.",
        ),
        _word("sunny", "cloudy", "rain", "snow", "wind"),
        "The weather in {city} is: {result}.",
    ),
    Tool(
        "get_time",
        "Time of day in a city",
        {"city": "string"},
        lambda rng: {"city": _city(rng)},
        ("What time is it in {city}?", "Tell me the time in {city}."),
        _number(1, 12),
        "The time in {city} is {result}.",
    ),
    Tool(
        "add_numbers",
        "Sum of two numbers",
        {"a": "integer", "b": "integer"},
        lambda rng: {"a": rng.randint(100, 9999), "b": rng.randint(100, 9999)},
        ("What is {a} + {b}?", "Add {a} and {b}.", "Calculate {a} plus {b}."),
        _number(200, 19998),
        "The sum of {a} and {b} is {result}.",
    ),
    Tool(
        "send_message",
        "Send a text to a person",
        {"to": "string", "text": "string"},
        lambda rng: {"to": rng.choice(words.NAMES), "text": rng.choice(words.PLAIN_WORDS)},
        (
            'Send the message "{text}" to {to}.',
            'Write "{text}" to {to}.',
            'Please tell {to}: "{text}".',
        ),
        _word("sent", "done"),
        "I told {to}: {text}.",
    ),
    Tool(
        "set_alarm",
        "Set an alarm",
        {"hour": "integer", "minute": "integer"},
        lambda rng: {"hour": rng.randint(1, 23), "minute": rng.randint(10, 59)},
        (
            "Set an alarm for {hour}:{minute}.",
            "Wake me at {hour}:{minute}.",
            "I need an alarm at {hour}:{minute}.",
        ),
        _word("set", "done"),
        "Your alarm is set for {hour}:{minute}.",
    ),
    Tool(
        "find_book",
        "Find a book by its author",
        {"author": "string"},
        lambda rng: {"author": f"{rng.choice(words.NAMES)} {rng.choice(words.SURNAMES)}"},
        ("Find a book by {author}.", "Which book did {author} write?"),
        lambda rng: f"The {rng.choice(words.COLOURS)} {rng.choice(words.OBJECTS)}",
        "I found this book by {author}: {result}.",
    ),
    Tool(
        "get_price",
        "Price of an item",
        {"item": "string"},
        lambda rng: {"item": rng.choice((*words.FRUITS, *words.OBJECTS))},
        ("What is the price of the {item}?", "How much does the {item} cost?"),
        _number(1, 99),
        "The price of the {item} is {result}.",
    ),
    Tool(
        "play_music",
        "Play songs of a singer",
        {"singer": "string", "volume": "integer"},
        lambda rng: {"singer": rng.choice(words.NAMES), "volume": rng.randint(1, 99)},
        ("Play music by {singer} at volume {volume}.", "Play {singer} with volume {volume}."),
        _word("playing", "done"),
        "Now you hear {singer}.",
    ),
    Tool(
        "turn_light",
        "Turn a light on or off",
        {"room": "string", "state": "string"},
        lambda rng: {"room": rng.choice(words.PLACES), "state": rng.choice(("on", "off"))},
        ("Turn {state} the light in the {room}.", "Turn the light in the {room} {state}."),
        _word("ok", "done"),
        "The light in the {room} is {state}.",
    ),
    Tool(
        "book_table",
        "Book a table",
        {"name": "string", "people": "integer"},
        lambda rng: {"name": rng.choice(words.NAMES), "people": rng.randint(1, 20)},
        (
            "Book a table for {people} people, name {name}.",
            "Please book a table for {name} and {people} people.",
        ),
        _word("booked", "done"),
        "A table for {people} people is booked for {name}.",
    ),
    Tool(
        "translate",
        "Translate a word",
        {"word": "string", "language": "string"},
        lambda rng: {
            "word": rng.choice(words.PLAIN_WORDS),
            "language": rng.choice(("French", "German", "Spanish", "Polish")),
        },
        ('Translate "{word}" to {language}.', 'What is "{word}" in {language}?'),
        made_up_word,
        "In {language} it is: {result}.",
    ),
    Tool(
        "find_route",
        "Route between two cities",
        {"start": "string", "goal": "string"},
        lambda rng: dict(zip(("start", "goal"), rng.sample(words.CITIES, 2), strict=True)),
        ("How do I get from {start} to {goal}?", "Find a route from {start} to {goal}."),
        lambda rng: f"{rng.randint(2, 99)} km",
        "The way from {start} to {goal} is {result}.",
    ),
)


def random_tool(rng: random.Random) -> Tool:
    """A tool with an invented name, so that names are read and not remembered."""
    verb = rng.choice(("get", "find", "show", "check", "read"))
    noun = rng.choice((*words.OBJECTS, *words.ANIMALS))
    argument = rng.choice(("name", "item", "place", "owner", "id"))
    return Tool(
        f"{verb}_{noun}",
        f"{verb.capitalize()} the {noun}",
        {argument: "string"},
        lambda rng: {argument: rng.choice((rng.choice(words.NAMES), made_up_word(rng)))},
        (
            f"{verb.capitalize()} the {noun} for {{{argument}}}.",
            f"Please {verb} the {noun} for {{{argument}}}.",
        ),
        _word(*words.PLAIN_WORDS),
        f"The {noun} for {{{argument}}} is: {{result}}.",
    )


def pick(rng: random.Random) -> tuple[Tool, list[dict[str, Any]]]:
    """The tool to use, and the listed tools: it and up to two others."""
    tool = random_tool(rng) if rng.random() < 0.3 else rng.choice(TOOLS)
    others = [other for other in rng.sample(TOOLS, 3) if other.name != tool.name]
    listed = [tool, *others[: rng.randint(0, 2)]]
    rng.shuffle(listed)
    return tool, [entry.schema() for entry in listed]


def tool_call(rng: random.Random) -> Example:
    """A request that one of the listed tools answers."""
    tool, tools = pick(rng)
    arguments = tool.arguments(rng)
    question = rng.choice(tool.requests).format(**arguments)
    call = {"name": tool.name, "arguments": arguments}
    return Example(
        "tool_call",
        dump(call),
        [Message("user", question)],
        Message("assistant", "", call),
        same_call(call),
        tools=tools,
    )


def tool_result(rng: random.Random) -> Example:
    """The answer in words after the tool has replied."""
    tool, tools = pick(rng)
    arguments = tool.arguments(rng)
    question = rng.choice(tool.requests).format(**arguments)
    result = tool.result(rng)
    messages = [
        Message("user", question),
        Message("assistant", "", {"name": tool.name, "arguments": arguments}),
        Message("tool", result),
    ]
    answer = tool.report.format(**arguments, result=result)
    key = dump([tool.name, arguments, result])
    return Example(
        "tool_result", key, messages, Message("assistant", answer), same(answer), tools=tools
    )
