"""The commands as a user types them: in a process, with stdin, stdout and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import click
import pytest
from click.testing import CliRunner

from penstock.cli.lines import id_of, job_of
from penstock.cli.main import COMMANDS, LazyGroup, cli
from penstock.cli.options import Bytes
from penstock.engine.config import EngineConfig
from penstock.errors import InvalidField
from penstock.native import library

if TYPE_CHECKING:
    from penstock.llm import LLM

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PENSTOCK_NUM_THREADS": "1"}


def penstock(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom penstock.cli.main import cli\n"
        f"try: cli(['{name}', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: " in done.stdout
    for title, command in leaves(name):
        assert (command.epilog or "").startswith("Example: "), title
        has_json = any("--json" in parameter.opts for parameter in command.params)
        assert has_json or title == "results export", title  # it has --format json


def leaves(name: str) -> list[tuple[str, click.Command]]:
    """A command, or those below it if it is nothing without one."""
    command = LazyGroup().get_command(click.Context(click.Group()), name)
    assert command is not None
    if not isinstance(command, click.Group):
        return [(name, command)]
    below = click.Context(command)
    found = [
        (f"{name} {one}", command.get_command(below, one)) for one in command.list_commands(below)
    ]
    return [(title, one) for title, one in found if one is not None]


def test_the_group_lists_what_the_commands_say() -> None:
    for name, line in COMMANDS.items():
        command = LazyGroup().get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.help
        assert line.endswith(".")


def test_generate_answers_good_lines_and_keeps_bad_ones(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"id": "a", "prompt": "the cat", "max_tokens": 4, "temperature": 0},
        {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 2, "logprobs": 1, "logit_bias": {"9": 100}},
        {"prompt": "x", "temprature": 1},
        {"prompt": "x", "top_p": 7},
        {"prompt": "x", "messages": []},
        {"prompt": "word " * 5000},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\nnot json\n"
    prompts.write_text("\ufeff" + text)
    done = penstock("generate", str(prompts), "-o", str(answers), "--json")
    assert done.returncode == 1, done.stderr
    rows = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert set(rows) == {"a", 2, 3, 4, 5, 6, 7, 8}
    assert len(rows["a"]["outputs"][0]["token_ids"]) <= 4
    assert rows[3]["outputs"][0]["token_ids"] == [9, 9]
    assert rows[3]["usage"]["completion_tokens"] == 2
    errors = {number: rows[number]["error"] for number in (4, 5, 6, 7, 8)}
    assert errors[4]["field"] == "temprature"
    assert errors[5]["field"] == "top_p"
    assert "exactly one of" in errors[6]["message"]
    assert "context" in errors[7]["message"]
    assert "not JSON" in errors[8]["message"]
    summary = json.loads(done.stderr.splitlines()[-1])
    assert (summary["num_prompts"], summary["num_errors"]) == (8, 5)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"prompt": "x", "stop": 5}', "stop"),
        ('{"prompt": "x", "stop": [1]}', "stop"),
        ('{"prompt": "x", "logit_bias": [1]}', "logit_bias"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias"),
        ('{"prompt": "x", "stop_token_ids": 5}', "stop_token_ids"),
        ('{"prompt": "x", "ignore_eos": "no"}', "ignore_eos"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt_token_ids": "abc"}', "prompt_token_ids"),
        ('{"prompt": "x", "tools": []}', "tools"),
        ('{"prompt": "x", "priority": 1}', "priority"),
        ('{"prompt": "x", "top_k": 99999999999999999999}', "top_k"),
        ("[" * 100_000, "body"),
        ("5", "body"),
        ("{}", "prompt"),
    ],
)
def test_a_wrong_line_names_its_field(line: str, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        job_of(line, cast("LLM", SimpleNamespace(config=EngineConfig(model="m"))), {})
    assert caught.value.field.partition("[")[0] == field


def test_a_wrong_line_keeps_its_name() -> None:
    assert id_of('{"id": "a", "oops": 1}') == "a"
    assert id_of('{"id": "\\ud800"}') is None
    assert [id_of(line) for line in ("[" * 100_000, "no", '{"id": []}', "[]")] == [None] * 4


def test_files_that_cannot_be_used_are_told_before_loading(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "caf\xe9"}')
    done = penstock("generate", str(latin))
    assert done.returncode == 1
    assert "cannot be read as UTF-8" in done.stderr
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "x"}')
    done = penstock("generate", str(good), "-o", str(tmp_path / "no" / "where.jsonl"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: `--output")


class _Handler(BaseHTTPRequestHandler):
    answer = b""

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "m"}]}' if self.answer else b'{"data": []}')

    def do_POST(self) -> None:
        self._send(self.answer)

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b'data: {"choices": [{"delta": {"content": "par"}}]}\n\n', "broke off"),
        (b"data: {oops\n\n", "no chunk of an answer"),
        (b'data: {"error": {"message": "the engine died"}}\n\n', "the engine died"),
        (b"", "does not list its models"),
    ],
)
def test_a_server_that_answers_wrongly_is_told(answer: bytes, told: str) -> None:
    handler = type("Handler", (_Handler,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = penstock("chat", "Hello!", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m penstock.cli.main doctor --json | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_chat_answers_one_question() -> None:
    done = penstock("chat", "Hello!", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    as_json = penstock("chat", "--max-tokens", "8", "--json", stdin="Hello!\n")
    assert json.loads(as_json.stdout)["answer"] == done.stdout.removesuffix("\n")


def test_errors_are_a_sentence_and_a_hint() -> None:
    done = penstock("chat", "Hello!", "--model", "no-such-model")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `model` is `no-such-model`")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    unreachable = penstock("chat", "Hello!", "--url", "http://127.0.0.1:9")
    with_engine = penstock("chat", "Hello!", "--url", "http://127.0.0.1:9", "--block-size", "8")
    assert "`--block-size` is for an engine in this process, and `--url`" in with_engine.stderr
    wrong = penstock("chat", "Hello!", "--max-model-len", "100000")
    assert wrong.stderr.startswith("error: `max_model_len` is `100000`, more than")
    assert "does not answer" in unreachable.stderr
    assert penstock("chat", "x", "--temperature", "-1").stderr.startswith("error: `temperature`")
    assert penstock("serve", "--no-such-option").returncode == 2
    assert "hint: penstock chat --model brook" in penstock("chat", "brook").stderr
    assert penstock("chat", stdin="\n").stderr.startswith("error: The question is empty.")


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "torch"), ("numpy", "engine"), ("httpx", "serve")]
)
def test_a_missing_extra_is_a_sentence(module: str, extra: str, tmp_path: Path) -> None:
    """As after `pip install penstock`, without a compiler: no such module, no native library."""
    arguments = ["chat", "Hello!", *(["--url", "http://127.0.0.1:9"] if module == "httpx" else [])]
    done = penstock_without(module, tmp_path, *arguments)
    assert done.returncode == 1
    assert f"`{module}`, which is not installed" in done.stderr
    assert f"penstock[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


def penstock_without(module: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program where there is neither such a module nor the native library."""
    (path / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    (path / "sitecustomize.py").write_text(
        "from penstock.native import library\nlibrary.FILE_NAME = 'nothing'\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments],
        env=ENVIRONMENT | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_library_and_torch_the_error_says_why_torch_is_needed(tmp_path: Path) -> None:
    done = penstock_without("torch", tmp_path, "serve", "--port", "0")
    assert done.returncode == 1
    assert "The native backend cannot be used: this installation has no" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_tries_what_the_native_backend_needs(tmp_path: Path) -> None:
    found = json.loads(penstock_without("numpy", tmp_path, "doctor", "--json").stdout)
    assert found["backends"]["native"]["runs"] is False
    assert found["backends"]["native"]["detail"].startswith("numpy is not installed")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("PENSTOCK_ISA", "avx1024"), ("PENSTOCK_NATIVE_LIBRARY", "/nowhere/library.so")],
)
def test_what_a_variable_asks_for_is_had_or_refused(name: str, value: str, backend: str) -> None:
    if name == "PENSTOCK_ISA" and library.unavailable_reason():
        pytest.skip("no native library here")
    environment = ENVIRONMENT | {name: value}
    arguments = ["serve", "--port", "0", "--backend", backend]
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: `{name}` is `{value}`")
    doctor = [sys.executable, "-m", "penstock.cli.main", "doctor", "--json"]
    told = subprocess.run(doctor, env=environment, capture_output=True, check=True).stdout
    native = json.loads(told)["backends"]["native"]
    assert native["runs"] is False
    assert f"`{name}` is" in native["detail"]


def test_doctor_tells_the_same_twice() -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(cli, ["doctor", "--json"]).stdout)
    assert found["packages"]["torch"].startswith("2.")
    assert found["backends"]["torch"]["runs"] is True
    native = found["backends"]["native"]
    assert native["runs"] == (library.unavailable_reason() is None)
    assert "brook" in found["built-in models"]
    text = runner.invoke(cli, ["doctor"]).stdout
    for section in found:
        assert section in text
    begin = "runs " if native["runs"] else "cannot run: "
    assert f"  native                 {begin}{native['detail']}\n" in text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5),
        ("4GiB", 2**32),
        ("1.5 kib", 1536),
        ("2 MB", 2_000_000),
        ("2TiB", 2**41),
        ("1 TB", 10**12),
    ],
)
def test_bytes(text: str, number: int) -> None:
    assert Bytes().convert(text, None, None) == number


def test_wrong_bytes() -> None:
    done = penstock("serve", "--kv-cache-memory-bytes", "many")
    assert done.returncode == 2
    assert "`many` is not a number of bytes" in done.stderr
