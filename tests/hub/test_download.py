"""Downloading from a hub: what is fetched, what is resumed, what is refused."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub, digest_of, git_sha1, total_bytes

from penstock.errors import ConfigError, ModelLoadError, PenstockError
from penstock.hub import client, download, progress, resolve_model
from penstock.hub.cache import Repo

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


def resolve_in_a_process(name: str, num_bytes_at_a_time: int = 4096) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom penstock.hub import client, download, resolve_model\n"
        f"client.WAITS_S = (0.01,)\ndownload._CHUNK_BYTES = {num_bytes_at_a_time}\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def test_only_what_is_needed_is_fetched(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    commit = hub.add("org/name", model_files)
    path = resolve_model("org/name")
    assert path == cache / "models--org--name" / "snapshots" / commit
    found = {file.name: file.read_bytes() for file in path.iterdir()}
    wanted = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        SHARD,
        OTHER,
    }
    assert found == {name: model_files[name] for name in wanted}
    assert (path.parent.parent / "refs" / "main").read_text() == commit
    for name in wanted:  # as Hugging Face's tools lay it out
        digest = digest_of(name, model_files[name])
        assert os.readlink(path / name) == f"../../blobs/{digest}"
    blobs = {file.name for file in (path.parent.parent / "blobs").iterdir()}
    assert blobs == {digest_of(name, model_files[name]) for name in wanted}
    for name in model_files.keys() - wanted:
        assert not [asked for asked in hub.asked if asked.path.endswith(name)]


def test_huggingface_hub_finds_what_was_downloaded(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    pytest.importorskip("huggingface_hub")
    hub.add("org/name", model_files)
    path = resolve_model("org/name")
    code = (
        "from huggingface_hub import snapshot_download, scan_cache_dir\n"
        "print(snapshot_download('org/name', local_files_only=True))\n"
        "found = scan_cache_dir()\nassert not found.warnings, found.warnings\n"
        "print([repo.repo_id for repo in found.repos])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(path), "['org/name']"]


def test_the_second_time_nothing_is_fetched(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], told: pytest.LogCaptureFixture
) -> None:
    commit = hub.add("org/name", model_files)
    first = resolve_model("org/name")
    assert commit in told.text
    hub.asked.clear()
    assert resolve_model("org/name") == first
    assert [asked.path for asked in hub.asked] == ["/api/models/org/name/revision/main?blobs=true"]


def test_a_connection_that_breaks_is_taken_up(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.breaks = {SHARD: [100_000, 50_000, 1], "tokenizer.json": [5]}
    path = resolve_model("org/name")
    assert (path / SHARD).read_bytes() == model_files[SHARD]
    assert (path / "tokenizer.json").read_bytes() == model_files["tokenizer.json"]
    spans = [int((asked.span or "").split("=")[1].split("-")[0]) for asked in hub.fetched(SHARD)]
    assert spans == sorted(spans)
    assert spans[0] == 0
    assert len(spans) == 4
    # What was sent and got lost in a reset is fetched again; what arrived is not.
    assert total_bytes(hub.fetched(SHARD)) < len(model_files[SHARD]) * 1.6


def test_a_file_is_fetched_in_ranges(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores refuse to give 50 GB in one answer."""
    monkeypatch.setattr(download, "RANGE_BYTES", 100_000)
    hub.add("org/name", model_files)
    path = resolve_model("org/name")
    assert (path / SHARD).read_bytes() == model_files[SHARD]
    assert [asked.span for asked in hub.fetched(SHARD)] == [
        "bytes=0-99999",
        "bytes=100000-199999",
        "bytes=200000-299999",
    ]


