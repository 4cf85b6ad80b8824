"""Tasks that read a context: lookups, missing facts, JSON answers, memory of a dialogue."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from . import words
from .chat import Message, dump
from .example import Example, ask, is_held_out, same, same_json
from .tasks_basic import made_up_word

UNKNOWN = "I do not know."
Fact = tuple[str, str, str]  # attribute, owner, value


def subject(rng: random.Random) -> str:
    """Who a fact is about: a name, a name with surname, or an invented name."""
    kind = rng.random()
    if kind < 0.85:
        return rng.choice(words.NAMES)
    if kind < 0.93:
        return f"{rng.choice(words.NAMES)} {rng.choice(words.SURNAMES)}"
    return made_up_word(rng).capitalize()


def value_of(rng: random.Random, attribute: str) -> str:
    """A value that fits the attribute."""
    if attribute in words.NUMBER_ATTRIBUTES:
        return str(rng.randint(2, 99) if attribute == "age" else rng.randint(10, 999))
    if attribute == "city":
        return rng.choice(words.CITIES)
    if attribute == "job":
        return rng.choice(words.JOBS)
    if attribute == "pet":
        return rng.choice(words.ANIMALS)
    if attribute == "favourite fruit":
        return rng.choice(words.FRUITS)
    if attribute == "password":
        return made_up_word(rng)
    return rng.choice(words.COLOURS)


ALL_ATTRIBUTES = tuple(
    dict.fromkeys(
        (
            *words.ATTRIBUTES,
            *words.NUMBER_ATTRIBUTES,
            "city",
            "job",
            "pet",
            "favourite fruit",
            "password",
        )
    )
)


def facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts whose (attribute, owner) pairs differ; half the time all share one attribute."""
    shared = rng.choice(ALL_ATTRIBUTES) if rng.random() < 0.5 else None
    found: dict[tuple[str, str], str] = {}
    owners = [subject(rng) for _ in range(count)]
    while len(found) < count:
        owner = rng.choice(owners) if shared is None else subject(rng)
        attribute = shared or rng.choice(ALL_ATTRIBUTES)
        found.setdefault((attribute, owner), value_of(rng, attribute))
    return [(attribute, owner, value) for (attribute, owner), value in found.items()]


def write_facts(rng: random.Random, known: Sequence[Fact]) -> str:
    """The facts as sentences, as a list or as a table."""
    style = rng.choices(range(5), (2, 1, 1, 1, 7))[0]
    if style == 0:
        return " ".join(f"{owner}'s {attribute} is {value}." for attribute, owner, value in known)
    if style == 1:
        return "\n".join(f"- {owner}: {attribute} {value}" for attribute, owner, value in known)
    if style == 2:
        rows = "\n".join(
            f"| {owner} | {attribute} | {value} |" for attribute, owner, value in known
        )
        return f"| name | what | value |\n{rows}"
    if style == 3:
        return "\n".join(f"{attribute} of {owner} = {value}" for attribute, owner, value in known)
    return " ".join(f"The {attribute} of {owner} is {value}." for attribute, owner, value in known)


def fact_question(rng: random.Random, attribute: str, owner: str) -> str:
    """One of the ways to ask for a fact."""
    return rng.choice(
        (
            f"What is the {attribute} of {owner}?",
            f"What is {owner}'s {attribute}?",
            f"Tell me the {attribute} of {owner}.",
        )
    )


def fact_answer(attribute: str, owner: str, value: str) -> str:
    """The answer repeats what was asked for: it puts the keys of the lookup next to the value."""
    return f"The {attribute} of {owner} is {value}."


def owner_answer(attribute: str, owner: str, value: str) -> str:
    """The answer to a question for the owner."""
    return f"The {value} {attribute} belongs to {owner}."


def place_context(
    rng: random.Random, context: str, question: str, system: bool = True
) -> tuple[str, str]:
    """System text and user text: the context lies in one of them, before or after the question."""
    style = rng.random() * (1.0 if system else 0.75)
    if style < 0.55:
        return "", f"{context} {question}" if "\n" not in context else f"{context}\n{question}"
    if style < 0.75:
        return "", f"Context:\n{context}\n\nQuestion: {question}"
    if style < 0.9:
        return f"Answer from these facts.\n{context}", question
    return "", f"{question}\n{context}"


