"""What a name means, who is asked, and what refusals say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.client import HTTPMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.request import Request

import pytest
from fake_hub import FakeHub

from penstock import builtin
from penstock.errors import ConfigError, ModelLoadError
from penstock.hub import client, resolve_model, served_name, settings
from penstock.hub.cache import Repo
from penstock.hub.names import HubName, is_safe_file, parse
from penstock.hub.resolve import snapshot

TOKEN = "hf_verySecret123"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("org/name", HubName("org/name")),
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("org/name:Q4_K_M", HubName("org/name", None, "Q4_K_M")),
        ("org/name@main:UD-Q4_K_XL", HubName("org/name", "main", "UD-Q4_K_XL")),
        ("org/name:sub/a-Q8_0.gguf", HubName("org/name", None, "sub/a-Q8_0.gguf")),
    ],
)
def test_names_of_a_hub(name: str, model: HubName) -> None:
    assert parse(name) == model
    assert str(model) == name


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "org/name/more",
        "../name",
        "org/..",
        "org/a--b",
        "org/.name",
        "/org/name",
        "./org/name",
        "org/na me",
        "org/name:",
        "org/name:../x",
        "org/name\n",
        "org/name@",
        "https://huggingface.co/org/name",
        "o" * 60 + "/" + "n" * 60,
        "",
    ],
)
def test_what_is_no_name(name: str, hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a built-in model"):
        resolve_model(name)
    assert not hub.asked


@pytest.mark.parametrize(
    "revision", ["..", "a/../b", "/a", "a/", "-", ".git", "a b", "a\0", "x" * 300, "a//b", "é"]
)
def test_revisions_that_cannot_be(revision: str, hub: FakeHub) -> None:
    if revision == "-":  # is one, if an odd one
        return
    with pytest.raises(ConfigError, match="must be a branch, a tag or a"):
        resolve_model("org/name", revision)
    assert not hub.asked


@pytest.mark.parametrize(
    "name",
    [
        *("../config.json", "a/../../b", "/etc/passwd", "a//b", "", ".", "a/.", "a\\b", "c:d"),
        *("a\0b", "a\nb", "x" * 256, "/".join("a" * 9), "a\x1b[31m", "\ud800"),
    ],
)
def test_file_names_that_are_not_taken(name: str) -> None:
    assert not is_safe_file(name)


def test_what_is_here_comes_first(hub: FakeHub, tmp_path: Path) -> None:
    assert resolve_model("brook") == builtin.path("brook")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    assert resolve_model("one.gguf") == Path("one.gguf")
    with pytest.raises(ConfigError, match="`revision` is `main`, and `brook` is not a model of a"):
        resolve_model("brook", "main")
    assert not hub.asked


def test_names_for_requests(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "one-Q8_0.gguf").write_bytes(b"GGUF")
    names = ["brook", "./mine", "one-Q8_0.gguf", "org/name@v1", "org/name:Q8_0"]
    assert [served_name(name) for name in names] == [
        "brook",
        "mine",
        "one-Q8_0",
        "org/name",
        "org/name:Q8_0",
    ]


def test_revisions(hub: FakeHub, cache: Path, model_files: dict[str, bytes]) -> None:
    old = hub.add("org/name", model_files, "v1/beta")
    new = hub.add("org/name", {**model_files, "tokenizer.json": b"{}"})
    hub.repositories["org/name"].revisions["main"] = new
    assert resolve_model("org/name").name == new
    by_tag = resolve_model("org/name@v1/beta")
    assert by_tag.name == old
    assert resolve_model("org/name", "v1/beta") == by_tag
    assert resolve_model("org/name", old[:8]) == by_tag
    refs = cache / "models--org--name" / "refs"
    assert (refs / "v1" / "beta").read_text() == old
    assert (refs / old[:8]).read_text() == old
    with pytest.raises(ConfigError, match="names a revision, and `revision` is `v2`"):
        resolve_model("org/name@v1/beta", "v2")
    hub.asked.clear()
    assert resolve_model("org/name", old) == by_tag  # a commit is for ever: nobody is asked
    assert not hub.asked
    (by_tag / "tokenizer.json").unlink()  # another tool may not have fetched it
    assert resolve_model("org/name", old) == by_tag
    assert (by_tag / "tokenizer.json").exists()


def test_a_branch_that_moved_shares_its_blobs(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    resolve_model("org/name")
    hub.asked.clear()
    hub.add("org/name", {**model_files, "config.json": b'{"a": 1}'})
    path = resolve_model("org/name")
    assert (path / "config.json").read_bytes() == b'{"a": 1}'
    assert [asked.path.rsplit("/", 1)[1] for asked in hub.asked[1:]] == ["config.json"]


def test_offline_uses_no_network(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model_files)
    path = resolve_model("org/name")
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def never(*_: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    assert resolve_model("org/name") == path
    for name, why in [
        ("org/name@v2", "`org/name@v2` is not in the cache"),
        ("org/other", "`org/other` is not in the cache"),
        ("org/name:Q4_K_M", "`org/name:Q4_K_M` is not whole in the cache"),
    ]:
        with pytest.raises(ModelLoadError, match=why) as no:
            resolve_model(name)
        assert "HF_HUB_OFFLINE" in str(no.value)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="is not whole in the cache"):
        resolve_model("org/name")


def test_a_blob_that_is_gone_is_not_whole(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model_files)
    path = resolve_model("org/name")
    (path / "model-00002-of-00002.safetensors").resolve().unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(ModelLoadError, match="is not whole in the cache"):
        resolve_model("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert resolve_model("org/name") == path
    assert (path / "model-00002-of-00002.safetensors").exists()


@pytest.mark.parametrize("refusal", [(401, "RepoNotFound"), (500, ""), (404, "RepoNotFound")])
def test_a_hub_that_refuses_does_not_stop_what_is_here(
    hub: FakeHub,
    cache: Path,
    model_files: dict[str, bytes],
    refusal: tuple[int, str],
    told: pytest.LogCaptureFixture,
) -> None:
    hub.add("org/name", model_files)
    path = resolve_model("org/name")
    hub.token, hub.refusal = TOKEN, refusal
    hub.asked.clear()
    assert resolve_model("org/name") == path
    assert len(hub.asked) == 1
    assert f"taking org/name from the cache at {path}: " in told.text
    with pytest.raises(ModelLoadError):
        snapshot(HubName("org/name"), is_cache_enough=False)


def test_no_hub_at_all(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelLoadError, match=r"127\.0\.0\.1:9` does not give the list") as no:
        resolve_model("org/name")
    assert "HF_HUB_OFFLINE" in str(no.value)


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, "RepoNotFound"), r"refuses `org/name` \(status 401\): there is no such model, or"),
        ((401, "GatedRepo"), "the model is gated or private"),
        ((403, "GatedRepo"), r"refuses `org/name` \(status 403\): the model is gated or private"),
    ],
)
def test_a_gated_model_names_token_and_page(
    hub: FakeHub,
    cache: Path,
    model_files: dict[str, bytes],
    refusal: tuple[int, str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("org/name", model_files)
    hub.token, hub.refusal = TOKEN, refusal
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ModelLoadError, match=sentence) as no:
            resolve_model("org/name")
        assert "HF_TOKEN" in str(no.value)
        assert f"{hub.url}/org/name" in str(no.value)
        assert "hf_wrong" not in str(no.value)


def test_an_unknown_model_or_revision(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes]
) -> None:
    hub.add("org/name", model_files)
    with pytest.raises(ModelLoadError, match=r"has no model `org/other`, .*status 404"):
        resolve_model("org/other")
    with pytest.raises(ModelLoadError, match=r"has no model `org/name` at `v9`"):
        resolve_model("org/name@v9")
    assert not (cache / "models--org--other").exists()


@pytest.mark.parametrize("is_file", [False, True])
def test_the_token_goes_to_the_endpoint_alone(
    hub: FakeHub,
    cache: Path,
    model_files: dict[str, bytes],
    is_file: bool,
    monkeypatch: pytest.MonkeyPatch,
    told: pytest.LogCaptureFixture,
) -> None:
    hub.add("org/name", model_files)
    hub.token = TOKEN
    hub.statuses["config.json"] = [500]
    if is_file:
        cache.parent.mkdir()
        (cache.parent / "token").write_text(TOKEN + "\n")
    else:
        monkeypatch.setenv("HF_TOKEN", f" {TOKEN} ")
    resolve_model("org/name")
    shown = {(asked.server, asked.authorization) for asked in hub.asked}
    assert shown == {("hub", f"Bearer {TOKEN}"), ("store", None)}
    assert TOKEN not in told.text
    assert TOKEN not in repr(settings.endpoint())


def test_a_redirect_within_the_endpoint_keeps_the_token(
    hub: FakeHub, cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed model is redirected so."""
    hub.add("org/name", model_files)
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = hub.add("org/new", {"config.json": b"{}", "model.safetensors": b"abc"})
    hub.redirect = f"/org/new/resolve/{commit}/config.json"
    hub.contents["config.json"] = b"abc"
    files = {"model.safetensors": b"abc"}
    hub.add("org/name", {**files, "params.json": b"{}"})
    assert (resolve_model("org/name") / "model.safetensors").read_bytes() == b"abc"
    assert {asked.authorization for asked in hub.asked} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "target",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "//", "mailto:x"),
        *("gopher://x:99999/", "http://x:99999/", "http://[::1/"),
    ],
)
def test_redirects_lead_to_http_only(hub: FakeHub, cache: Path, target: str) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    hub.redirect = target
    with pytest.raises(ModelLoadError):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("HF_ENDPOINT", "huggingface.co", "is not a URL"),
        ("HF_ENDPOINT", "file:///etc", "is not a URL"),
        ("HF_ENDPOINT", "http://[::1", "is not a URL"),
        ("HF_ENDPOINT", f"https://u:{TOKEN}@huggingface.co", "holds a user name"),
        ("HF_TOKEN", f"{TOKEN}\r\nX-Evil: 1", "does not hold a token"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "must be seconds"),
    ],
)
def test_variables_that_cannot_be(
    hub: FakeHub, variable: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=why) as no:
        resolve_model("org/name")
    assert TOKEN not in str(no.value)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path) -> None:
    assert settings.cache_directory() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert settings.cache_directory() == tmp_path / "elsewhere"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert settings.cache_directory() == tmp_path / "x" / "huggingface" / "hub"


