"""The process of the scripted server: plain asyncio, no part of penstock. See `scripted_server`."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import re
import ssl
import sys
import time
from collections import deque
from dataclasses import replace
from typing import Any

from scripted_server import Fail, Script


def word_pieces(text: str) -> list[str]:
    """The tokens of this server: words with the space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


class State:
    """The server: its script, what it was asked, and who waits."""

    def __init__(self) -> None:
        self.configure({})
        self.num_connections = 0

    def configure(self, changes: dict[str, Any]) -> None:
        self.script = Script(**changes)
        self.log: list[dict[str, Any]] = []
        self.zero_s: float | None = None
        self.stall = (0.0, 0.0)  # begin and end, on the loop's clock
        self.running = 0
        self.waiting: deque[Play] = deque()
        self.seen: set[tuple[str, ...]] = set()

    def held(self, due_s: float) -> float:
        """When something due at `due_s` really happens."""
        begin_s, end_s = self.stall
        return end_s if begin_s <= due_s < end_s else due_s

    def num_cached(self, script: Script, words: list[str]) -> int | None:
        if not script.prefix_cache:
            return script.cached_tokens
        prefixes = [tuple(words[:num]) for num in range(1, len(words))]
        cached = max((len(prefix) for prefix in prefixes if prefix in self.seen), default=0)
        self.seen.update(prefixes)
        return cached

    def fails(self, fail: Fail, count: int, now_s: float) -> bool:
        """Whether the request number `count` (from 1) meets a failure."""
        if "every" in fail:
            return bool(count % fail["every"] == 0)
        if "first" in fail:
            return bool(count <= fail["first"])
        since_s = now_s - (self.zero_s or now_s)
        return bool(fail.get("begin_s", 0.0) <= since_s < fail.get("end_s", math.inf))


