"""Made-up prompts: as long as asked for, as common as declared, and otherwise unique."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

import penstock.builtin
from penstock.errors import ConfigError
from penstock.measure.load import tokens, words
from penstock.measure.load.target import Ask
from penstock.measure.load.traces import Arrival
from penstock.measure.load.words import Lengths

BROOK = Path(penstock.builtin.__path__[0]) / "brook"
FIXED = Lengths(100, 100)


@pytest.fixture(scope="module")
def brook() -> tokens.Counter:
    return tokens.from_file(BROOK)


def common_words(texts: list[str]) -> list[str]:
    """The words with which all of them begin."""
    found = []
    for words_there in zip(*(text.split() for text in texts), strict=False):
        if len(set(words_there)) > 1:
            break
        found.append(words_there[0])
    return found


def texts(asks: list[Ask]) -> list[str]:
    return [ask.prompt for ask in asks if isinstance(ask.prompt, str)]


def test_lengths_are_met(brook: tokens.Counter) -> None:
    """But for the first word, which may be several tokens where no space is before it."""
    found = words.measured(brook)
    asks = words.synthetic(
        50, input_tokens=Lengths(40, 200), output_tokens=FIXED, seed=1, words=found
    )
    counts = [brook.count(text) for text in texts(asks)]
    assert 40 <= min(counts) < 60
    assert 180 < max(counts) <= 203
    exact = words.synthetic(20, input_tokens=FIXED, output_tokens=FIXED, seed=1, words=found)
    assert {brook.count(text) for text in texts(exact)} <= {99, 100, 101, 102, 103}


def test_a_tokenizer_of_letters_only_is_met_on_average() -> None:
    found = words.measured(tokens.Counter(len, "letters"))
    asks = words.synthetic(
        40, input_tokens=Lengths(2000, 2000), output_tokens=FIXED, seed=1, words=found
    )
    lengths = [len(text) for text in texts(asks)]
    assert sum(lengths) / len(lengths) == pytest.approx(2000, rel=0.02)


def test_prompts_are_unique_and_of_their_seed() -> None:
    def made(seed: int, name: str = "a") -> list[str]:
        return texts(
            words.synthetic(
                200, input_tokens=Lengths(5, 9), output_tokens=FIXED, seed=seed, name=name
            )
        )

    assert len(set(made(1))) == 200
    assert made(1) == made(1)
    assert not set(made(1)) & set(made(2))
    assert not set(made(1)) & set(made(1, "b"))


def test_the_declared_share_of_the_prefix_is_common() -> None:
    asks = words.synthetic(
        30, input_tokens=Lengths(400, 400), output_tokens=FIXED, seed=1, prefix_share=0.6
    )
    shared = common_words(texts(asks))
    assert len(shared) / len(texts(asks)[0].split()) == pytest.approx(0.6, abs=0.02)
    other = words.synthetic(
        1, input_tokens=Lengths(400, 400), output_tokens=FIXED, seed=1, prefix_share=0.6, name="b"
    )
    assert texts(other)[0].split()[: len(shared)] == shared  # the next stage has it too


def test_a_prefix_of_a_length_comes_on_top(brook: tokens.Counter) -> None:
    asks = words.synthetic(
        5,
        input_tokens=FIXED,
        output_tokens=FIXED,
        seed=1,
        prefix_tokens=50,
        words=words.measured(brook),
    )
    assert {brook.count(text) for text in texts(asks)} <= {149, 150, 151, 152, 153}


def test_usage_teaches_how_long_words_are() -> None:
    """Servers without a tokenizer: n_in = 11 + 1.7 x words."""
    pairs = [(" ".join(["word"] * num), round(11 + 1.7 * num)) for num in (10, 100, 200, 400)]
    found = words.GUESS.refined(pairs)
    assert found.tokens_per_word == pytest.approx(1.7, rel=0.01)
    assert found.overhead == pytest.approx(11, abs=1)
    assert "usage" in found.source
    assert found.num_words(11 + 1.7 * 300) == pytest.approx(300, abs=2)
    assert words.GUESS.refined([("a b", None)]) == words.GUESS


def test_usage_teaches_the_template_where_a_tokenizer_knows_the_words() -> None:
    known = words.Words(words.WORDS, 1.0, 1.0, "the server's /tokenize")
    found = known.refined([("a b c", 9), ("a b c d", 10)])
    assert (found.tokens_per_word, found.overhead) == (1.0, 6.0)


@pytest.mark.parametrize(
    ("text", "low", "high"), [("512", 512, 512), ("2-6", 2, 6), ("normal:100:20", 20, 180)]
)
def test_lengths(text: str, low: int, high: int) -> None:
    lengths, chance = Lengths.parse(text, "--x"), Random(1)
    drawn = [lengths.draw(chance) for _ in range(500)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert sum(drawn) / 500 == pytest.approx(lengths.mean, rel=0.05)


@pytest.mark.parametrize("text", ["", "0", "-4", "6-2", "normal:5", "1.5", "many"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        Lengths.parse(text, "--x")


def test_equal_blocks_of_a_trace_are_equal_text(brook: tokens.Counter) -> None:
    arrivals = [
        Arrival(due_s=0, num_in=1100, num_out=0, prefix_blocks=(1, 2, 3)),
        Arrival(due_s=1, num_in=1060, num_out=7, prefix_blocks=(1, 2, 4)),
        Arrival(due_s=2, num_in=900, num_out=5, prefix_blocks=(9, 2)),
        Arrival(due_s=3, num_in=80, num_out=5),
    ]
    asks = list(words.for_trace(arrivals, seed=1, words=words.measured(brook)))
    first, second, third, fourth = texts(asks)
    common = common_words([first, second])
    assert brook.count(" ".join(common)) == pytest.approx(1024, abs=8)
    assert not common_words([first, third])
    for arrival, text in zip(arrivals, (first, second, third, fourth), strict=True):
        assert brook.count(text) == pytest.approx(arrival.num_in, abs=4)
    assert [(ask.max_tokens, ask.fixed_length) for ask in asks[:2]] == [(1, True), (7, True)]


def test_a_trace_with_texts_is_asked_as_it_is() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    arrivals = [Arrival(due_s=0, prompt="Say hi", num_out=3), Arrival(due_s=1, messages=messages)]
    first, second = words.for_trace(arrivals, seed=1)
    assert (first.prompt, first.max_tokens) == ("Say hi", 3)
    assert (second.prompt, second.messages, second.max_tokens) == (None, messages, None)
    assert not second.fixed_length


class _Tokenize(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 4096  # head and body in one packet
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"]))
        found = self.path == "/tokenize"
        data = json.dumps({"count": 1 + len(body["prompt"].split())}).encode() if found else b"{}"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def tokenize_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Tokenize)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_servers_own_tokenizer(tokenize_url: str) -> None:
    counter = tokens.from_server(f"{tokenize_url}/v1", api_key="secret")
    assert counter is not None
    assert counter.count("three little words") == 4
    assert set(_Tokenize.seen) == {("/tokenize", "Bearer secret")}
    found = words.measured(counter)
    assert (found.tokens_per_word, found.overhead) == (1.0, 1.0)
    assert tokens.from_server(f"{tokenize_url}/elsewhere") is None
    counter.close()


def test_no_server_and_no_tokenizer(tmp_path: Path) -> None:
    assert tokens.from_server("http://127.0.0.1:1") is None
    with pytest.raises(ConfigError, match="--tokenizer"):
        tokens.from_file(tmp_path)