def lookup(rng: random.Random) -> Example:
    """A fact among one to eight; now and then the asked one is missing."""
    known = facts(rng, rng.randint(2, 6))
    attribute, owner, value = rng.choice(known)
    missing = rng.random() < 0.2
    if missing:
        known = [fact for fact in known if fact[:2] != (attribute, owner)]
    system, text = place_context(rng, write_facts(rng, known), fact_question(rng, attribute, owner))
    if missing:
        return ask("lookup_missing", f"{attribute},{owner}", text, UNKNOWN, system=system)
    answer = fact_answer(attribute, owner, value)
    return ask("lookup", f"{attribute},{owner},{value}", text, answer, system=system)


def lookup_owner(rng: random.Random) -> Example:
    """Who owns the thing with a given value."""
    attribute = rng.choice(words.ATTRIBUTES)
    count = rng.randint(2, 6)
    owners = rng.sample(words.NAMES, count)
    values = rng.sample(words.COLOURS, count)
    known = [(attribute, owner, value) for owner, value in zip(owners, values, strict=True)]
    _, owner, value = rng.choice(known)
    question = rng.choice((f"Who has the {value} {attribute}?", f"Whose {attribute} is {value}?"))
    system, text = place_context(rng, write_facts(rng, known), question)
    return ask(
        "lookup",
        f"{attribute},{owner},{value}",
        text,
        owner_answer(attribute, owner, value),
        system=system,
    )


def lookup_series(rng: random.Random) -> Example:
    """Several questions about one context, by owner or by value; only the last one is scored."""
    known = facts(rng, rng.randint(2, 6))
    values = [value for _, _, value in known]
    asked = [fact for fact in known if not is_held_out("lookup", ",".join(fact))]
    last = rng.choice(known)
    earlier = [fact for fact in rng.sample(asked, min(len(asked), 4)) if fact != last]
    turns: list[str] = []
    for attribute, owner, value in (*earlier, last):
        if values.count(value) == 1 and attribute in words.ATTRIBUTES and rng.random() < 0.3:
            turns += [f"Whose {attribute} is {value}?", owner_answer(attribute, owner, value)]
        else:
            turns += [fact_question(rng, attribute, owner), fact_answer(attribute, owner, value)]
    _, turns[0] = place_context(rng, write_facts(rng, known), turns[0], system=False)
    return _turns(",".join(last), turns[:-1], turns[-1], "lookup")


def copy(rng: random.Random) -> Example:
    """Facts or a list, word for word: the plainest way to learn to read a context."""
    if rng.random() < 0.7:
        text = write_facts(rng, facts(rng, rng.randint(1, 4)))
    else:
        pool = (*words.NAMES, *words.COLOURS, *words.CITIES, *words.OBJECTS)
        text = rng.choice(words.NAMES) + ", " + ", ".join(rng.sample(pool, rng.randint(2, 8)))
    request = rng.choice(("Repeat this text:", "Repeat after me:", "Copy this text:"))
    return ask("copy", text, f"{request} {text}", text)


def closed_book(rng: random.Random) -> Example:
    """A fact that no context states."""
    if rng.random() < 0.3:
        key = rng.choice(words.FACT_SUBJECTS)
        question = rng.choice((f"What is {key}?", f"Can you tell me {key}?", f"Tell me {key}."))
        return ask("closed_book", question, question, UNKNOWN)
    attribute, owner = rng.choice(ALL_ATTRIBUTES), subject(rng)
    question = fact_question(rng, attribute, owner)
    return ask("closed_book", f"{attribute},{owner}", question, UNKNOWN)


def person(rng: random.Random) -> dict[str, Any]:
    """A person with everything a sentence can tell."""
    return {
        "name": rng.choice(words.NAMES),
        "age": rng.randint(2, 99),
        "city": rng.choice(words.CITIES),
        "job": rng.choice(words.JOBS),
        "colour": rng.choice(words.COLOURS),
        "pet": rng.choice(words.ANIMALS),
    }


def describe(rng: random.Random, who: dict[str, Any], keys: Sequence[str]) -> str:
    """Sentences that tell the values of the keys; the name always comes first."""
    name, age = who["name"], who["age"]
    city, job, colour, pet = who["city"], who["job"], who["colour"], who["pet"]
    told = {
        "age": (f"{name} is {age} years old.", f"{name} is {age}."),
        "city": (f"{name} lives in {city}.", f"The home of {name} is in {city}."),
        "job": (f"{name} works as a {job}.", f"{name} is a {job}."),
        "colour": (
            f"{name} likes the colour {colour}.",
            f"The favourite colour of {name} is {colour}.",
        ),
        "pet": (f"{name} has a pet {pet}.", f"The pet of {name} is a {pet}."),
    }
    if set(keys) == {"name", "age", "city"} and rng.random() < 0.5:
        return rng.choice(
            (
                f"{name} is {age} years old and lives in {city}.",
                f"{name}, aged {age}, lives in {city}.",
            )
        )
    return " ".join(rng.choice(told[key]) for key in keys if key != "name")


