"""`penstock plan` as a user types it. How fast this machine is decides nothing: it is made up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.models.plan_configs import DEEPSEEK_V3, GPT_OSS, LLAMA_1B, OLMOE

sys.path.insert(0, str(Path(__file__).parent.parent / "hub"))

from fake_hub import FakeHub

from penstock import hardware
from penstock.cli.main import cli
from penstock.cli.plan_text import decimal, gib, time_of
from penstock.engine.config import EngineConfig
from penstock.engine.memory import plan_memory
from penstock.errors import NotEnoughMemory, PenstockError
from penstock.models import speeds
from penstock.models.estimate import Rates, products_of
from penstock.models.load import Backends, native_problem
from penstock.models.spec import ModelSpec
from penstock.native.rates import Curve

AVAILABLE = 16 * 2**30
SMALL = LLAMA_1B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB are free; 20 G numbers a second in every format; no GPU."""

    def measured(spec: ModelSpec, formats: Any, **_: Any) -> Rates:
        curve = Curve((1, 8), (5e-11, 6e-11))
        return Rates(
            products=dict.fromkeys(products_of(spec, formats), curve),
            attention=((128, Curve((1,), (1e-5,))), (2048, Curve((1,), (1e-4,)))),
            pair_s=1e-9,
            row_ops=Curve((1,), (1e-6,)),
            sampling=Curve((1,), (1e-5,)),
        )

    monkeypatch.setattr(speeds, "measured", measured)
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: AVAILABLE)
    monkeypatch.setattr(hardware, "has_nvidia_device", lambda: False)


@pytest.fixture
def native() -> None:
    """Speeds are told of the native backend only."""
    if reason := native_problem(ModelSpec.from_hf(SMALL)):
        pytest.skip(reason)