def test_a_server_without_ranges_starts_again(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], told: pytest.LogCaptureFixture
) -> None:
    hub.add("org/name", model_files)
    hub.without_ranges = {SHARD}
    partial = Repo(cache, "org/name").partial(digest_of(SHARD, model_files[SHARD]))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(model_files[SHARD][:100_000])
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]
    assert len(hub.fetched(SHARD)) == 1
    assert "damaged" not in told.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_download_goes_on_where_it_was(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], number: signal.Signals
) -> None:
    commit = hub.add("org/name", model_files)
    hub.gates[SHARD] = threading.Event()
    half = hub.halves[SHARD] = threading.Event()
    process = resolve_in_a_process("org/name")
    assert half.wait(30)
    partial = Repo(cache, "org/name").partial(digest_of(SHARD, model_files[SHARD]))
    while not partial.exists() or partial.stat().st_size < 140_000:
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    kept_bytes = partial.stat().st_size
    assert 140_000 <= kept_bytes < len(model_files[SHARD])
    snapshot = cache / "models--org--name" / "snapshots" / commit
    assert not (snapshot / SHARD).exists()
    assert not (snapshot.parent.parent / "refs").exists()
    assert partial.read_bytes() == model_files[SHARD][:kept_bytes]

    hub.gates.pop(SHARD).set()
    hub.asked.clear()
    path = resolve_model("org/name")
    assert (path / SHARD).read_bytes() == model_files[SHARD]
    assert not partial.exists()
    (again,) = hub.fetched(SHARD)
    assert again.span == f"bytes={kept_bytes}-{len(model_files[SHARD]) - 1}"
    assert again.num_sent_bytes == len(model_files[SHARD]) - kept_bytes
    assert not hub.fetched("tokenizer.json")


def test_two_processes_share_a_download(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    gate = hub.gates[SHARD] = threading.Event()
    half = hub.halves[SHARD] = threading.Event()
    first = resolve_in_a_process("org/name")
    assert half.wait(30)
    second = resolve_in_a_process("org/name")
    assert second.stderr is not None
    for line in second.stderr:  # it says so when it waits
        if "another process" in line:
            break
    gate.set()
    told = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], told
    assert told[0][0] == told[1][0]
    path = Path(told[0][0].strip())
    assert (path / SHARD).read_bytes() == model_files[SHARD]
    assert (path / OTHER).read_bytes() == model_files[OTHER]
    assert len(hub.fetched(SHARD)) == 1


def test_wrong_bytes_are_refused_and_removed(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.contents[SHARD] = model_files[SHARD][:-1] + b"?"
    with pytest.raises(ModelLoadError, match=f"`{SHARD}` of `org/name` is not what the hub") as no:
        resolve_model("org/name")
    assert digest_of(SHARD, model_files[SHARD]) in str(no.value)
    repo = Repo(cache, "org/name")
    digest = digest_of(SHARD, model_files[SHARD])
    assert not repo.blob(digest).exists()
    assert not repo.partial(digest).exists()
    hub.contents.clear()
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]


def test_wrong_bytes_of_a_small_file_are_refused(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.contents["config.json"] = model_files["config.json"].replace(b"Llama", b"Lemma")
    with pytest.raises(ModelLoadError, match=r"`config\.json` of `org/name` is not what"):
        resolve_model("org/name")


def test_a_file_that_is_longer_than_announced_is_refused(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.without_ranges = {SHARD}
    hub.contents[SHARD] = model_files[SHARD] + b"more"
    with pytest.raises(ModelLoadError, match="longer than `300000` bytes"):
        resolve_model("org/name")


def test_a_file_of_another_size_is_refused(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.contents[SHARD] = model_files[SHARD][:1000]
    with pytest.raises(ModelLoadError, match="it has `1000` bytes, not `300000`"):
        resolve_model("org/name")


def test_what_was_kept_and_is_damaged_is_fetched_anew(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], told: pytest.LogCaptureFixture
) -> None:
    hub.add("org/name", model_files)
    partial = Repo(cache, "org/name").partial(digest_of(SHARD, model_files[SHARD]))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 200_000)
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]
    assert "damaged; fetching it anew" in told.text


def test_a_partial_file_is_no_link_to_elsewhere(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("org/name", model_files)
    partial = Repo(cache, "org/name").partial(digest_of(SHARD, model_files[SHARD]))
    partial.parent.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    partial.symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot be written"):
        resolve_model("org/name")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("what", ["listing", SHARD, "config.json"])
def test_a_busy_hub_is_asked_again(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], what: str
) -> None:
    hub.add("org/name", model_files)
    hub.statuses[what] = [429, 500, 503]
    hub.headers = {"Retry-After": "0"}
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]


def test_a_long_wait_is_told(told: pytest.LogCaptureFixture) -> None:
    busy = client.Unavailable("The hub is busy.", is_passing=True, wait_s=30.0)
    assert client.seconds_to_wait(1, busy) == 30.0
    assert "The hub is busy; asking again in 30 s" in told.text


def test_a_link_to_the_store_that_has_expired_is_asked_for_again(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.store_statuses[SHARD] = [403]
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]


