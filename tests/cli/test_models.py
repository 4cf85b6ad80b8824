"""`penstock models` as a user types it, on a cache that a fake hub has filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent.parent / "hub"))

from fake_hub import FakeHub

from penstock import builtin
from penstock.cli.main import cli
from penstock.hub import resolve_model
from penstock.hub.cache import Repo, try_lock

CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'
FILES = {"config.json": CONFIG, "model.safetensors": b"weights" * 1000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process, for exit status, stdout and stderr as they are."""
    return subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "models", *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
        timeout=60,
        check=False,
    )


def models(*arguments: str) -> Any:
    """What `--json` prints."""
    found: Result = CliRunner().invoke(cli, ["models", *arguments, "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_list(hub: FakeHub, cache: Path) -> None:
    commit = hub.add("org/name", FILES)
    resolve_model("org/name")
    gptq = b'{"architectures": ["NoSuchModel"], "quantization_config": %s}'
    gptq = gptq % b'{"quant_method": "gptq", "bits": 4}'
    hub.add("org/other", {"config.json": gptq, "model.safetensors": b"w"})
    resolve_model("org/other")
    hub.add("org/quantized", {"m-Q4_K_M.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF8"})
    resolve_model("org/quantized:Q8_0")
    found = models()
    assert found == models("list")
    assert [one["name"] for one in found] == ["org/name", "org/other", "org/quantized"]
    first = found[0]
    assert first["commit"] == commit
    assert first["refs"] == ["main"]
    assert first["num_bytes"] == len(CONFIG) + 7000
    assert first["is_whole"]
    assert first["architecture"] == "LlamaForCausalLM"
    assert [one["is_supported"] for one in found] == [True, False, None]
    forms = [one["form"] for one in found]
    assert forms == ["safetensors", "safetensors gptq 4-bit", "GGUF Q8_0"]
    done = run()
    assert done.returncode == 0
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["NAME", "REVISION", "SIZE", "FORMAT", "ARCHITECTURE", "LAST", "USED"]
    assert f"{commit[:8]} (main)  7.04 kB  safetensors " in rows[0]
    assert rows[0].endswith("  now")
    assert "NoSuchModel (not supported)" in rows[1]


def test_list_of_a_cache_with_oddities(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "")
    assert "no models in" in done.stderr
    hostile = b'{"architectures": ["\\u001b[31mEvil\\n"]}'
    hub.add("org/name", {"config.json": hostile, "model.safetensors": b"w"})
    path = resolve_model("org/name")
    (path.parent / "not-a-commit").mkdir()
    (path.parent / ("c" * 40)).symlink_to("nowhere")
    (path.parent / ("d" * 40)).write_text("no directory")
    (cache / "models--a--b--c").mkdir()
    (cache / "datasets--org--name").mkdir()
    (cache / "models--org--link").symlink_to(tmp_path)
    repo = Repo(cache, "org/name")
    repo.partial("0" * 64).write_bytes(b"begun")
    (path / "model.safetensors").resolve().unlink()
    done = run()
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 2
    assert "none (not whole)" in done.stdout
    assert "and 5 B of downloads that were not finished" in done.stderr


def test_pull(hub: FakeHub, cache: Path) -> None:
    old = hub.add("org/name", FILES, "v1")
    hub.add("org/name", {**FILES, "tokenizer.json": b"{}"})
    done = run("pull", "org/name", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(cache / "models--org--name" / "snapshots" / old)
    assert old in done.stderr
    assert models("pull", "org/name@v1") == {"path": done.stdout.strip()}
    hub.statuses["listing"] = [403]
    refused = run("pull", "org/name@v1")
    assert refused.returncode == 1
    assert "gated or private" in refused.stderr
    assert run("pull", "brook").returncode == 1


def test_verify(hub: FakeHub, cache: Path) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": b"%d" % n * 1000 for n in (1, 2)}
    index = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    commit = hub.add(
        "org/name", {"config.json": CONFIG, "model.safetensors.index.json": index, **shards}
    )
    path = resolve_model("org/name")
    done = run("verify", "org/name")
    assert done.returncode == 0, done.stderr
    assert "4 files, " in done.stdout
    assert "all is as the hub announced it" in done.stdout

    (path / "foreign.txt").write_text("no link")
    (found,) = models("verify", "org/name@main")
    assert (found["ok"], found["commit"], found["unknown"]) == (True, commit, ["foreign.txt"])

    first, second = shards
    blob = (path / first).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    config = (path / "config.json").resolve()
    config.unlink()
    (path / second).unlink()
    done = run("verify", "org/name")
    assert done.returncode == 4
    assert f"DAMAGED  {first}" in done.stdout
    assert "MISSING  config.json" in done.stdout
    assert f"MISSING  {second}" in done.stdout
    assert f"penstock models remove org/name@{commit[:8]}" in done.stdout
    done = run("verify", "org/name", "--json")
    assert done.returncode == 4
    (found,) = json.loads(done.stdout)
    assert not found["ok"]
    assert found["damaged"] == [first]


def test_remove_keeps_what_others_need(hub: FakeHub, cache: Path) -> None:
    hub.add("org/name", FILES, "v1")
    old = resolve_model("org/name@v1")
    hub.add("org/name", {**FILES, "config.json": b"{}"})
    new = resolve_model("org/name")
    resolve_model(f"org/name@{old.name[:8]}")
    partial = Repo(cache, "org/name").partial("0" * 64)
    partial.write_bytes(b"begun, and nobody knows for which")
    found = models("remove", "org/name@v1", "--yes")
    assert found["commits"] == [old.name]
    assert found["refs"] == sorted(["v1", old.name[:8]])
    assert found["num_bytes"] == len(CONFIG)
    assert not old.exists()
    assert partial.exists()
    assert (new / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [one["commit"] for one in models()] == [new.name]
    (found,) = models("verify", "org/name")
    assert found["ok"]
    models("remove", "org/name", "--yes")
    assert [path.name for path in cache.iterdir()] == [".locks"]
    assert not list((cache / ".locks").iterdir())
    assert models() == []


def test_remove_asks(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", FILES)
    path = resolve_model("org/name")
    done = run("remove", "org/name")
    assert done.returncode == 2
    assert "give `--yes`" in done.stderr
    monkeypatch.setattr("penstock.cli.models._is_asked", lambda: True)
    assert CliRunner().invoke(cli, ["models", "remove", "org/name"], input="n\n").exit_code == 1
    assert path.exists()
    answered = CliRunner().invoke(cli, ["models", "remove", "org/name"], input="y\n")
    assert answered.exit_code == 0
    assert "removed org/name: 1 revisions, 7.04 kB" in answered.stdout
    assert not path.exists()


def test_remove_follows_no_link(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.add("org/name", FILES)
    path = resolve_model("org/name")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (path / "precious").symlink_to(outside / "precious")
    (path / "directory").symlink_to(outside)
    (path.parent.parent / "blobs" / "link").symlink_to(outside)
    (path.parent.parent / "refs" / "link").symlink_to(outside / "precious")
    (path.parent / ("a" * 40)).symlink_to(outside)
    models("remove", "org/name", "--yes")
    assert (outside / "precious").read_text() == "mine"
    assert not path.parent.parent.exists()


@pytest.mark.parametrize("part", ["blobs", "snapshots", "refs"])
def test_a_model_whose_folders_are_links_is_not_touched(
    hub: FakeHub, cache: Path, tmp_path: Path, part: str
) -> None:
    hub.add("org/name", FILES)
    resolve_model("org/name")
    folder = cache / "models--org--name"
    (folder / part).rename(tmp_path / "moved")
    (folder / part).symlink_to(tmp_path / "moved")
    done = run("remove", "org/name", "--yes")
    assert done.returncode == 1
    assert "is a link" in done.stderr
    assert list((tmp_path / "moved").iterdir())


def test_remove_waits_for_nobody(hub: FakeHub, cache: Path) -> None:
    hub.add("org/name", FILES)
    path = resolve_model("org/name")
    fd = try_lock(next((cache / ".locks").rglob("*.lock")))
    assert fd is not None
    done = run("remove", "org/name", "--yes")
    os.close(fd)
    assert done.returncode == 1
    assert "is being downloaded" in done.stderr
    assert path.exists()


@pytest.mark.parametrize("command", ["verify", "remove"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("org/none", "`org/none` is not in the cache"),
        ("org/name@v9", "`org/name@v9` is not in the cache"),
        ("org/name:Q4_0", "names a part of a model"),
        ("brook", "`brook` is no model of a hub"),
        ("../../x", "is no model of a hub"),
    ],
)
def test_what_is_not_in_the_cache(
    hub: FakeHub, cache: Path, command: str, name: str, why: str
) -> None:
    hub.add("org/name", FILES)
    resolve_model("org/name")
    done = run(command, name, *(["--yes"] if command == "remove" else []))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert why in done.stderr


def test_a_download_that_only_began(hub: FakeHub, cache: Path) -> None:
    repo = Repo(cache, "org/name")
    repo.partial("0" * 64).parent.mkdir(parents=True)
    repo.partial("0" * 64).write_bytes(b"begun")
    done = run("verify", "org/name")
    assert done.returncode == 1
    assert "holds beginnings only" in done.stderr
    assert models("remove", "org/name", "--yes")["num_bytes"] == 5
    assert not repo.folder.exists()


def test_no_torch_and_no_engine() -> None:
    code = (
        "import sys\nfrom penstock.cli.main import cli\n"
        "cli(['models'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'numpy', 'tqdm', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_serve_a_model_of_a_hub(hub: FakeHub, cache: Path) -> None:
    """It is downloaded before the engine's process starts, and served under its name."""
    files = {file.name: file.read_bytes() for file in builtin.path("brook").iterdir()}
    commit = hub.add("org/brook", files, "v1")
    command = ["serve", "org/brook", "--revision", "v1", "--port", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli.main", *command, "--num-threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    try:
        assert process.stdout is not None
        info = json.loads(process.stdout.readline() or "{}")
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert info.get("model") == "org/brook", log
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert messages[0].startswith("downloading org/brook at ")
    assert f"org/brook at v1 is commit {commit}" in messages
    assert len([asked for asked in hub.asked if asked.path.startswith("/api/")]) == 1
