"""From the start of the server's process to the first streamed token, split by phase.

The phases are the engine's own (EngineInfo.startup_s); `listening_s` is when the server said that
it can be asked, `first_token_s` when the first text of a streamed chat arrived, both counted from
the moment the process was spawned. The first run, which warms the page cache, is not counted.
"""

from __future__ import annotations

import json
import time

import httpx

from benchmarks.common import environment, summary, write
from benchmarks.serving import serving
from penstock.protocol.sse import DONE_DATA, Decoder

NUM_RUNS = 5
BODY = {
    "model": "brook",
    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
    "temperature": 0,
    "stream": True,
}


def once() -> dict[str, float]:
    """Seconds of one start, by name."""
    with serving("brook") as server:
        listening_s = time.perf_counter() - server.spawned_s
        decoder = Decoder()
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=BODY) as response:
            for piece in response.iter_bytes():
                for event in decoder.push(piece):
                    if event.data == DONE_DATA:
                        raise RuntimeError("the answer is empty")
                    if json.loads(event.data)["choices"][0]["delta"].get("content"):
                        first_token_s = time.perf_counter() - server.spawned_s
                        phases = {f"engine_{k}_s": v for k, v in server.facts["startup_s"].items()}
                        return {
                            "listening_s": listening_s,
                            "first_token_s": first_token_s,
                            **phases,
                        }
    raise RuntimeError("the stream ended without [DONE]")


def main() -> None:
    before = environment()
    once()
    runs = [once() for _ in range(NUM_RUNS)]
    figures = {name: summary([run[name] for run in runs]) for name in runs[0]}
    write("startup", {"phases": figures}, before)


if __name__ == "__main__":
    main()
