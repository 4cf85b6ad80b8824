"""GET /metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import Harness, error_of

pytestmark = pytest.mark.anyio


async def scrape(api: Harness) -> dict[tuple[str, ...], float]:
    """Values by (name, label values in the order of the labels' names...)."""
    response = await api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_histograms(api: Harness) -> None:
    await api.chat()
    await api.chat(n=2)
    await api.stream_chat()
    values = await scrape(api)
    assert values["penstock_time_to_first_token_seconds_count",] == 4
    assert values["penstock_time_per_output_token_seconds_count",] == 4
    assert values["penstock_queue_seconds_count",] == 4
    assert values["penstock_queue_seconds_sum",] == 4 * 0.25
    assert values["penstock_request_seconds_count", "/v1/chat/completions"] == 3
    assert values["penstock_answers_total", "stop"] == 4


async def test_engine_figures(api: Harness) -> None:
    stats = api.engine.stats
    stats.num_running, stats.num_waiting = 3, 4
    stats.num_used_blocks = 16
    stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens = 100, 60
    stats.num_preemptions, stats.num_chunks, stats.num_steps = 5, 6, 7
    stats.num_prompt_tokens, stats.num_generated_tokens = 8, 9
    values = await scrape(api)
    assert values["penstock_requests_running",] == 3
    assert values["penstock_requests_waiting",] == 4
    assert values["penstock_kv_cache_usage_ratio",] == 0.25
    assert values["penstock_prefix_cache_query_tokens_total",] == 100
    assert values["penstock_prefix_cache_hit_tokens_total",] == 60
    assert values["penstock_preemptions_total",] == 5
    assert values["penstock_prefill_chunks_total",] == 6
    assert values["penstock_engine_steps_total",] == 7
    assert values["penstock_prompt_tokens_total",] == 8
    assert values["penstock_generation_tokens_total",] == 9
    assert values["penstock_requests_open",] == 0


async def test_outcomes(api: Harness) -> None:
    await api.chat()
    await api.stream_chat()
    await api.stream("/v1/completions", prompt="a")
    await api.chat(temperature=-1)
    await api.http.get("/nothing/at/all")
    assert error_of(await api.chat(model="x"))["code"] == "model_not_found"
    values = await scrape(api)
    name = "penstock_requests_total"
    assert values[name, "ok", "/v1/chat/completions"] == 2
    assert values[name, "ok", "/v1/completions"] == 1
    assert not any("client_gone" in key for key in values)
    assert values[name, "invalid_value", "/v1/chat/completions"] == 1
    assert values[name, "model_not_found", "/v1/chat/completions"] == 1
    assert values[name, "not_found", "other"] == 1


async def test_labels_are_bounded(api: Harness) -> None:
    """Paths that clients make up add no series."""
    for number in range(50):
        await api.http.get(f"/nothing/{number}")
        await api.http.get(f"/v1/models/{number}")
    values = await scrape(api)
    assert sum(key[0] == "penstock_requests_total" for key in values) == 2


async def test_two_applications_do_not_mix(api: Harness, make_api: object) -> None:
    other = make_api()  # type: ignore[operator]
    await api.chat()
    assert ("penstock_answers_total", "stop") not in await scrape(other)