class Play:
    """One generation: what is sent when."""

    def __init__(self, connection: Connection, path: str, body: dict[str, Any], now_ns: int):
        self.connection, self.state, self.body = connection, connection.state, body
        self.script = replace(self.state.script, **body.pop("script", {}))
        self.dialect = "tgi" if path.startswith("/generate") else path
        self.stream = path == "/generate_stream" or bool(body.get("stream"))
        self.prompt, self.words = _prompt(body)
        self.entry: dict[str, Any] = {
            "path": path,
            "prompt": self.prompt,
            "tag": self.script.tag,
            "connection": connection.number,
            "t_received_ns": now_ns,
            "t_sent_ns": [],  # of each chunk with tokens
            "num_tokens": [],  # in each of them
            "status": 200,
            "left": False,  # the client closed before the end
            "body": body,
        }
        self.state.log.append(self.entry)
        self.num_sent = 0
        self.timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Refuse, wait for a place, or start."""
        state, script, loop = self.state, self.script, self.connection.loop
        if state.zero_s is None:
            state.zero_s = loop.time()
        if refused := next((name for name in script.refuse if _has(self.body, name)), None):
            return self.fail(400, f"Unrecognized request argument supplied: {refused}")
        if script.fail and state.fails(script.fail, len(state.log), loop.time()):
            return self.fail(script.fail["status"], "try again later", script.fail)
        if script.drop_at == -1:
            return self.connection.transport.abort()
        self.num_cached = state.num_cached(script, self.words)
        if script.max_running is not None and state.running >= script.max_running:
            state.waiting.append(self)
        else:
            self.start(self.entry["t_received_ns"] / 1e9)
        return None

    def fail(self, status: int, message: str, how: Fail | None = None) -> None:
        self.entry["status"] = status
        error = {"error": {"message": message, "type": "error", "code": status}}
        retry_after_s = (how or {}).get("retry_after_s")
        more = {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:g}"}
        self.connection.reply(status, error, more)

    def start(self, at_s: float) -> None:
        self.state.running += 1
        script = self.script
        self.tokens, self.finish = _answer(script, self.body, self.prompt)
        rng = random.Random(f"{script.seed}:{len(self.state.log)}")
        mu, sigma = -(script.jitter**2) / 2, script.jitter
        due_s, self.due_s = at_s, []
        for number in range(len(self.tokens)):
            noise = rng.lognormvariate(mu, sigma) if sigma else 1.0
            due_s += (script.tpot_s if number else script.ttft_s) * noise
            due_s += script.stall_s if number == script.stall_at else 0.0
            self.due_s.append(due_s)
        if self.stream:
            more = "".join(f"{name}: {value}\r\n" for name, value in script.headers.items())
            self.connection.head(200, "text/event-stream", script.close, more)
            if "chat" in self.dialect:
                self.event(self.chunk({"role": "assistant", "content": ""}))
        self.next()

    def next(self) -> None:
        """Set the timer of the next chunk, or of the end."""
        last = min(self.num_sent + self.script.tokens_per_chunk, len(self.tokens)) - 1
        if not self.stream:
            last = len(self.tokens) - 1
        due_s = self.due_s[last] if self.num_sent < len(self.tokens) else 0.0
        self.timer = self.connection.loop.call_at(self.state.held(due_s), self.fire, last + 1)

    def fire(self, end: int) -> None:
        now_s = self.connection.loop.time()
        if (held_s := self.state.held(now_s)) > now_s:
            self.timer = self.connection.loop.call_at(held_s, self.fire, end)
        elif not self.stream:
            self.num_sent = end
            self.whole()
        elif self.num_sent >= len(self.tokens):
            self.end()
        elif not self.interrupted(end):
            self.send(end)
            self.next()

    def interrupted(self, end: int) -> bool:
        """Whether something goes wrong instead of the next chunk."""
        script = self.script

        def hit(at: int | None) -> bool:
            return at is not None and self.num_sent <= at < end

        if hit(script.hang_at):
            return True
        if hit(script.drop_at):
            self.connection.transport.abort()
            return True
        if hit(script.error_event_at):
            message = {"message": "the engine died", "type": "server_error", "code": 500}
            tgi = {"error": "the engine died", "error_type": "generation"}
            self.event(tgi if self.dialect == "tgi" else {"error": message})
            self.finished()
            return True
        if script.broken in BROKEN and self.num_sent:
            self.connection.chunk(b"data: " + BROKEN[script.broken] + b"\n\n")
            self.finished()
            return True
        return False

    def send(self, end: int) -> None:
        """One chunk with the tokens up to `end`; a chunk is reasoning or not."""
        thinking = self.num_sent < self.script.reasoning_tokens
        if thinking:
            end = min(end, self.script.reasoning_tokens)
        text = "".join(self.tokens[self.num_sent : end])
        num, self.num_sent = end - self.num_sent, end
        if self.dialect == "tgi":
            event = self.tgi_event(text)
        elif "chat" in self.dialect:
            name = self.script.reasoning_field if thinking else "content"
            event = self.chunk({name: text})
        else:
            event = self.chunk(text)
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        self.entry["t_sent_ns"].append(time.perf_counter_ns())
        self.entry["num_tokens"].append(num)
        self.connection.chunk(data)

    def chunk(self, delta: Any, finish: str | None = None) -> dict[str, Any]:
        """A chunk of the OpenAI dialects, with the usage so far where it was asked for."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice["delta" if isinstance(delta, dict) else "text"] = delta
        event: dict[str, Any] = {"id": "x", "model": model_of(self.script), "choices": [choice]}
        if self.options().get("continuous_usage_stats"):
            event["usage"] = self.usage()
        return event

    def options(self) -> dict[str, Any]:
        if self.script.usage == "none":
            return {}
        always = {"include_usage": True} if self.script.usage == "final" else {}
        return (self.body.get("stream_options") or {}) | always

    def usage(self) -> dict[str, Any]:
        script = self.script
        num_in, num_out = len(self.words), self.num_sent + script.hidden_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": num_in,
            "completion_tokens": num_out,
            "total_tokens": num_in + num_out,
        }
        if self.num_cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached}
        if num := min(self.num_sent, script.reasoning_tokens) + script.hidden_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": num}
        return usage

    def tgi_event(self, text: str) -> dict[str, Any]:
        is_last = self.num_sent == len(self.tokens)
        reason = "length" if self.finish == "length" else "eos_token"
        return {
            "index": self.num_sent,
            "token": {"id": self.num_sent, "text": text, "logprob": -0.1, "special": False},
            "generated_text": "".join(self.tokens) if is_last else None,
            "details": {
                "finish_reason": reason,
                "generated_tokens": self.num_sent,
                "input_length": len(self.words),
            }
            if is_last
            else None,
        }

    def event(self, event: dict[str, Any]) -> None:
        self.connection.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def end(self) -> None:
        """What comes after the last token."""
        if self.dialect != "tgi" and self.script.broken != "no_end":
            self.event(self.chunk({} if "chat" in self.dialect else "", self.finish))
            if self.options().get("include_usage"):
                self.event({"id": "x", "choices": [], "usage": self.usage()})
            if self.script.broken != "no_done":
                self.connection.chunk(b"data: [DONE]\n\n")
        self.finished()

    def whole(self) -> None:
        """The answer that is not streamed."""
        split = self.script.reasoning_tokens
        text, thought = "".join(self.tokens[split:]), "".join(self.tokens[:split])
        self.entry["t_sent_ns"].append(time.perf_counter_ns())
        self.entry["num_tokens"].append(len(self.tokens))
        if self.dialect == "tgi":
            event = self.tgi_event("")
            del event["token"]
            self.connection.reply(200, event, close=self.script.close)
        else:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if split:
                message[self.script.reasoning_field] = thought
            choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish}
            choice |= {"message": message} if "chat" in self.dialect else {"text": text}
            document: dict[str, Any] = {
                "id": "x",
                "model": model_of(self.script),
                "choices": [choice],
            }
            if self.script.usage != "none":
                document["usage"] = self.usage()
            self.connection.reply(200, document, close=self.script.close)
        self.release()

    def finished(self) -> None:
        self.connection.end(self.script)
        self.release()

    def left(self) -> None:
        """The client is gone."""
        self.entry["left"] = True
        if self in self.state.waiting:
            self.state.waiting.remove(self)
        elif self.timer is not None:
            self.timer.cancel()
            self.release()

    def release(self) -> None:
        """Give the place to who waits."""
        self.connection.play = None
        self.state.running = max(0, self.state.running - 1)  # the script may be a new one
        if self.state.waiting:
            self.state.waiting.popleft().start(self.connection.loop.time())


