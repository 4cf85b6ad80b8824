"""Fixtures of the harness's tests: one brook in float32, and a place for records."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # before anything imports them

from penstock.measure.quality.harness import inprocess
from penstock.measure.quality.harness.access import Access
from penstock.measure.records import Clock, Record, Request


class ListSink:
    """Keeps what a run writes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.rows: list[Request] = []
        self.marks: dict[str, list[dict[str, Any]]] = {}

    def add(self, record: Record) -> None:
        assert isinstance(record, Request)
        self.rows.append(record)

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: Any) -> None:
        self.marks.setdefault(name, []).append(facts)

    @property
    def problems(self) -> list[str]:
        return [facts["message"] for facts in self.marks.get("problem", [])]


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture(scope="session")
def access() -> Access:
    """brook in this process."""
    return inprocess.load("brook", dtype="float32")