def test_a_hub_that_stays_busy_is_an_error(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.statuses[SHARD] = [503] * 100
    with pytest.raises(ModelLoadError, match=f"status 503 for `{SHARD}` of `org/name`"):
        resolve_model("org/name")
    assert len(hub.statuses[SHARD]) == 100 - download.MAX_ATTEMPTS


def test_a_server_that_sends_nothing_is_an_error(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.2")
    monkeypatch.setattr(download, "MAX_ATTEMPTS", 2)
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"a"})
    hub.gates["model.safetensors"] = threading.Event()  # of one byte, the first half is nothing
    with pytest.raises(ModelLoadError, match="timed out"):
        resolve_model("org/name")


def test_what_comes_before_a_pause_is_kept(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each answer half comes, and far less than is read at once: that is enough to go on."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.2")
    monkeypatch.setattr(download, "MAX_ATTEMPTS", 2)
    hub.add("org/name", model_files)
    hub.gates[SHARD] = threading.Event()
    assert (resolve_model("org/name") / SHARD).read_bytes() == model_files[SHARD]
    firsts = [int((asked.span or "")[6:].split("-")[0]) for asked in hub.fetched(SHARD)]
    assert firsts == sorted(set(firsts))
    assert len(firsts) > 3


def test_an_encoding_that_was_not_asked_for(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.encodings[SHARD] = "gzip"
    with pytest.raises(ModelLoadError, match="in an encoding that was not asked for"):
        resolve_model("org/name")


def test_too_little_room_is_told_before(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model_files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
    with pytest.raises(ConfigError, match=r"needs 450 kB, and `.*` has 200 kB") as no:
        resolve_model("org/name")
    assert "penstock models remove" in str(no.value)
    assert not hub.fetched(SHARD)


def test_a_cache_that_cannot_be_written_is_told(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written") as no:
        resolve_model("org/name")
    assert "HF_HOME" in str(no.value)


def test_progress_is_a_line_now_and_then_in_a_log(
    hub: FakeHub,
    cache: Path,
    model_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    told: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    hub.add("org/name", model_files)
    resolve_model("org/name")
    assert "100 % (450 kB of 450 kB, " in told.text


def test_a_terse_hub_is_asked_for_each_file(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    hub.is_terse = True
    path = resolve_model("org/name")
    assert (path / SHARD).read_bytes() == model_files[SHARD]
    blob = os.readlink(path / "config.json").rsplit("/", 1)[1]
    assert blob == git_sha1(model_files["config.json"])
    heads = [asked for asked in hub.asked if asked.method == "HEAD"]
    assert {asked.server for asked in heads} == {"hub"}
    assert len(heads) == 7


def test_no_more_than_a_few_files_at_a_time(hub: FakeHub, cache: Path) -> None:
    gate = threading.Event()
    names = [f"additional_chat_templates/{number}.jinja" for number in range(12)]
    halves = {name: threading.Event() for name in names}
    hub.gates, hub.halves = dict.fromkeys(names, gate), halves
    templates = {name: name.encode() * 2000 for name in names}
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc", **templates})
    process = resolve_in_a_process("org/name")
    while sum(half.is_set() for half in halves.values()) < download.MAX_PARALLEL:
        assert process.poll() is None
    most = len([asked for asked in hub.asked if "/additional" in asked.path])
    gate.set()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert most == download.MAX_PARALLEL
    assert len([asked for asked in hub.asked if "/additional" in asked.path]) == 12


def test_what_is_there_twice_is_fetched_once(
    hub: FakeHub, cache: Path, told: pytest.LogCaptureFixture
) -> None:
    names = ["config.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
    hub.add("org/name", {"model.safetensors": b"abc"} | dict.fromkeys(names, b"{}"))
    path = resolve_model("org/name")
    assert [(path / name).read_bytes() for name in names] == [b"{}"] * 4
    assert sum(len(hub.fetched(name)) for name in names) == 1
    assert "another process" not in told.text


def test_errors_are_ours(hub: FakeHub, cache: Path, model_files: dict[str, bytes]) -> None:
    hub.add("org/name", model_files)
    hub.breaks[SHARD] = [0] * 50
    with pytest.raises(PenstockError, match=f"does not give `{SHARD}` of `org/name`") as no:
        resolve_model("org/name")
    assert "what has come is kept" in str(no.value)


def test_progress_is_a_bar_on_a_terminal(
    hub: FakeHub,
    cache: Path,
    model_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.0)
    hub.add("org/name", model_files)
    resolve_model("org/name")
    assert "downloading org/name: " in terminal.getvalue()
    assert "450k" in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r")  # and it leaves no line
