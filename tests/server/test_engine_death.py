"""What clients learn of an engine that died: the cause, never what it said, which may quote others.

The operator reads the rest on stderr.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock.engine.config import EngineConfig
from penstock.engine.process import ProcessClient
from penstock.errors import EngineDead
from penstock.protocol.reports import ErrorReport
from penstock.server.failures import describe
from penstock.types import EngineRequest, SamplingParams

HELPERS = Path(__file__).parents[1] / "engine"


def _fail() -> None:
    raise ValueError("bad row: the text of another user at 0x7f12")


def test_an_exception_is_named_without_its_words() -> None:
    try:
        _fail()
    except ValueError as error:
        message = describe(ErrorReport.of_death(error).error, "r").error.message
    assert "`ValueError`" in message
    assert "`_fail` (test_engine_death.py:" in message
    assert "another user" not in message


def test_an_exit_is_named_without_the_last_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which goes to stderr."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.syspath_prepend(str(HELPERS))
    from helpers_fake_core import EXIT

    async def main() -> EngineDead:
        client = ProcessClient(EngineConfig(model="fake"), core="helpers_fake_core:make")
        await client.start()
        params = SamplingParams(max_tokens=1)
        request = EngineRequest(request_id="a", prompt_token_ids=[EXIT], params=params)
        with pytest.raises(EngineDead) as caught:
            async for _ in client.generate(request):
                pass
        await client.shutdown()
        return caught.value

    error = asyncio.run(main())
    assert "exit code `7`" in error.message
    assert "about to exit" not in error.message
    assert "about to exit" in capfd.readouterr().err