BROKEN = {
    "json": b'{"choices": [{"index": 0, "delta": {"cont',
    "utf8": b'{"choices": [{"index": 0, "delta": {"content": "\xff\xfe"}}]}',
    "shape": b'{"choices": [{"index": 0, "delta": {"content": 7}}]}',
}


def model_of(script: Script) -> str:
    return (*script.models, "scripted")[0]


def _prompt(body: dict[str, Any]) -> tuple[str, list[str]]:
    """The text that is answered, and the words (or ids) of all that was sent."""
    prompt = body.get("prompt", body.get("inputs"))
    if isinstance(prompt, list):
        return " ".join(map(str, prompt)), [str(token) for token in prompt]
    if prompt is not None:
        return prompt, word_pieces(prompt)
    contents = [str(message.get("content")) for message in body.get("messages") or [{}]]
    return contents[-1], word_pieces(" ".join(contents))


def _answer(script: Script, body: dict[str, Any], prompt: str) -> tuple[list[str], str]:
    """The tokens of an answer, and why it ends."""
    params = body.get("parameters") or body
    limit = params.get("max_tokens") or params.get("max_completion_tokens")
    limit = limit or params.get("max_new_tokens")
    text = script.answers.get(prompt, prompt if script.echo else script.answer)
    if text is not None:
        tokens = word_pieces(text)
    elif limit and (body.get("ignore_eos") or script.num_tokens is None):
        tokens = [f" w{number}" for number in range(limit)]
    else:
        tokens = [f" w{number}" for number in range(script.num_tokens or 16)]
    return tokens[:limit], "length" if limit and len(tokens) >= limit else "stop"


