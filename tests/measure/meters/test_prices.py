"""Prices: the published lists as they are, the user's file, and the cost of requests."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.measure.meters.figures import token_cost
from penstock.measure.meters.price_lists import Price, Tier, read_lists, read_user
from penstock.measure.meters.prices import (
    NoPrice,
    Prices,
    cost,
    cost_per_success,
    hourly,
    load,
    machine_cost,
    provider_of,
    set_cost,
)
from penstock.measure.records import Request

PLAIN = Price(
    provider="p",
    model="m",
    usd_in_per_million=2.0,
    usd_out_per_million=10.0,
    usd_cached_in_per_million=0.5,
    source="list: m",
    as_of="2026-01-02",
)
TODAY = date(2026, 11, 22)


def row(n_in: int | None = 1000, n_out: int | None = 100, n_cached: int | None = None) -> Request:
    return Request(
        n_in=n_in, n_out=n_out, n_cached=n_cached, count_source="usage", t_sent_ns=0, t_done_ns=1
    )


@pytest.fixture(scope="module")
def published(data_dir: Path) -> Prices:
    return load(None, data_dir)


def known(prices: Prices, provider: str, model: str, on: date = TODAY) -> Price:
    found = prices.find(provider, model, on)
    assert isinstance(found, Price), found
    return found


def test_every_list_parses_entirely(data_dir: Path) -> None:
    folder = data_dir / "table-prices"
    found = read_lists(folder)
    by_list: dict[str, int] = {}
    for one in found:
        name = one.source.partition(":")[0]
        by_list[name] = by_list.get(name, 0) + 1
        assert one.as_of is not None
        assert date.fromisoformat(one.as_of)
        assert 0 <= one.usd_in_per_million < 10_000
        assert 0 <= one.usd_out_per_million < 10_000
    histories = 0
    for file in (folder / "llm-prices").glob("*.json"):
        models = json.loads(file.read_text())["models"]
        histories += sum(len(model["price_history"]) for model in models)
    assert by_list["llm-prices"] == histories == 148
    for name, file_name in (
        ("tokencost", "tokencost_model_prices.json"),
        ("litellm", "litellm_mirror_model_prices.json"),
    ):
        entries = json.loads((folder / file_name).read_text()).values()
        with_prices = [
            entry
            for entry in entries
            if entry.get("mode") in (None, "chat", "completion", "responses")
            and "input_cost_per_token" in entry
            and "output_cost_per_token" in entry
            and (entry["input_cost_per_token"] or entry["output_cost_per_token"])
        ]
        assert by_list[name] == len(with_prices) > 150


def test_published_prices_are_what_they_are(published: Prices) -> None:
    mini = known(published, "openai", "gpt-4o-mini")
    assert (mini.usd_in_per_million, mini.usd_out_per_million) == (0.15, 0.6)
    assert mini.usd_cached_in_per_million == 0.075
    assert mini.conflicts == ()
    assert mini.source == "llm-prices: openai/gpt-4o-mini"
    assert mini.as_of == "2026-07-30"
    haiku = known(published, "anthropic", "claude-3-haiku-20240307")
    assert (haiku.usd_in_per_million, haiku.usd_out_per_million) == (0.25, 1.25)
    llama = known(published, "together_ai", "mistralai/Mixtral-8x7B-Instruct-v0.1")
    assert llama.usd_in_per_million == 0.6
    assert llama.as_of == "2025-09-01"


def test_a_price_is_that_of_its_day(published: Prices) -> None:
    before = known(published, "openai", "gpt-5.6-luna", date(2026, 7, 29))
    after = known(published, "openai", "gpt-5.6-luna", date(2026, 7, 30))
    assert (before.usd_in_per_million, before.usd_out_per_million) == (1.0, 6.0)
    assert (after.usd_in_per_million, after.usd_out_per_million) == (0.2, 1.2)
    assert after.as_of == "2026-07-30"
    assert any("litellm" in told and "in 1, out 6" in told for told in after.conflicts)
    assert after.tiers[0].above_tokens == 272_000
    assert after.tiers[0].usd_in_per_million == 0.4


def test_long_prompts_have_their_own_price(published: Prices) -> None:
    pro = known(published, "google", "gemini-2.5-pro")
    assert pro.tiers[0] == Tier(
        above_tokens=200_000,
        usd_in_per_million=2.5,
        usd_out_per_million=15.0,
        usd_cached_in_per_million=0.25,
    )
    other = known(published, "gemini", "gemini-2.5-pro")
    assert other.source == "tokencost: gemini/gemini-2.5-pro"
    assert [tier.above_tokens for tier in other.tiers] == [200_000]
    assert other.tiers[0].usd_out_per_million == 15
    assert cost(row(200_000, 0), pro).usd == pytest.approx(0.25)
    assert cost(row(200_001, 1000), pro).usd == pytest.approx(200_001 * 2.5e-6 + 0.015)


def test_names_are_normalised_openly_and_never_guessed(published: Prices) -> None:
    assert known(published, "openai", "gpt-4o").match == "as written"
    assert "without `openai/`" in known(published, "openai", "openai/gpt-5.6-terra").match
    assert "lower case" in known(published, "OpenAI", "GPT-4o").match
    assert "provider `gemini`" in known(published, "google", "gemini-2.0-flash-001").match
    near = published.find("openai", "gpt-4o-min", TODAY)
    assert isinstance(near, NoPrice)
    assert "gpt-4o-mini" in near.similar
    other = published.find("groq", "gpt-4o", TODAY)
    assert isinstance(other, NoPrice)
    assert "openai" in other.reason
    assert isinstance(published.find("", "gpt-4o", TODAY), NoPrice)
    # The lists write 0 where they know nothing.
    assert isinstance(published.find("ollama", "ollama/llama2", TODAY), NoPrice)


def test_the_users_price_precedes_and_conflicts_are_told(tmp_path: Path, data_dir: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text("""
[machine]
usd_per_hour = 1.5