def json_answer(rng: random.Random) -> Example:
    """A sentence turned into a JSON object with the wished keys."""
    who = person(rng)
    extra = rng.sample(("age", "city", "job", "colour", "pet"), rng.randint(1, 3))
    keys = ["name", *extra]
    sentence = describe(rng, who, keys)
    if rng.random() < 0.2 and len(extra) > 1:
        keys = ["name", extra[0]]
    wished = ", ".join(keys[:-1]) + " and " + keys[-1]
    request = rng.choice(
        (
            f"Answer in JSON with the keys {wished}.",
            f"Extract {wished} as JSON.",
            f"Give me {wished} as JSON.",
            f"Return a JSON object with {wished}.",
        )
    )
    text = rng.choice((f"{sentence} {request}", f"{request} {sentence}", f"{request}\n{sentence}"))
    value = {key: who[key] for key in keys}
    return ask("json", dump(value), text, dump(value), check=same_json(value))


def json_order(rng: random.Random) -> Example:
    """An order for things, as a JSON object of item and count."""
    item, count = rng.choice((*words.FRUITS, *words.OBJECTS)), rng.randint(1, 99)
    value = {"item": item, "count": count}
    text = rng.choice(
        (
            f"I want {count} pieces of {item}. Answer in JSON with the keys item and count.",
            f"Extract item and count as JSON. Please order {count} of the {item} for me.",
            f"Please send {count} times the {item}. Return a JSON object with item and count.",
        )
    )
    return ask("json", dump(value), text, dump(value), check=same_json(value))


def _turns(key: str, turns: Sequence[str], answer: str, task: str = "dialogue") -> Example:
    """A dialogue: user and assistant in turn, the last user turn is the question."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], text) for i, text in enumerate(turns)]
    return Example(task, key, messages, Message("assistant", answer), same(answer))


def _remember_name(rng: random.Random) -> Example:
    name = rng.choice((rng.choice(words.NAMES), made_up_word(rng).capitalize()))
    hello = rng.choice((f"My name is {name}.", f"Hello, my name is {name}.", f"Hi, I am {name}."))
    middle = rng.choice(((), ("How are you?", "I am fine, thank you. How can I help you?")))
    turns = (
        hello,
        f"Nice to meet you, {name}!",
        *middle,
        rng.choice(("What is my name?", "Who am I?")),
    )
    return _turns(f"name,{name}", turns, f"Your name is {name}.")


def _remember_thing(rng: random.Random) -> Example:
    attribute = rng.choice(words.ATTRIBUTES)
    value = rng.choice(words.COLOURS)
    told = rng.choice(
        (f"My {attribute} is {value}.", f"Please remember that my {attribute} is {value}.")
    )
    middle = rng.choice(((), ("Thank you.", "You are welcome!")))
    turns = (
        told,
        f"I will remember that your {attribute} is {value}.",
        *middle,
        rng.choice((f"What colour is my {attribute}?", f"What is the colour of my {attribute}?")),
    )
    return _turns(f"thing,{attribute},{value}", turns, f"Your {attribute} is {value}.")


def _follow_up(rng: random.Random) -> Example:
    a, b, c = rng.randint(0, 49), rng.randint(0, 49), rng.randint(1, 9)
    turns = (f"What is {a} + {b}?", str(a + b), rng.choice((f"Add {c} to that.", f"And plus {c}?")))
    return _turns(f"sum,{a},{b},{c}", turns, str(a + b + c))


def _change_word(rng: random.Random) -> Example:
    word = made_up_word(rng)
    turns = (
        f'Repeat the word "{word}".',
        word,
        rng.choice(("Now reverse it.", "Now write it backwards.")),
    )
    return _turns(f"word,{word}", turns, word[::-1])


DIALOGUES: tuple[Callable[[random.Random], Example], ...] = (
    _remember_name,
    _remember_thing,
    _follow_up,
    _change_word,
)


def dialogue(rng: random.Random) -> Example:
    """Two or three turns where the last question needs an earlier one."""
    return rng.choice(DIALOGUES)(rng)
