"""Small-world stories from a grammar: one hero, one object, one place, one helper, one problem."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import words
from .example import Example, ask


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story_check(*needed: str) -> Callable[[str], bool]:
    """Accepts a finished text of 30 to 200 words with the wished words and no sentence twice."""

    def check(text: str) -> bool:
        sentences = [part.strip() for part in text.split(".") if part.strip()]
        ended = text.strip().endswith((".", "!", '"'))
        sized = 30 <= len(text.split()) <= 200
        present = all(word in text for word in needed)
        return ended and sized and present and len(set(sentences)) == len(sentences)

    return check


def _opening(rng: random.Random, hero: str, name: str, place: str, mood: str) -> str:
    return rng.choice(
        (
            f"Once upon a time there was {article(mood)} {hero} named {name}. "
            f"{name} lived near the {place}.",
            f"In the {place} there lived {article(mood)} {hero}. The {hero} was called {name}.",
            f"{name} was {article(mood)} {hero} who lived by the {place}.",
            f"Long ago, {article(mood)} {hero} named {name} came to live near the {place}.",
        )
    )


def _lost(
    rng: random.Random, name: str, thing: str, kind: str, place: str, helper: str, friend: str
) -> str:
    return " ".join(
        (
            rng.choice(
                (
                    f"{name} had {article(kind)} {thing} and loved it very much.",
                    f"The best thing that {name} had was {article(kind)} {thing}.",
                )
            ),
            rng.choice(
                (f"One morning the {thing} was gone.", f"One day the {thing} was not there.")
            ),
            rng.choice(
                (
                    f"{name} looked under the bed and behind the door, but found nothing.",
                    f"{name} looked everywhere and felt very sad.",
                )
            ),
            rng.choice(
                (
                    f'Then {friend} the {helper} came by. "I will help you," said {friend}.',
                    f"{friend} the {helper} heard about it and wanted to help.",
                )
            ),
            rng.choice(
                (
                    f"Together they walked to the {place}, "
                    f"and there they saw the {thing} in the grass.",
                    f"They went to the {place} and found the {thing} under an old tree.",
                )
            ),
        )
    )


def _found(
    rng: random.Random, name: str, thing: str, kind: str, place: str, helper: str, friend: str
) -> str:
    return " ".join(
        (
            rng.choice(
                (
                    f"One day {name} went to the {place} and found {article(kind)} {thing}.",
                    f"One evening {name} saw {article(kind)} {thing} on the path to the {place}.",
                )
            ),
            rng.choice(
                (
                    f'"Whose {thing} is this?" asked {name}.',
                    f"{name} wanted to know who had lost it.",
                )
            ),
            rng.choice(
                (
                    f"{name} asked everyone, and at last met {friend} the {helper}.",
                    f"After a long walk, {name} met {friend} the {helper}.",
                )
            ),
            rng.choice(
                (
                    f'"That is my {thing}!" said {friend}. "I looked for it all day."',
                    f"{friend} smiled, because the {thing} was a present from a friend.",
                )
            ),
            rng.choice(
                (
                    f"{name} gave the {thing} back, and {friend} said thank you.",
                    f"{name} was happy to give the {thing} back.",
                )
            ),
        )
    )


def _made(
    rng: random.Random, name: str, thing: str, kind: str, place: str, helper: str, friend: str
) -> str:
    return " ".join(
        (
            rng.choice(
                (
                    f"{name} wanted to bring {article(kind)} {thing} to the {place}.",
                    f"{name} needed {article(kind)} {thing} for the winter.",
                )
            ),
            rng.choice(
                (
                    f"But the way was long and the {thing} was not easy to carry.",
                    f"But the rain came, and the {thing} fell into the water.",
                )
            ),
            rng.choice(
                (
                    f"{friend} the {helper} was resting under a tree and saw it all.",
                    f"A voice called from the {place}. It was {friend} the {helper}.",
                )
            ),
            rng.choice(
                (
                    f'"Two can do more than one," said {friend}, and took one side of the {thing}.',
                    f"{friend} knew what to do and pulled the {thing} out with a rope.",
                )
            ),
            rng.choice(
                (
                    "Step by step they came home before the night.",
                    "When the sun went down, the work was done.",
                )
            ),
        )
    )


def _ending(rng: random.Random, name: str, friend: str, food: str) -> str:
    return rng.choice(
        (
            f"That evening {name} and {friend} shared some {food} and laughed. "
            "From that day on they were friends.",
            f"They ate {food} together, and {name} was never alone again.",
            f"{name} learned that a good friend is better than anything else.",
            f"Since then {name} and {friend} meet every week and tell each other stories.",
            f"And when it was dark, they sat by the fire with some {food} and were happy.",
        )
    )


PLOTS = (_lost, _found, _made)


def tell(rng: random.Random, hero: str, name: str, thing: str, place: str) -> str:
    """One story about the given hero, object and place."""
    helper = rng.choice([animal for animal in words.ANIMALS if animal != hero])
    friend = rng.choice([other for other in words.NAMES if other != name])
    mood, kind = rng.choice(words.ADJECTIVES), rng.choice(words.THING_ADJECTIVES)
    parts = (
        _opening(rng, hero, name, place, mood),
        rng.choice(PLOTS)(rng, name, thing, kind, place, helper, friend),
        _ending(rng, name, friend, rng.choice(words.FOODS)),
    )
    return " ".join(parts)


def story(rng: random.Random) -> Example:
    """A story on request; the request names some of what must appear."""
    hero, thing = rng.choice(words.ANIMALS), rng.choice(words.OBJECTS)
    name, place = rng.choice(words.NAMES), rng.choice(words.PLACES)
    question, needed = rng.choice(
        (
            (f"Tell me a story about {article(hero)} and {article(thing)}.", (hero, thing)),
            (f"Write a short story about {article(hero)} and {article(thing)}.", (hero, thing)),
            (
                f"Tell me a story about {article(hero)} named {name} and {article(thing)}.",
                (hero, thing, name),
            ),
            (f"Tell me a story about {name} the {hero}.", (hero, name)),
            (
                f"Tell me a story about {article(hero)} who finds {article(thing)} in the {place}.",
                (hero, thing, place),
            ),
            (f"Write a story about {article(hero)} near the {place}.", (hero, place)),
            ("Tell me a story.", ()),
            ("Please tell me a short story.", ()),
        )
    )
    text = tell(rng, hero, name, thing, place)
    return ask("story", f"{hero},{thing}", question, text, check=story_check(*needed))
