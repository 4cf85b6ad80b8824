"""The core stays readable in an afternoon: line caps (DESIGN 1). Raising one takes an ADR."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.models.architectures import ARCHITECTURES, POOLING_ARCHITECTURES

SRC = Path(__file__).parent.parent / "src" / "penstock"
FILE_CAP = 500


def num_lines(*parts: str) -> int:
    return sum(
        len(path.read_text().splitlines()) for part in parts for path in (SRC / part).rglob("*.py")
    )


def model_lines() -> int:
    return sum(
        len(path.read_text().splitlines())
        for path in (SRC / "models").glob("*.py")  # not architectures/, which are one file each
    )


def test_every_architecture_has_a_file() -> None:
    found = {path.stem for path in (SRC / "models" / "architectures").glob("*.py")} - {"__init__"}
    assert found - {"foreign"} == set((ARCHITECTURES | POOLING_ARCHITECTURES).values())


@pytest.mark.parametrize(
    ("name", "lines", "cap"),
    [
        ("engine", num_lines("engine"), 4100),  # these: ADR 0011
        ("models", model_lines(), 6000),
        (
            "core",
            num_lines("engine", "layers", "attention", "parallel", "sampling") + model_lines(),
            16200,
        ),
    ],
)
def test_cap(name: str, lines: int, cap: int) -> None:
    assert lines > 0
    assert lines <= cap, f"{name}: {lines} lines; move a feature out, or raise {cap} in an ADR"


def test_no_file_is_a_wall() -> None:
    tall = {
        str(path.relative_to(SRC)): count
        for path in SRC.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > FILE_CAP
    }
    assert not tall, f"over {FILE_CAP} lines: {tall}"