def _has(body: dict[str, Any], name: str) -> bool:
    value: Any = body
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


class Connection(asyncio.Protocol):
    """One client's connection: reads requests, one after another, and writes bytes."""

    transport: asyncio.Transport

    def __init__(self, state: State) -> None:
        self.state = state
        state.num_connections += 1
        self.number = state.num_connections
        self.loop = asyncio.get_running_loop()
        self.buffer = b""
        self.num_generations = 0
        self.play: Play | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.play is not None:
            self.play.left()

    def data_received(self, data: bytes) -> None:
        now_ns = time.perf_counter_ns()
        self.buffer += data
        head, mark, rest = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        headers = {name.lower(): value for name, _, value in pairs}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        method, target, _ = first.split(" ")
        body = json.loads(rest[:length]) if length else {}
        self.route(method, target.partition("?")[0], headers, body, now_ns)

    def route(
        self, method: str, path: str, headers: dict[str, str], body: dict[str, Any], now_ns: int
    ) -> None:
        script = self.state.script
        if path in ("/configure", "/stall", "/log"):
            return self.reply(200, self.control(path, body))
        if script.api_key and headers.get("authorization") != f"Bearer {script.api_key}":
            shown = headers.get("authorization", "").removeprefix("Bearer ")
            return self.reply(401, {"error": {"message": f"Incorrect API key provided: {shown}"}})
        if method == "POST" and (path.startswith("/generate") or path.endswith("completions")):
            self.num_generations += 1
            if script.close_idle and self.num_generations > 1:
                return self.transport.abort()
            self.play = Play(self, path, body, now_ns)
            self.play.entry["headers"] = headers
            return self.play.begin()
        if path == "/v1/models":
            more = {"max_model_len": script.max_model_len} if script.max_model_len else {}
            data = [{"id": name, "owned_by": script.engine} | more for name in script.models]
            return self.reply(200, {"object": "list", "data": data})
        if path == "/version" and script.version:
            return self.reply(200, {"version": script.version})
        if path == "/info" and script.engine == "tgi":
            return self.reply(200, {"model_id": model_of(script), "version": script.version})
        return self.reply(404, {"error": {"message": f"no {path}"}})

    def control(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/configure":
            self.state.configure(body)
        elif path == "/stall":
            begin_s = self.loop.time() + body["after_s"]
            self.state.stall = (begin_s, begin_s + body["duration_s"])
        else:
            return self.state.log
        return {}

    def head(self, status: int, kind: str, close: bool, more: str = "") -> None:
        """The head of an answer in chunks."""
        lines = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n"
        lines += more + ("Connection: close\r\n" if close else "")
        self.transport.write(lines.encode() + b"\r\n")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self, script: Script) -> None:
        self.transport.write(b"0\r\n\r\n")
        if script.close:
            self.transport.close()

    def reply(
        self, status: int, document: Any, more: dict[str, str] | None = None, close: bool = False
    ) -> None:
        """A whole answer at once."""
        data = json.dumps(document).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in (more or {}).items())
        lines += "Connection: close\r\n" if close else ""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{lines}"
        self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if status != 200:
            self.play = None
        if close:
            self.transport.close()


async def main(host: str, certificate: str) -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    state = State()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(state), host, 0, ssl=context, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    # An orphan does not stay: standard input closes when the parent ends.
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    gc.disable()  # no pauses; a test's garbage is small
    asyncio.run(main(*sys.argv[1:]))
