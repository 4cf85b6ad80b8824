"""lm-eval over HTTP gives what it gives in process, and the contract that this rests on."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from penstock.errors import ConfigError, EngineError
from penstock.measure.quality.harness import contract, http, run
from penstock.measure.quality.harness.access import Access
from penstock.measure.quality.harness.rows import results_of
from penstock.measure.quality.stopping import Stopping

SERVE = "from penstock.cli.main import main; main()"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`penstock serve brook` in float32 on a free port of loopback."""
    command = [sys.executable, "-c", SERVE, "serve", "brook", "--json", "--port", "0"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as stderr:  # a pipe that nobody reads fills up, and the server waits
        child = subprocess.Popen(
            [*command, "--dtype", "float32"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, log.read_text()
    yield json.loads(line)["url"]
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)


def test_same_scores_as_in_process(
    access: Access, url: str, sink: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice, last words, a text with many windows, and generation."""
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    remote = http.connect(url, num_concurrent=8)
    assert remote.context_len == access.context_len
    assert remote.facts["max_length"] == access.facts["max_length"]
    assert "Authorization" not in remote.lm.header
    plans = [
        run.prepare(
            ["arc_easy", "lambada_openai", "gsm8k"],
            limit=4,
            num_fewshot=0,
            gen_kwargs={"max_gen_toks": 24},
            sources=[data_dir],
        ),
        run.prepare(["wikitext2_unk"], samples={"wikitext2_unk": [2]}, sources=[data_dir]),
        run.prepare(
            ["gsm8k"],
            limit=3,
            num_fewshot=2,
            chat=True,
            gen_kwargs={"max_gen_toks": 24},
            sources=[data_dir],
        ),
    ]
    for plan in plans:
        here, there = (run.run_harness(one, plan, writer=sink) for one in (access, remote))
        assert [row.prompt_hash for row in here] == [row.prompt_hash for row in there]
        for mine, other in zip(here, there, strict=True):
            assert mine.scores == pytest.approx(other.scores, rel=1e-5), mine.task
            assert mine.output == other.output
        assert results_of(here, plan.metrics) == {
            task: pytest.approx(found, rel=1e-5)
            for task, found in results_of(there, plan.metrics).items()
        }
        assert not sink.problems


async def _within(*arguments: Any, **options: Any) -> Any:
    return run.run_harness(*arguments, **options)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_within_an_event_loop(url: str, sink: Any, data_dir: Path, route: Any) -> None:
    """lm-eval's clients call `asyncio.run`, which fails where a loop runs."""
    names = ["gsm8k"] if route == "chat" else ["gsm8k", "arc_easy", "wikitext2_unk"]
    samples = {name: [0] for name in names}
    plan = run.prepare(
        names,
        samples=samples,
        chat=route == "chat",
        num_fewshot=0,
        sources=[data_dir],
        gen_kwargs={"max_gen_toks": 8},
    )
    remote = http.connect(url, route=route)
    assert len(asyncio.run(_within(remote, plan, writer=sink))) == len(names)


@pytest.mark.parametrize("num_concurrent", [1, 4])
def test_a_signal_ends_it_before_all_is_asked(
    url: str, sink: Any, data_dir: Path, num_concurrent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool of the other thread would wait for it, and with it whoever pressed Ctrl-C."""
    plan = run.prepare(["arc_easy"], limit=8, sources=[data_dir])
    remote = http.connect(url, num_concurrent=num_concurrent)
    num_answers = 0
    parse = type(remote.lm).parse_logprobs

    def parsed(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_answers
        num_answers += 1
        if num_answers == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return parse(*args, **kwargs)

    monkeypatch.setattr(remote.lm, "parse_logprobs", parsed)

    async def within() -> None:
        with Stopping() as stopping, stopping.blocking():
            run.run_harness(remote, plan, writer=sink)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(within())
    assert 3 <= num_answers < 20  # of 32
    assert not sink.rows


def test_chat_route(url: str, sink: Any, data_dir: Path) -> None:
    """The server's template gives the same prompts as ours on the route of completions."""
    plan = run.prepare(
        ["gsm8k"],
        limit=3,
        num_fewshot=1,
        chat=True,
        gen_kwargs={"max_gen_toks": 24},
        sources=[data_dir],
    )
    routes = [http.connect(url, chat=True), http.connect(url, route="chat")]
    assert [one.facts["access"] for one in routes] == ["completions", "chat"]
    rendered, chatted = (run.run_harness(one, plan, writer=sink) for one in routes)
    assert [row.output for row in rendered] == [row.output for row in chatted]
    assert any(row.output for row in chatted)


def test_cut_prompts_are_counted(url: str, sink: Any, data_dir: Path) -> None:
    remote = http.connect(url, max_length=60)
    assert remote.facts["max_length"] == 60
    plan = run.prepare(
        ["arc_easy", "gsm8k"],
        limit=1,
        gen_kwargs={"max_gen_toks": 16},
        num_fewshot=2,
        sources=[data_dir],
    )
    run.run_harness(remote, plan, writer=sink)
    assert any("to `61` tokens (`4` times)" in problem for problem in sink.problems)
    assert any("to `45` tokens (`1` times)" in problem for problem in sink.problems)


def test_a_server_that_is_not_there(sink: Any) -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        http.connect("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="is no URL"):
        http.connect("brook")


def test_a_server_that_fails_ends_the_evaluation_with_a_sentence(
    url: str, sink: Any, data_dir: Path
) -> None:
    plan = run.prepare(["gsm8k"], limit=1, gen_kwargs={"max_gen_toks": 8}, sources=[data_dir])
    remote = http.connect(f"{url}#another", max_length=200, retries=1)
    with pytest.raises(EngineError, match="lm-eval stopped on `another`: ClientResponseError: 404"):
        run.run_harness(remote, plan, writer=sink)


def test_our_server_keeps_the_contract(url: str) -> None:
    remote = http.connect(url)
    remote.check()
    token_ids = remote.lm.tok_encode(http.PROBE)
    assert contract.check(http._Server(url, None, 30).complete, remote.name, token_ids) == []


PROMPT = [5, 6, 7, 8, 9]


def good(num_prompt: int) -> dict[str, Any]:
    """A choice as lm-eval wants it: the prompt's tokens and one more."""
    values: list[float | None] = [None, *(-0.5 * place for place in range(1, num_prompt)), -0.25]
    tops = [None if value is None else {"a": value, "b": value - 1} for value in values]
    return {"logprobs": {"token_logprobs": values, "top_logprobs": tops}}


Change = Callable[[dict[str, Any]], Any]


def only_generated(choice: dict[str, Any]) -> None:
    choice["logprobs"] = {name: list_[-1:] for name, list_ in choice["logprobs"].items()}


def two_generated(choice: dict[str, Any]) -> None:
    for entries in choice["logprobs"].values():
        entries.append(entries[-1])


def none_generated(choice: dict[str, Any]) -> None:
    for entries in choice["logprobs"].values():
        entries.pop()


def rounded_top(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][-1] = {"a": -0.2500001}


def rounded_up_top(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][-1] = {"a": -0.2499999}


def no_tops(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][2] = {}


def nulls(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][2] = None


def probabilities(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][2] = 0.7


def no_logprobs(choice: dict[str, Any]) -> None:
    choice["logprobs"] = None


def other_numbers(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][1] -= 2


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (only_generated, "every text would get the score 0"),
        (two_generated, "scored shifted"),
        (none_generated, "scored shifted"),
        (rounded_top, "likelier than the likeliest"),
        (rounded_up_top, "no text would count as greedy"),
        (no_tops, "`top_logprobs` is empty"),
        (nulls, "no log-probability"),
        (probabilities, "no log-probability"),
        (no_logprobs, "have no `logprobs`"),
        (other_numbers, "differs by 2 nats"),
    ],
)
def test_servers_that_break_it(change: Change, finding: str) -> None:
    choices = [good(len(PROMPT)) | {"index": 0}, good(len(PROMPT) - 2) | {"index": 1}]
    answer = {"choices": choices[::-1]}  # in any order
    assert contract.check(lambda body: (200, copy.deepcopy(answer)), "m", PROMPT) == []
    change(choices[0])
    findings = contract.check(lambda body: (200, copy.deepcopy(answer)), "m", PROMPT)
    assert len(findings) == 1
    assert finding in findings[0]
    with pytest.raises(ConfigError, match="cannot score texts"):
        contract.require(lambda body: (200, copy.deepcopy(answer)), "m", PROMPT)


def test_refusals() -> None:
    assert "HTTP 400" in contract.check(lambda body: (400, {}), "m", PROMPT)[0]
    one = {"choices": [good(5) | {"index": 0}]}
    assert "two choices" in contract.check(lambda body: (200, one), "m", PROMPT)[0]
