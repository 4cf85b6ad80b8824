"""A pytest plugin that notes every test's outcome as it comes: `-p tools.gpu_report`.

Owns the format: a JSON object a line, in the file that PENSTOCK_GPU_REPORT names. What was noted
stays when the process is killed; a test that began and has no outcome is the one that did it.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

VARIABLE = "PENSTOCK_GPU_REPORT"


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(test=nodeid, outcome="began")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's outcome is that of its call; of what surrounds it only if that is no pass."""
    if report.when == "call" or report.outcome != "passed":
        _note(test=report.nodeid, outcome=report.outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(test=report.nodeid, outcome="failed")


def _note(**line: Any) -> None:
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(line) + "\n")
