"""An engine as small as can be: `/v1/completions` with fixed answers, and ways to fail.

Run as `fake_engine.py --model M --port P --name N [--mode MODE] [--delay-s S] [--note FILE]`.
Modes: `ready`, `dies` (says why, ends with status 3), `silent` (opens its port and is never ready),
`closed` (opens nothing), `mute` (is ready and answers with status 500), `stubborn` (ready, ignores
SIGTERM). Writes its pid and that of a child, which only sleeps, to the note.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("model", "name", "mode", "note"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--port", type=int)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--short", action="store_true")
    told = parser.parse_args()
    if told.note:
        # A group of its own, as engines' workers have it.
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(told.note, "w") as note:
            json.dump({"pids": [child.pid]}, note)
    if told.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(told.delay_s)
    if told.mode == "dies":
        print("first words")
        print("no such weights", file=sys.stderr, flush=True)
        return 3
    if told.mode == "closed":
        time.sleep(600)
    handler = type("Handler", (Handler,), {"told": told})
    ThreadingHTTPServer(("127.0.0.1", told.port), handler).serve_forever()
    return 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": [{"id": self.told.name, "owned_by": "fake"}]})
        elif self.path == "/health" and self.told.mode != "silent":
            self._send(200, {})
        else:
            self._send(503, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.told.mode == "mute" or self.path != "/v1/completions":
            self._send(500, {"error": {"message": "out of order"}})
            return
        prompt = body["prompt"]
        num_in = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        num_out = 1 if self.told.short else body["max_tokens"]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number in range(1, num_out + 1):
            self._event(
                choices=[{"index": 0, "text": "a ", "finish_reason": None}],
                usage={"prompt_tokens": num_in, "completion_tokens": number},
            )
        self._event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        self._event(choices=[], usage={"prompt_tokens": num_in, "completion_tokens": num_out})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, **fields: Any) -> None:
        chunk = {"id": "c", "object": "text_completion", "model": self.told.name} | fields
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    sys.exit(main())