# --- which files ---

GGUFS = {
    "m-Q4_K_M.gguf": b"4",
    "m-Q8_0-00001-of-00002.gguf": b"8-1",
    "m-Q8_0-00002-of-00002.gguf": b"8-2",
    "sub/m-UD-Q4_K_M.gguf": b"ud",
    "m-F16-00001-of-00002.gguf": b"one part of two",
    "mmproj-Q4_K_M.gguf": b"eyes",
    "README.md": b"",
}


def test_gguf_by_variant(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/name", GGUFS)
    root = cache / "models--org--name" / "snapshots" / commit
    assert resolve_model("org/name:q8_0") == root / "m-Q8_0-00001-of-00002.gguf"
    assert {file.name for file in root.iterdir()} == {
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
    }
    assert resolve_model("org/name:Q4_K_M") == root / "m-Q4_K_M.gguf"
    assert resolve_model("org/name:UD-Q4_K_M") == root / "sub" / "m-UD-Q4_K_M.gguf"
    assert resolve_model("org/name:m-Q4_K_M.gguf") == root / "m-Q4_K_M.gguf"
    assert resolve_model("org/name") == root / "m-Q4_K_M.gguf"  # as others choose, too
    with pytest.raises(ModelLoadError, match=r"has `0` GGUF models `Q2_K`") as no:
        resolve_model("org/name:Q2_K")
    assert "`org/name:Q4_K_M`, `org/name:Q8_0`, `org/name:UD-Q4_K_M`" in str(no.value)
    with pytest.raises(ModelLoadError, match=r"has `0` GGUF models `F16`"):
        resolve_model("org/name:F16")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (root / "m-Q8_0-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelLoadError, match="is not whole"):
        resolve_model("org/name:Q8_0")


def test_a_gguf_repository_without_the_usual_variant(hub: FakeHub, cache: Path) -> None:
    hub.add("org/name", {"m-Q5_0.gguf": b"5", "m-Q6_K.gguf": b"6"})
    with pytest.raises(ModelLoadError, match="has `2` GGUF models, and none is named") as no:
        resolve_model("org/name")
    assert "`org/name:Q5_0`, `org/name:Q6_K`" in str(no.value)
    hub.add("org/one", {"m-Q5_0.gguf": b"5"})
    assert resolve_model("org/one").name == "m-Q5_0.gguf"


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["consolidated.00.safetensors"], ["consolidated.00.safetensors"]),
        (["weights.safetensors", "m-Q4_0.gguf"], ["weights.safetensors"]),
        (["model.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
    ],
)
def test_which_safetensors(hub: FakeHub, cache: Path, files: list[str], weights: list[str]) -> None:
    hub.add("org/name", {"config.json": b"{}", **{name: name.encode() for name in files}})
    path = resolve_model("org/name")
    assert [file.name for file in sorted(path.glob("*.safetensors"))] == weights


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"config.json": b"{}"}, "has neither safetensors nor GGUF files"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            r"in `pytorch_model\.bin`, which can run",
        ),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "holds an adapter"),
        ({"README.md": b"", "x.safetensors": b""}, r"has no `config\.json`"),
        ({"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""}, "`2` safetensors"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, "no `weight_map`"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"[" * 9000}, "is not JSON"),
        (
            {
                "config.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}',
            },
            r"names `'\.\./x'`, which is not",
        ),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": [1]}}'},
            r"names `\[1\]`",
        ),
        (
            {
                "config.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}',
                "pytorch_model.bin": b"",
            },
            "which is not a safetensors file",
        ),
    ],
)
def test_what_is_no_model(hub: FakeHub, cache: Path, files: dict[str, bytes], why: str) -> None:
    hub.add("org/name", files)
    with pytest.raises(ModelLoadError, match=why):
        resolve_model("org/name")
    assert not hub.fetched("pytorch_model.bin")


