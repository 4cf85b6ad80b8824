"""What the process of an engine runs, and how it talks to its parent (`engine.process`).

Owns the messages of the child. Imports little, because nothing is loaded before. Invariant: the
process ends when the socket closes, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from penstock.engine.config import EngineConfig
from penstock.engine.loop import Command, Core, EngineLoop, Refuse, Update
from penstock.errors import InvalidField, PenstockError
from penstock.extras import explain
from penstock.native.library import unavailable_reason
from penstock.protocol.frames import begin, frame
from penstock.protocol.reports import ErrorReport, Failed
from penstock.types import EngineInfo, EngineStats

logger = logging.getLogger(__name__)


class Started(msgspec.Struct, tag=True, frozen=True):
    """The child is ready to serve."""

    info: EngineInfo
    stats: EngineStats


Reply = Started | Failed | Update


def refusal(error: Exception, field: str) -> InvalidField:
    """What a request gets that cannot be sent, or cannot be read."""
    return InvalidField(f"The request cannot be sent to the engine: {error}.", field=field)


def main(argv: list[str]) -> int:
    """What the child runs. `argv`: file descriptor, `module:function`, monotonic time of start."""
    if (begun := begin(int(argv[0]), EngineConfig)) is None:
        return 0
    connection, messages, config = begun
    engine = EngineLoop(lambda update: connection.sendall(frame(update)))
    threading.Thread(target=_listen, args=(messages, engine), daemon=True).start()
    try:
        try:
            if config.backend != "torch" and unavailable_reason() is None:
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's take time to start
            make_core = pkgutil.resolve_name(argv[1])
            process_s = time.monotonic() - float(argv[2])
            core: Core = make_core(config)
        except ModuleNotFoundError as error:
            connection.sendall(frame(Failed(ErrorReport.of(explain(error)))))
            return 1
        except PenstockError as error:
            connection.sendall(frame(Failed(ErrorReport.of(error))))
            return 1
        info = replace(core.info, startup_s={"process": process_s, **core.info.startup_s})
        connection.sendall(frame(Started(info, core.stats)))
        engine.run(core)
    except ConnectionError:  # the parent is gone
        return 0
    except Exception as error:
        logger.exception("The engine stopped.")
        connection.sendall(frame(Failed(ErrorReport.of_death(error))))
        return 1
    return 0


def _listen(messages: Iterator[bytes], engine: EngineLoop) -> None:
    """Take commands while the engine computes; end the process when the parent is gone."""
    decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Command)
    try:
        for message in messages:
            try:
                command = decoder.decode(message)
            except msgspec.ValidationError as error:
                named = re.search(r"\$\.request\.(?:params\.)?(\w+)", str(error))
                refused = refusal(error, named[1] if named else "request")
                request_id = msgspec.msgpack.decode(message)["request"]["request_id"]
                command = Refuse(request_id, ErrorReport.of(refused))
            engine.send(command)
    except Exception:
        logger.exception("The engine cannot read what it is told.")
        os._exit(1)  # better no engine than a deaf one
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
