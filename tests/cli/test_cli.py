"""The commands as a user types them: in a process, with stdin, stdout and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.cli.main import COMMANDS, LazyGroup, cli
from penstock.cli.options import Bytes

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
    assert "--json" in done.stdout


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
    prompts.write_text(text)
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
    assert "does not answer" in unreachable.stderr
    assert penstock("chat", "x", "--temperature", "-1").stderr.startswith("error: `temperature`")
    assert penstock("serve", "--no-such-option").returncode == 2


@pytest.mark.parametrize(("module", "extra"), [("torch", "engine"), ("httpx", "serve")])
def test_a_missing_extra_is_a_sentence(module: str, extra: str, tmp_path: Path) -> None:
    """As after `pip install penstock`: importing the module fails as if it were not there."""
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    arguments = ["chat", "Hello!", *(["--url", "http://127.0.0.1:9"] if module == "httpx" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"`{module}`, which is not installed" in done.stderr
    assert f"penstock[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_tells_the_same_twice() -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(cli, ["doctor", "--json"]).stdout)
    assert found["packages"]["torch"].startswith("2.")
    assert found["backends"]["reference (torch)"].startswith("runs")
    assert "brook" in found["built-in models"]
    text = runner.invoke(cli, ["doctor"]).stdout
    for section in found:
        assert section in text


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), ("4GiB", 2**32), ("1.5 kib", 1536), ("2 MB", 2_000_000)]
)
def test_bytes(text: str, number: int) -> None:
    assert Bytes().convert(text, None, None) == number


def test_wrong_bytes() -> None:
    done = penstock("serve", "--kv-cache-memory-bytes", "many")
    assert done.returncode == 2
    assert "`many` is not a number of bytes" in done.stderr