def test_hostile_names_are_not_fetched(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    hub.extra_names = [
        "../../../../evil.jinja",
        "additional_chat_templates/../../../../evil.jinja",
        "/tmp/config.json",
        "../m-Q4_K_M.gguf",
        "additional_chat_templates/\x1b[31m.jinja",
        "additional_chat_templates/" + "x" * 300 + ".jinja",
    ]
    path = resolve_model("org/name")
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(ModelLoadError, match="has no GGUF file"):
        resolve_model("org/name:Q4_K_M")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "listing",
    [
        [],
        {},
        {"sha": "../../../etc", "siblings": []},
        {"sha": "a" * 40, "siblings": [{"rfilename": 5}]},
        {"sha": "a" * 40, "siblings": {"a": 1}},
        {"sha": "A" * 40},
        {"sha": "a" * 41},
    ],
)
def test_a_listing_that_makes_no_sense(hub: FakeHub, cache: Path, listing: object) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    hub.listing = listing
    with pytest.raises(ModelLoadError, match="does HF_ENDPOINT name a hub"):
        resolve_model("org/name")
    assert not cache.exists()


def test_hashes_and_sizes_that_make_no_sense(hub: FakeHub, cache: Path) -> None:
    """What the listing says badly is asked for; and refused, where the answer is no better."""
    hub.listing = {
        "sha": hub.add("org/name", {"config.json": b"{}"}),
        "siblings": [
            {"rfilename": "config.json", "size": -5, "blobId": "../../x"},
            {
                "rfilename": "model.safetensors",
                "lfs": {"sha256": "x" * 64, "size": 10**30 // 10**15},
            },
        ],
    }
    with pytest.raises(ModelLoadError, match="status 404"):  # it is not there
        resolve_model("org/name")


@pytest.mark.parametrize(("asked", "is_followed"), [("http", True), ("https", False)])
def test_redirects_do_not_leave_https(asked: str, is_followed: bool) -> None:
    followed = []

    class Opener:
        def open(self, request: Request, timeout: float) -> None:
            followed.append(request.full_url)

    redirects = client._Redirects(settings.Endpoint(f"{asked}://hub.example", TOKEN))
    redirects.parent = Opener()  # type: ignore[assignment]
    request = Request(f"{asked}://hub.example/a")
    request.timeout = 1.0
    answer: Any = SimpleNamespace(read=bytes, close=lambda: None)
    headers = HTTPMessage()
    headers["Location"] = "http://store.example/a"
    with contextlib.nullcontext() if is_followed else pytest.raises(URLError, match="not https"):
        redirects.http_error_302(request, answer, 302, "Found", headers)
    assert followed == (["http://store.example/a"] if is_followed else [])


def test_a_redirect_without_end(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent along with a redirect is not read."""
    answer = b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 1000000000000\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer + bytes(1000))

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ModelLoadError, match="answers with status 302"):
            resolve_model("org/name")
        server.shutdown(socket.SHUT_RDWR)


def test_a_pin_is_a_pin(hub: FakeHub, cache: Path) -> None:
    """A hub that answers with another commit than was asked for is not believed."""
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    repository = hub.repositories["org/name"]
    pinned = "a" * 40
    repository.commits[pinned] = repository.commits[repository.revisions["main"]]
    hub.listing = {"sha": repository.revisions["main"], "siblings": []}
    with pytest.raises(ModelLoadError, match=f"for the commit of `{pinned}`"):
        resolve_model("org/name", pinned)
    assert not (cache / "models--org--name").exists()


def test_a_listing_of_too_many_files(hub: FakeHub, cache: Path) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    hub.extra_names = [f"{number}.gguf" for number in range(50_000)]
    with pytest.raises(ModelLoadError, match="a list of `50002` files"):
        resolve_model("org/name")


def test_a_home_that_is_not_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "~no-such-user/models")
        with pytest.raises(ConfigError, match="whom the system does not know") as no:
            resolve_model("org/name")
        assert f"{name} names another" in str(no.value)


def test_refs_that_are_no_files(hub: FakeHub, cache: Path) -> None:
    """Others write into the cache too; a pipe that nobody writes to would never end."""
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    refs = cache / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    os.mkfifo(refs / "pipe")
    (refs / "gone").symlink_to("nowhere")
    (refs / "strange").write_bytes(b"\xff" * 1000)
    path = resolve_model("org/name")
    assert Repo(cache, "org/name").refs() == {"main": path.name}


def test_what_is_right_is_not_written_again(hub: FakeHub, cache: Path) -> None:
    """So that a cache may be one to read only."""
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    path = resolve_model("org/name")
    files = [path.parent.parent / "refs" / "main", *path.iterdir()]
    before = [file.lstat() for file in files]
    assert resolve_model("org/name") == path
    assert [(one.st_ino, one.st_mtime_ns) for one in before] == [
        (one.st_ino, one.st_mtime_ns) for one in (file.lstat() for file in files)
    ]


def test_a_link_out_of_the_cache_is_not_a_file_of_it(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"abc"})
    path = resolve_model("org/name")
    (tmp_path / "outside.safetensors").write_bytes(b"abc")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="not whole"):
        resolve_model("org/name")


# --- end to end ---


def test_brook_from_a_hub(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    """The command downloads, answers as the built-in model does, and answers again offline."""
    files = {file.name: file.read_bytes() for file in builtin.path("brook").iterdir()}
    commit = hub.add("org/brook", files)
    prompts = tmp_path / "prompts.jsonl"
    line = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
    prompts.write_text(json.dumps(line))

    def generate(model: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "penstock.cli.main", "generate", str(prompts), "-m", model],
            capture_output=True,
            text=True,
            env={**os.environ, "PENSTOCK_NUM_THREADS": "1", **environment},
            timeout=300,
            check=False,
        )

    def text(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stderr
        found: str = json.loads(done.stdout)["outputs"][0]["text"]
        return found

    first = generate("org/brook")
    assert "downloading org/brook" in first.stderr
    assert commit in first.stderr
    assert text(first) == text(generate("brook"))
    hub.asked.clear()
    offline = generate("org/brook", HF_HUB_OFFLINE="1")
    assert text(offline) == text(first)
    assert not hub.asked
    shutil.rmtree(cache)
    gone = generate("org/brook", HF_HUB_OFFLINE="1")
    assert gone.returncode == 1
    assert gone.stderr.startswith("error: `org/brook` is not in the cache")
    assert not hub.asked
