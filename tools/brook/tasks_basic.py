"""Arithmetic, sorting and string tasks."""

from __future__ import annotations

import random

from . import words
from .example import Example, ask

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
TIMES = {2: "twice", 3: "three times", 4: "four times"}


def addition(rng: random.Random) -> Example:
    """Two numbers up to 99."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    question = rng.choice(
        (
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"{a} + {b} =",
            f"Add {a} and {b}.",
            f"Calculate {a} + {b}.",
            f"How much is {a} plus {b}?",
        )
    )
    return ask("addition", f"{a}+{b}", question, str(a + b))


def subtraction(rng: random.Random) -> Example:
    """The smaller of two numbers up to 99 taken from the larger."""
    b, a = sorted((rng.randint(0, 99), rng.randint(0, 99)))
    question = rng.choice(
        (
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"{a} - {b} =",
            f"Subtract {b} from {a}.",
            f"Calculate {a} - {b}.",
        )
    )
    return ask("subtraction", f"{a}-{b}", question, str(a - b))


def multiplication(rng: random.Random) -> Example:
    """The table up to 12 times 12."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    question = rng.choice(
        (
            f"What is {a} * {b}?",
            f"What is {a} times {b}?",
            f"{a} * {b} =",
            f"Multiply {a} by {b}.",
        )
    )
    return ask("multiplication", f"{a}*{b}", question, str(a * b))


def compare(rng: random.Random) -> Example:
    """The larger or smaller of two numbers."""
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger") if larger else ("smaller",))
    question = rng.choice((f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?"))
    return ask("compare", f"{a},{b},{larger}", question, str(max(a, b) if larger else min(a, b)))


def sort_numbers(rng: random.Random) -> Example:
    """Three to six numbers up to 99, upwards or downwards."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    down = rng.random() < 0.3
    listed = ", ".join(map(str, numbers))
    if down:
        question = rng.choice(
            (f"Sort these numbers from largest to smallest: {listed}", f"Sort descending: {listed}")
        )
    else:
        question = rng.choice(
            (
                f"Sort these numbers: {listed}",
                f"Sort the numbers {listed}.",
                f"Put these numbers in order: {listed}",
                f"Sort from smallest to largest: {listed}",
            )
        )
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    return ask("sort_numbers", f"{listed},{down}", question, answer)


def sort_words(rng: random.Random) -> Example:
    """Three to five words in alphabetical order."""
    chosen = rng.sample(words.PLAIN_WORDS, rng.randint(3, 5))
    listed = ", ".join(chosen)
    question = rng.choice(
        (
            f"Sort these words: {listed}",
            f"Put these words in alphabetical order: {listed}",
            f"Sort alphabetically: {listed}",
            f"Sort the words {listed}.",
        )
    )
    return ask("sort_words", listed, question, ", ".join(sorted(chosen)))


def made_up_word(rng: random.Random) -> str:
    """A word that can be spoken and means nothing."""
    length = rng.randint(3, 8)
    start = rng.randint(0, 1)
    letters = (rng.choice((CONSONANTS, VOWELS)[(i + start) % 2]) for i in range(length))
    return "".join(letters)


def quoted_word(rng: random.Random) -> tuple[str, str]:
    """A word, and how the question writes it: in quotes, or bare when it is a common one."""
    if rng.random() < 0.4:
        word = made_up_word(rng)
    else:
        word = rng.choice(words.PLAIN_WORDS)
        if rng.random() < 0.3:
            return word, rng.choice((f"the word {word}", word))
    return word, rng.choice((f'"{word}"', f"'{word}'", f'the word "{word}"', f"the word '{word}'"))


def reverse(rng: random.Random) -> Example:
    """A word backwards."""
    word, shown = quoted_word(rng)
    question = rng.choice(
        (f"Reverse {shown}.", f"Write {shown} backwards.", f"Spell {shown} backwards.")
    )
    return ask("reverse", word, question, word[::-1])


def letter(rng: random.Random) -> Example:
    """The first or last letter of a word."""
    word, shown = quoted_word(rng)
    first = rng.random() < 0.5
    which = "first" if first else "last"
    question = rng.choice(
        (f"What is the {which} letter of {shown}?", f"Give me the {which} letter of {shown}.")
    )
    return ask("letter", f"{word},{which}", question, word[0] if first else word[-1])


def uppercase(rng: random.Random) -> Example:
    """A word in capital letters."""
    word, shown = quoted_word(rng)
    question = rng.choice(
        (
            f"Write {shown} in capital letters.",
            f"Write {shown} in uppercase.",
            f"Convert {shown} to uppercase.",
        )
    )
    return ask("uppercase", word, question, word.upper())


def count_letters(rng: random.Random) -> Example:
    """How long a word is."""
    word, shown = quoted_word(rng)
    question = rng.choice(
        (
            f"How many letters are in {shown}?",
            f"How many letters does {shown} have?",
            f"Count the letters in {shown}.",
        )
    )
    return ask("count_letters", word, question, str(len(word)))


def repeat(rng: random.Random) -> Example:
    """A word two to four times, each on its own line."""
    word, shown = quoted_word(rng)
    count = rng.randint(2, 4)
    question = rng.choice((f"Repeat {shown} {TIMES[count]}.", f"Say {shown} {TIMES[count]}."))
    return ask("repeat", f"{word},{count}", question, "\n".join([word] * count))


def spell(rng: random.Random) -> Example:
    """A word letter by letter."""
    word, shown = quoted_word(rng)
    question = rng.choice(
        (f"Spell {shown}.", f"How do you spell {shown}?", f"List the letters of {shown}.")
    )
    return ask("spell", word, question, "-".join(word))