def saved(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def report(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.usefixtures("native")
def test_llama(tmp_path: Path) -> None:
    found = report(saved(tmp_path, LLAMA_1B))
    assert found["num_parameters"] == 1_235_814_400
    assert found["num_active_parameters"] == 1_235_814_400 - 33 * 2048  # without the norms
    assert found["kv"]["bytes_per_token"]["bfloat16"] == 32768
    assert found["stored"] is None
    rows = {one["name"]: one for one in found["precisions"]}
    assert list(rows) == ["float32", "bfloat16", "int8", "int4"]
    # Numbers of matrices in two bytes, of norms in four.
    assert rows["bfloat16"]["weight_bytes"] == 2 * 1_235_814_400 + 2 * 33 * 2048
    assert rows["bfloat16"]["largest_context"] == 131072
    assert [one["context"] for one in rows["int8"]["requests"]] == [2048, 8192, 32768, 131072]
    assert rows["float32"]["speed"] is None  # the checkpoint is in bfloat16
    decode = rows["bfloat16"]["speed"]["decode"]
    assert [step["num_tokens"] for step in decode] == [1, 8]
    for step in [*decode, rows["bfloat16"]["speed"]["prefill"]]:
        assert step["seconds"] == pytest.approx(sum(term["seconds"] for term in step["terms"]))
        for term in step["terms"]:
            assert term["amount"] / term["rate"] == pytest.approx(term["seconds"])
    rates = rows["int4"]["speed"]["rates"]
    assert rates["products"][0]["format"] == "int4"
    assert rates["products"][0]["rows"] == [1, 8]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("config", [LLAMA_1B, OLMOE, GPT_OSS])
def test_what_fits_is_what_serve_plans(config: dict[str, Any], tmp_path: Path) -> None:
    found = report(saved(tmp_path, config), "--no-measure")
    spec = ModelSpec.from_hf(config)
    for one in found["precisions"]:
        for max_num_seqs, entry in [
            (1, {"context": one["largest_context"], "count": 1}),
            *((64, entry) for entry in one["requests"]),
        ]:
            if entry["context"] is None or entry["count"] < 1:
                continue
            asked = EngineConfig(
                model="m",
                backend="native",
                dtype=one["dtype"],
                quantization=one["quantization"],
                max_num_seqs=max_num_seqs if entry["count"] > 1 else 1,
                max_model_len=entry["context"],
            )
            resolved = asked.resolve(
                max_context_len=spec.max_context_len,
                checkpoint_dtype=spec.dtype,
                backends=Backends(spec),
            )
            plan = plan_memory(spec, resolved, AVAILABLE, _stored(config))
            assert plan.weight_bytes == one["weight_bytes"]
            assert plan.num_blocks * 16 >= entry["count"] * entry["context"]


def test_one_token_more_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 4 * 2**30)
    found = report(saved(tmp_path, LLAMA_1B), "--no-measure", "--dtype", "bfloat16")
    (one,) = found["precisions"]
    longest = one["largest_context"]
    assert 2048 < longest < 131072
    assert one["requests"][-1] == {"context": 131072, "count": 0}
    spec = ModelSpec.from_hf(LLAMA_1B)
    backends = Backends(spec)

    def fits(context: int) -> bool:
        config = EngineConfig(
            model="m",
            backend="torch" if backends.problem("native") else "native",
            max_model_len=context,
            max_num_seqs=1,
        ).resolve(max_context_len=131072, checkpoint_dtype="bfloat16", backends=backends)
        try:
            plan_memory(spec, config, 4 * 2**30)
        except NotEnoughMemory:
            return False
        return True

    assert fits(longest)
    assert not fits(longest + 1)


def test_a_model_that_does_not_fit_is_told_in_time(tmp_path: Path) -> None:
    started_s = time.monotonic()
    found = report(saved(tmp_path, DEEPSEEK_V3))
    (one,) = found["precisions"]
    assert one["name"] == "as stored"
    assert found["stored"].startswith("fp8")
    assert one["largest_context"] is None
    assert "does not fit" in one["problem"]
    assert one["speed"] is None
    assert found["kv"]["bytes_per_token"]["bfloat16"] == 61 * 576 * 2
    assert time.monotonic() - started_s < 60  # of 47,000 matrices; seconds, not minutes


@pytest.mark.usefixtures("native")
def test_the_text_has_the_arithmetic(tmp_path: Path) -> None:
    result = run(saved(tmp_path, LLAMA_1B), "--concurrency", "3", "--context", "1024")
    assert result.exit_code == 0, result.output
    assert "1,235,814,400 parameters in bfloat16" in result.stdout
    assert "32,768 bytes in bfloat16" in result.stdout
    assert "= 16 layers x 16 vectors of 64" in result.stdout
    assert "bfloat16, decode, 1 request at 1,024 tokens: " in result.stdout
    assert "int8, decode, 3 requests at 1,024 tokens: " in result.stdout
    # 2 x 973,078,528 bytes at 5e-11 s a number; the head's 262,668,288 numbers.
    assert "1.95 GB weights / 40 GB/s" in result.stdout
    assert "525 MB head / 40 GB/s" in result.stdout
    assert "33.6 MB keys and values" in result.stdout
    assert "int4, prompt of 1,024 tokens: " in result.stdout
    assert all(len(line) < 260 for line in result.stdout.splitlines())


@pytest.mark.usefixtures("native")
def test_one_precision_and_its_options(tmp_path: Path) -> None:
    path = saved(tmp_path, SMALL)
    options = ["--quantization", "int8", "--kv-cache-dtype", "int8", "--max-num-seqs", "5"]
    found = report(path, *options)
    (one,) = found["precisions"]
    assert (one["name"], one["kv_cache_dtype"]) == ("int8", "int8")
    assert {entry["count"] for entry in one["requests"]} == {5}
    plain = report(path, "--dtype", "float32")["precisions"]
    assert [one["dtype"] for one in plain] == ["float32"]


def test_no_rates_without_measuring(tmp_path: Path) -> None:
    found = report(saved(tmp_path, SMALL), "--no-measure")
    assert {one["speed"] is None for one in found["precisions"]} == {True}
    text = run(str(tmp_path), "--no-measure").stdout
    assert "what fits" in text
    assert "decode" not in text


def test_an_architecture_of_transformers_alone_is_told_as_a_guess(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = report(saved(tmp_path, SMALL | {"architectures": ["CwmForCausalLM"]}))
    assert found["is_guess"]
    assert found["machine"]["native_problem"]
    rows = {one["name"]: one for one in found["precisions"]}
    assert rows["bfloat16"]["largest_context"] == 131072
    assert "`quantization` is `int8`" in rows["int8"]["problem"]
    text = run(str(tmp_path)).stdout
    assert "a guess: " in text
    assert "no speeds: " in text


def test_an_encoder_writes_no_tokens(tmp_path: Path) -> None:
    config = {
        "architectures": ["BertModel"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "torch_dtype": "float32",
    }
    found = report(saved(tmp_path, config), "--context", "100")
    for one in found["precisions"]:
        if one["speed"]:
            assert one["speed"]["decode"] == []
            assert one["speed"]["prefill"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({"architectures": ["Nonsense"]}, [], "`Nonsense`"),
        ({k: v for k, v in SMALL.items() if k != "hidden_size"}, [], "`hidden_size`"),
        (SMALL, ["--context", "200000"], "`context` is `200000`, more than the model's `131072`"),
        (GPT_OSS, ["--quantization", "int4"], "the checkpoint is quantized already: MXFP4"),
        (SMALL, ["--quantization", "fp8"], "`quantization` is `fp8`"),
        (SMALL, ["--dtype", "float16"], "`dtype` is `float16`"),
        (SMALL | {"quantization_config": {"quant_method": "hqq"}}, [], "hqq"),
    ],
)
def test_refusals(config: dict[str, Any], options: list[str], told: str, tmp_path: Path) -> None:
    result = run(saved(tmp_path, config), *options)
    assert isinstance(result.exception, PenstockError), result.output
    assert told in str(result.exception)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"architectures": 3}', b"\xff" * 100])
def test_configs_that_are_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    result = run(str(tmp_path))
    assert isinstance(result.exception, PenstockError), result.output


def test_a_name_that_means_nothing() -> None:
    assert "neither a directory nor" in str(run("no such model").exception)


def test_a_gpu_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_nvidia_device", lambda: True)
    found = report(saved(tmp_path, SMALL), "--no-measure")
    assert set(found["gpu"]) == {"problem", "plan"}
    assert bool(found["gpu"]["problem"]) != bool(found["gpu"]["plan"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def test_of_a_model_of_the_hub_only_the_config_is_fetched(hub: FakeHub) -> None:
    files = {"config.json": json.dumps(SMALL).encode(), "tokenizer.json": b"{}"}
    hub.add("org/name", files | {"model.safetensors": b"weights" * 1000})
    assert report("org/name", "--no-measure")["num_parameters"] > 0
    assert hub.fetched("config.json")
    assert not hub.fetched("model.safetensors")
    assert not hub.fetched("tokenizer.json")
    hub.asked.clear()
    assert report("org/name", "--no-measure")["architecture"] == "LlamaForCausalLM"
    assert not hub.fetched("config.json")  # it is here


def test_models_of_the_hub_without_a_config(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gguf", {"a-Q4_K_M.gguf": b"GGUF" * 100})
    assert "has no `config.json`" in str(run("org/gguf").exception)
    assert "is a GGUF file, whose config is in front of" in str(run("org/gguf:Q4_K_M").exception)
    assert not hub.fetched("a-Q4_K_M.gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not in the cache" in str(run("org/name").exception)


def test_numbers_for_people() -> None:
    assert [decimal(number) for number in (0, 7, 999.6, 24.9e9, 3e15)] == [
        *("0 ", "7 ", "1 k", "24.9 G", "3 P")
    ]
    assert [gib(2**20), gib(5 * 2**30)] == ["1.0 MiB", "5.00 GiB"]
    assert [time_of(1.5), time_of(0.1023), time_of(2e-6)] == ["1.5 s", "102 ms", "2 us"]


def _stored(config: dict[str, Any]) -> Any:
    from penstock.quantization.stored import precision_of

    return precision_of(config)


def test_a_model_shorter_than_the_usual_context() -> None:
    found = report("brook", "--no-measure")
    assert found["context"] == found["max_context_len"] == 1024
