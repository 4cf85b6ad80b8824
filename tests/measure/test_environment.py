"""What a run keeps of its machine and its files, and what it must not keep."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure import environment


def test_capture_is_json_and_says_what_matters() -> None:
    found = environment.capture(interval_s=0.02)
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]["num_usable_cores"] >= 1
    assert found["memory"]["available_bytes"] > 0
    assert found["packages"]["msgspec"]
    assert found["load"]["num_busy_processes"] >= 0
    assert "argv" not in json.dumps(found)


def test_busy_processes_are_seen_by_name(tmp_path: Path) -> None:
    busy = tmp_path / "busybody"
    busy.symlink_to("/bin/sh")
    # A shell that ends leaves it behind: the children of who measures are no others.
    starts = f"{busy} -c 'while :; do :; done' 'a secret' >&- 2>&- & echo $!"
    done = subprocess.run(["sh", "-c", starts], capture_output=True, text=True, timeout=10)
    try:
        found = environment.capture(interval_s=0.3)["load"]
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)
    assert found["num_busy_processes"] >= 1
    assert found["busy_cores"] > 0
    assert "a secret" not in json.dumps(found)


def test_an_engine_that_was_started_here_is_no_other() -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as process:
        try:
            before = environment._load(0.2)
        finally:
            process.kill()
    assert "sh" not in {one["name"] for one in before.get("busiest", [])}


def test_a_busy_machine_is_told() -> None:
    busiest = [{"name": "cc1", "cores": 0.31}]
    told = environment.busy_note({"load": {"busy_cores": 0.31, "busiest": busiest}})
    assert told is not None
    assert "other processes used 0.31 cores (cc1 0.31)" in told
    assert environment.busy_note({"load": {"busy_cores": 0.2, "busiest": busiest}}) is None
    assert environment.busy_note({"load": {}}) is None
    assert environment.busy_note({}) is None


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--api-key", "abc"], ["--api-key", "***"]),
        (["--api-key=abc"], ["--api-key=***"]),
        (["--token", "--json"], ["--token", "--json"]),
        (["--hf-token", "abc", "x"], ["--hf-token", "***", "x"]),
        (["--client-secret", "-abc"], ["--client-secret", "***"]),
        (["--db-password=a=b"], ["--db-password=***"]),
        (["--max-tokens", "12"], ["--max-tokens", "12"]),
        (["--max-tokens=12"], ["--max-tokens=12"]),
        (["--tokenizer", "gpt2"], ["--tokenizer", "gpt2"]),
        (["--api-key-env", "MY_KEY"], ["--api-key-env", "MY_KEY"]),
        (["--header", "Authorization: Bearer abc"], ["--header", "Authorization: ***"]),
        (["--header=X-Key: abc"], ["--header=X-Key: ***"]),
        (["-H", "no colon"], ["-H", "***"]),
        (["-HX-Key: abc"], ["-HX-Key: ***"]),
        (["http://me:pw@h/v1?api_key=abc&n=2"], ["http://***@h/v1?api_key=***&n=2"]),
        (["vllm:/m?token=abc&threads=2"], ["vllm:/m?token=***&threads=2"]),
        (["API_KEY=abc"], ["API_KEY=***"]),
        (["sk-proj-abcdefghijklmnop"], ["***"]),
        (["hf_abcdefghijklmnopqrst"], ["***"]),
        (["penstock", "bench", "http://127.0.0.1:8000#m"], None),
    ],
)
def test_secrets_are_hidden_and_nothing_else(argv: list[str], told: list[str] | None) -> None:
    assert environment.redact(argv) == (argv if told is None else told)


def test_hash_of_a_file(tmp_path: Path) -> None:
    for size in (10, 3 * 2**20):
        path = tmp_path / str(size)
        path.write_bytes(b"x" * size)
        expected = hashlib.sha256(b"x" * size).hexdigest()
        assert environment.hash_file(path) == expected
        assert environment.hash_file(path) == expected  # also as remembered
    with pytest.raises(ConfigError, match="cannot be read"):
        environment.hash_file(tmp_path / "missing")


def test_a_changed_file_is_hashed_anew(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 2**21)
    before = environment.hash_file(path)
    assert list((cache_dir / "hashes").glob("*.json")), "a large file's hash is kept"
    path.write_bytes(b"b" * 2**21)
    os.utime(path, ns=(1, 2**40))  # another time, whatever the clock's resolution is
    after = environment.hash_file(path)
    assert after == hashlib.sha256(b"b" * 2**21).hexdigest() != before
    for kept in (cache_dir / "hashes").glob("*.json"):
        kept.write_text("damaged")
    assert environment.hash_file(path) == after


def test_a_time_that_was_put_back_hides_no_change(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 2**21)
    os.utime(path, ns=(1, 2**40))
    before = environment.hash_file(path)
    time.sleep(0.02)  # a change in the same tick of the file system's clock has the same time
    path.write_bytes(b"b" * 2**21)
    os.utime(path, ns=(1, 2**40))
    assert environment.hash_file(path) != before


def test_hash_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_text("2")
    (tmp_path / "one").write_text("1")
    found = environment.hash_directory(tmp_path)
    command = "find . -type f -printf '%P\\0' | sort -z | xargs -0 sha256sum | sha256sum"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    assert found == done.stdout.split()[0]
    (tmp_path / "one").rename(tmp_path / "uno")
    assert environment.hash_directory(tmp_path) != found
    with pytest.raises(ConfigError, match="is no directory"):
        environment.hash_directory(tmp_path / "uno")


def test_hash_of_texts_knows_where_one_ends() -> None:
    assert environment.hash_texts(["ab", "c"]) != environment.hash_texts(["a", "bc"])
    assert environment.hash_texts(["ab"]) != environment.hash_texts(["ab", ""])
    assert environment.hash_texts(iter(["\ud800"]))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--password=hunter2,and;more", "--password=***"),
        ("postgresql://me:hun/ter2@host/x", "postgresql://***@host/x"),
        ("--database=postgresql://me:hunt@er2@host/x", "--database=postgresql://***@host/x"),
        ("http://host/v1?sig=hunter2&version=1", "http://host/v1?sig=***&version=1"),
        ("http://host/v1/@cf/model", "http://host/v1/@cf/model"),
    ],
)
def test_secrets_with_odd_characters_are_hidden(word: str, told: str) -> None:
    assert environment.redact([word]) == [told]
