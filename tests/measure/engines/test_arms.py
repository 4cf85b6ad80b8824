"""What a user writes for an arm, taken apart."""

from __future__ import annotations

import pytest

from penstock.errors import ConfigError
from penstock.measure.engines.arms import parse_arm, parse_arms


@pytest.mark.parametrize(
    ("text", "kind", "location", "name", "options"),
    [
        ("brook", "penstock", "brook", "penstock:brook", {}),
        ("./m/brook", "penstock", "./m/brook", "penstock:brook", {}),
        (
            "penstock:brook?quantization=int8&enforce_eager",
            "penstock",
            "brook",
            "penstock:brook?quantization=int8&enforce_eager",
            {"quantization": "int8", "enforce_eager": None},
        ),
        ("inprocess:brook", "inprocess", "brook", "inprocess:brook", {}),
        (
            "llama-server:/m/x.gguf?threads=2",
            "llama-server",
            "/m/x.gguf",
            "llama-server:x.gguf?threads=2",
            {"threads": "2"},
        ),
        ("fast=vllm:/m/x", "vllm", "/m/x", "fast", {}),
        ("a.b+c=http://host/v1", "url", "http://host/v1", "a.b+c", {}),
        (
            "http://host:80/v1/?dialect=tgi",
            "url",
            "http://host:80/v1",
            "host:80",
            {"dialect": "tgi"},
        ),
        ("vllm:m?a=1%262", "vllm", "m", "vllm:m?a=1&2", {"a": "1&2"}),
        ("vllm:m?spec={a=b}", "vllm", "m", "vllm:m?spec={a=b}", {"spec": "{a=b}"}),
    ],
)
def test_an_arm_is_taken_apart(
    text: str, kind: str, location: str, name: str, options: dict[str, str | None]
) -> None:
    arm = parse_arm(text)
    assert (arm.kind, arm.location, arm.name, arm.options) == (kind, location, name, options)
    assert arm.text == text


def test_a_url_names_its_model_behind_a_hash() -> None:
    arm = parse_arm("https://[::1]:8443/v1#org/model-7B")
    assert (arm.location, arm.model) == ("https://[::1]:8443/v1", "org/model-7B")
    assert arm.name == "[::1]:8443#org/model-7B"
    assert not arm.is_started


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vlm:model", "`vlm`"),
        ("vllm:", "names no model"),
        ("ftp://host", "`ftp://`"),
        ("http://", "no host"),
        ("http://host:port", "URL"),
        ("http://host?max_tokens=3", "`max_tokens`"),
        ("vllm:m?=3", "`=3`"),
        ("vllm:m?a=1&a=2", "`a` twice"),
        ("vllm:m?host=0.0.0.0", "`host` is decided"),
        ("vllm:m?served-model-name=x", "`served-model-name` is decided"),
        ("ovms:m?rest_port=80", "`rest_port` is decided"),
        ("vllm:m?env.=x", "names no variable"),
        ("vllm:m?env.A%3DB=x", "names no variable"),
        ("vllm:m?x=%00", "null byte"),
    ],
)
def test_what_is_no_arm_is_told_with_the_recipes(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arm(text)
    assert says in caught.value.message
    assert f"`{text}`" in caught.value.message
    assert caught.value.hint is not None
    assert "llama-server, llama-cpp-python" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "http://user:hunter2@host/v1",
        "vllm:m?api_key=hunter2",
        "vllm:m?hf-token=hunter2",
        "penstock:m?env.SOME_API_KEY=hunter2",
        "penstock:m?api%5Fkey=hunter2",
    ],
)
def test_a_secret_in_an_arm_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arm(text)
    assert "hunter2" not in str(caught.value)
    assert "--api-key-env" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("a=gpu.example.org:80", "a=http://gpu.example.org:80"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost"),
    ],
)
def test_an_address_without_its_scheme_is_asked_about(text: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arm(text)
    assert caught.value.hint == f"did you mean `{meant}`?"


def test_names_of_arms_are_unique() -> None:
    names = [arm.name for arm in parse_arms(["brook", "brook", "x=brook", "brook"])]
    assert names == ["penstock:brook", "penstock:brook (2)", "x", "penstock:brook (3)"]
    with pytest.raises(ConfigError, match="labelled `x`"):
        parse_arms(["x=brook", "x=vllm:brook"])


def test_a_password_is_not_repeated_in_what_is_said_of_a_bad_port() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arm("http://user:hunter2@host:99999")
    assert "hunter2" not in str(caught.value)
