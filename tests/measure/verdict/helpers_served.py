"""Two servers that do what a script says, and items whose answers are known."""

from __future__ import annotations

NUM_ITEMS, NUM_WRONG, WORDS = 16, 9, "a b c d e f"
SMALL = [
    *("--blocks", "4", "--noise-blocks", "4", "--requests", "3", "--num-warmups", "0"),
    *("--random-output-len", "6", "--chunks", "4", "--idle", "0.01", "--meter-interval", "0"),
    *("--concurrency", "2"),
]


def answers(num_wrong: int) -> dict[str, str]:
    return {
        f"What is {n} + 1?": "no idea" if n < num_wrong else str(n + 1) for n in range(NUM_ITEMS)
    }
