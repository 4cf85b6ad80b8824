from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_server import Scripted, scripted
from tests.measure.verdict.helpers_served import NUM_ITEMS


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Scripted, Scripted]]:
    with scripted() as base, scripted() as variant:
        yield base, variant


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [
        {"id": f"i{n}", "prompt": f"What is {n} + 1?", "reference": str(n + 1), "max_tokens": 4}
        for n in range(NUM_ITEMS)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line | {"grader": "exact_match"}) + "\n" for line in lines))
    return path