[[price]]
provider = "openai"
model = "gpt-4o"
usd_in_per_million = 2
usd_out_per_million = 8.5
from = 2024-10-01
to = "2027-01-01"
source = "contract 17"
""")
    prices = load(file, data_dir)
    own = known(prices, "openai", "gpt-4o")
    assert (own.usd_in_per_million, own.usd_out_per_million) == (2, 8.5)
    assert own.label() == "prices.toml: contract 17, as of 2024-10-01"
    assert len(own.conflicts) == 4
    assert all("in 2.5, out 10" in told for told in own.conflicts)
    later = known(prices, "openai", "gpt-4o", date(2027, 1, 1))
    assert later.usd_in_per_million == 2.5, "on the day of `to` it holds no more"
    assert prices.machine.usd_per_hour == 1.5
    assert prices.machine.usd_per_kwh is None


ENTRY = '[[price]]\nprovider = "p"\nmodel = "m"\nusd_in_per_million = 1\nusd_out_per_million = 2\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENTRY + '[[price]]\nmodel = "m"\n', r"`\[\[price\]\] number 2` of .* field `provider`"),
        (ENTRY.replace("= 1", '= "1"'), r"number 1` .*`\$\.usd_in_per_million`"),
        (ENTRY.replace("= 1", "= -1"), r"`usd_in_per_million` of `\[\[price\]\] number 1`.*`-1"),
        (ENTRY.replace("= 2", "= inf"), "`usd_out_per_million` .* is `inf`, which is no price"),
        (ENTRY + "per_token = 3\n", "number 1` .*`per_token`"),
        (ENTRY + "from = 2026-02-30\n", "is no TOML"),
        (ENTRY + 'from = "soon"\n', r"number 1` .*`\$\.from`"),
        (ENTRY + "from = 2026-02-03\nto = 2026-02-03\n", "`to` of .* is not later than `from`"),
        ("[machine]\nusd_per_day = 3\n", r"`\[machine\]` of .*`usd_per_day`"),
        ("[machine]\nusd_per_hour = -3\n", r"`usd_per_hour` of `\[machine\]`"),
        ("[prices]\n", "has `prices`, which is not known"),
        ("[price]\n", r"write `\[\[price\]\]`"),
        ("usd = [", "is no TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as raised:
        read_user(file)
    assert raised.value.message.endswith(".")
    assert "\n" not in raised.value.message
    with pytest.raises(ConfigError, match="No such file"):
        read_user(tmp_path / "none.toml")


def test_tokens_cost_what_they_cost() -> None:
    found = cost(row(1000, 100), PLAIN)
    assert found.usd == pytest.approx(0.002 + 0.001)
    assert found.explanation == "list: m, as of 2026-01-02"
    assert cost(row(1000, 100, n_cached=800), PLAIN).usd == pytest.approx(
        200 * 2e-6 + 800 * 0.5e-6 + 0.001
    )
    uncached = Price(
        provider="p", model="m", usd_in_per_million=2, usd_out_per_million=10, source="x"
    )
    assert cost(row(1000, 0, n_cached=800), uncached).usd == pytest.approx(0.002)


def test_reasoning_is_output_unless_it_has_a_price() -> None:
    thought = row(0, 100)
    thought.n_reasoning = 60
    assert cost(thought, PLAIN).usd == pytest.approx(0.001)
    dear = Price(
        provider="p",
        model="m",
        usd_in_per_million=0,
        usd_out_per_million=10,
        usd_reasoning_per_million=20,
        source="x",
    )
    assert cost(thought, dear).usd == pytest.approx(40 * 10e-6 + 60 * 20e-6)
    assert cost(row(0, 100), dear).usd is None


def test_what_is_not_known_is_not_zero() -> None:
    for unknown in (row(n_in=None), row(n_out=None)):
        found = cost(unknown, PLAIN)
        assert found.usd is None
        assert "tokens" in found.explanation
    chunks = row()
    chunks.count_source = "chunks"
    assert cost(chunks, PLAIN).usd is None
    cut = row(None, None)
    cut.error_class = "timeout"
    assert cost(cut, PLAIN).usd is None, "it may have been billed"
    refused = row(None, None)
    refused.error_class = "http_429"
    assert cost(refused, PLAIN).usd == 0
    found = cost(row(), NoPrice(reason="no list"))
    assert found.usd is None
    assert found.explanation == "no list"


def test_cost_per_success_is_a_ratio_of_sums() -> None:
    rows = [row(1000, 0) for _ in range(3)]
    for one in rows:
        set_cost(one, PLAIN)
    assert rows[0].usd_source == "list: m, as of 2026-01-02"
    rows[2].error_class = "server"
    sums = cost_per_success(rows)
    assert (sums.num_success, sums.num_requests, sums.num_unknown) == (2, 3, 0)
    assert sums.usd_per_success == pytest.approx(0.006 / 2), "failures are paid for, too"
    right = cost_per_success(rows, lambda one: one is rows[0])
    assert right.usd_per_success == pytest.approx(0.006)
    rows[1].usd = None
    sums = cost_per_success(rows)
    assert sums.usd == pytest.approx(0.004)
    assert sums.num_unknown == 1
    assert sums.usd_per_success is None


def test_what_is_missing_is_told_with_the_sum() -> None:
    rows = [row(1000, 0), row(None, 0), row(1, 1)]
    set_cost(rows[0], PLAIN)
    set_cost(rows[1], PLAIN)
    found = token_cost(rows)
    assert found["usd"] == pytest.approx(0.002)
    assert (found["num_unknown"], found["usd_per_success"]) == (2, None)
    assert found["sources"] == ["list: m, as of 2026-01-02"]
    assert found["why_unknown"] == ["no price was looked up", "nobody told the tokens"]
    assert token_cost(rows[1:])["usd"] is None


def test_a_machine_costs_by_the_hour_and_by_the_kwh() -> None:
    assert hourly(3.6, 10) == pytest.approx(0.01)
    price = {"machine_price": {"usd_per_hour": None, "usd_per_kwh": 0.5}}
    assert machine_cost(price, 10, 7.2e6).usd == pytest.approx(1.0)
    assert machine_cost(price, 10).usd is None
    assert "--usd-per-hour" in machine_cost({}, 10).explanation


def test_providers_are_known_by_their_address() -> None:
    assert provider_of("https://api.openai.com/v1") == "openai"
    assert provider_of("http://127.0.0.1:8000/v1") == ""
    assert provider_of("https://api.openai.com.example/v1") == ""


def test_what_broke_off_may_have_been_billed() -> None:
    for error_class, usd in (
        ("timeout", None), ("cut", None), ("server", None), ("protocol", None),
        ("http_429", 0.0), ("connect", 0.0),
    ):  # fmt: skip
        one = row()
        one.error_class = error_class
        assert cost(one, PLAIN).usd == usd
    # A server that counts cached tokens apart: no request has a negative number of fresh ones.
    assert cost(row(n_in=10, n_cached=40, n_out=0), PLAIN).usd == pytest.approx(10 * 0.5e-6)


@pytest.mark.parametrize(
    "text",
    [
        '["x"]',
        '{"m": "x"}',
        '{"m": {"input_cost_per_token": 1, "output_cost_per_token": 2, "mode": "chat"}}',
        '{"m": {"input_cost_per_token": "a", "output_cost_per_token": 2, "litellm_provider": "p"}}',
        "{",
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokencost_model_prices.json").write_text(text)
    with pytest.raises(ConfigError, match="tokencost_model_prices"):
        load(None, tmp_path)
