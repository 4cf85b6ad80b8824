"""A whole comparison of two servers that do what a script says: design, verdict, exit status."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from scripted_server import Scripted
from tests.measure.verdict.helpers_served import NUM_ITEMS, NUM_WRONG, SMALL, WORDS, answers
from tests.measure.verdict.helpers_simulated import Truth, simulated, window_mark

from penstock.cli.compare import command
from penstock.errors import ConfigError
from penstock.measure import kinds
from penstock.measure.quality import suites
from penstock.measure.quality.runner import run_task
from penstock.measure.records import Arm, Header
from penstock.measure.run import Run, Writer
from penstock.measure.verdict import design
from penstock.measure.verdict import session as session_module
from penstock.measure.verdict.settings import LoadSettings, RuleSettings


def compare(servers: tuple[Scripted, Scripted], *more: str) -> tuple[int, Any]:
    urls = [f"{name}={one.url}" for name, one in zip(("base", "variant"), servers, strict=True)]
    result = CliRunner().invoke(command, [*urls, *SMALL, *more, "--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    document = json.loads(result.stdout)
    assert document.keys() == {"run", "problems", "figures"}
    return result.return_value, document["figures"] | {"problems": document["problems"]}


def test_a_worse_and_slower_server(
    servers: tuple[Scripted, Scripted], prompts: Path, tmp_path: Path
) -> None:
    servers[0].configure(ttft_s=0.002, tpot_s=0.0006, answer=WORDS, answers=answers(0))
    servers[1].configure(ttft_s=0.012, tpot_s=0.004, answer=WORDS, answers=answers(NUM_WRONG))
    path = tmp_path / "run"
    status, found = compare(
        servers,
        "--prompts",
        str(prompts),
        "--output",
        str(path),
        "--usd-per-hour",
        "1",
        "--num-warmups",
        "1",
    )
    assert status == 4
    assert found["overall"]["verdict"] == "worse"
    assert found["problems"] == []
    axes = found["axes"]
    assert axes["quality"]["verdict"] == "worse"
    assert axes["quality"]["estimate"] == pytest.approx(-100 * NUM_WRONG / NUM_ITEMS)
    assert [flip["prompt_id"] for flip in found["quality"]["flips"]] == [
        f"i{n}" for n in range(NUM_WRONG)
    ]
    assert "What is 0 + 1?" in found["quality"]["flips"][0]["question"]
    assert found["quality"]["repeat"]["num_flips"] == 0
    assert 0.1 < axes["speed"]["estimate"] < 0.5  # about a fifth
    assert found["cost"]["arms"][1]["num_success"] == NUM_ITEMS - NUM_WRONG
    assert axes["cost"]["estimate"] > 2
    page = (path / "report.html").read_text()
    assert "variant against base" in page
    assert "no idea" in page
    run = Run(path)
    again, problems = kinds.compute(run.header, run.records)
    assert again == {name: value for name, value in found.items() if name != "problems"}
    assert problems == []
    check_design(run, servers)


def check_design(run: Run, servers: tuple[Scripted, Scripted]) -> None:
    """Both arms got the same prompts in each part of a block, which no cache saw before."""
    legs = defaultdict(list)
    for row in run.requests:
        if row.stage in ("speed", "noise"):
            key = (row.stage, row.block, row.details["slot"])
            legs[key].append((row.arm, row.details["role"], row.prompt_hash, row.t_sent_ns))
            assert row.n_out == 6
    assert len(legs) == 32
    for (stage, block, slot), rows in legs.items():
        assert len(rows) == 3
        expected = design.legs(block, 0)[slot].role
        assert {role for _, role, _, _ in rows} == {expected}
        assert {arm for arm, *_ in rows} == {"variant" if stage == "speed" and expected else "base"}
        if slot in (0, 2):
            other = legs[stage, block, slot + 1]
            hashes = [sorted(one[2] for one in leg) for leg in (rows, other)]
            assert (hashes[0] == hashes[1]) == (stage == "speed")
            assert max(one[3] for one in rows) < min(one[3] for one in other)  # one at a time
    for server in servers:
        asked = [entry for entry in server.log() if entry["prompt"].startswith("[")]
        fixed = [entry for entry in asked if entry["body"]["max_tokens"] == 6]
        assert len(fixed) == len(asked)
        assert all(entry["body"]["ignore_eos"] for entry in fixed)
        repeats = Counter(entry["prompt"] for entry in asked)
        assert max(repeats.values()) == 1
        graded = [entry for entry in server.log() if entry["prompt"].startswith("What is")]
        assert not any("ignore_eos" in entry["body"] for entry in graded)


def test_the_same_server_twice_is_not_told_apart(
    servers: tuple[Scripted, Scripted], prompts: Path, tmp_path: Path
) -> None:
    for server in servers:
        server.configure(ttft_s=0.003, tpot_s=0.001, answer=WORDS, answers=answers(3))
    more = ("--prompts", str(prompts), "--max-drop", "40", "--guard", "quality")
    more = (*more, "--noise-blocks", "0")
    status, found = compare(servers, *more, "--output", str(tmp_path / "run"))
    assert status == 0
    assert found["axes"]["quality"]["verdict"] == "not worse"
    assert found["quality"]["flips"] == []
    assert "cost" not in found["axes"]  # no price was given
    assert "energy" not in found["axes"]


def test_too_few_items_cannot_tell(
    servers: tuple[Scripted, Scripted], prompts: Path, tmp_path: Path
) -> None:
    for server in servers:
        server.configure(ttft_s=0.001, tpot_s=0.0, answers=answers(3))
    more = ("--prompts", str(prompts), "--blocks", "0")
    status, found = compare(servers, *more, "--output", str(tmp_path / "one"))
    assert status == 3
    assert "speed" not in found["axes"]
    assert found["axes"]["quality"]["num_more"] > 100
    assert "more items" in found["overall"]["sentence"]


def test_blocks_are_added_while_speed_cannot_be_told(
    servers: tuple[Scripted, Scripted], tmp_path: Path
) -> None:
    """Equal servers with much jitter: all looks are used, and paid for in the level."""
    servers[0].configure(ttft_s=0.002, tpot_s=0.001, jitter=0.8, seed=1)
    servers[1].configure(ttft_s=0.002, tpot_s=0.001, jitter=0.8, seed=2)
    more = ("--blocks", "4", "--max-blocks", "8", "--requests", "2", "--noise-blocks", "0")
    _, found = compare(servers, *more, "--output", str(tmp_path / "one"))
    assert len(found["speed"]["blocks"]) == 8
    assert found["axes"]["speed"]["confidence"] == pytest.approx(1 - 0.05 / 2)  # two looks


def test_failures_under_load_make_the_run_invalid(
    servers: tuple[Scripted, Scripted], tmp_path: Path
) -> None:
    servers[0].configure(ttft_s=0.002, tpot_s=0.0)
    servers[1].configure(ttft_s=0.002, tpot_s=0.0, fail={"status": 503, "every": 3})
    more = ("--noise-blocks", "0", "--output", str(tmp_path / "run"))
    status, found = compare(servers, *more)
    assert status == 3
    assert any("requests of `variant` failed" in problem for problem in found["problems"])
    assert any(row["errors"].get("http_503") for row in found["failures"])


def test_wrong_settings_are_told(tmp_path: Path) -> None:
    for settings, match in (
        (LoadSettings(blocks=1), "`--blocks` is `1`"),
        (LoadSettings(blocks=6, max_blocks=4), "`--max-blocks` is `4`"),
        (LoadSettings(request_rate=0.0), "`--request-rate` is `0.0`"),
        (LoadSettings(noise_blocks=3), "`--noise-blocks` is `3`"),
        (LoadSettings(idle=math.nan), "`--idle` is `nan`"),
        (LoadSettings(concurrency=2, request_rate=2.0), "exclude one another"),
        (LoadSettings(blocks=0, max_blocks=8), "`--max-blocks` is `8`, and `--blocks` is `0`"),
    ):
        with pytest.raises(ConfigError, match=match):
            settings.check()
    with pytest.raises(ConfigError, match=r"`--max-drop` is `-1\.0`"):
        RuleSettings(max_drop=-1.0).rule()
    with pytest.raises(ConfigError, match="`--success-at` is `7"):
        RuleSettings(success_at=7.0).rule()


def test_each_url_gets_its_own_key(
    servers: tuple[Scripted, Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two providers have two keys, and neither sees the other's."""
    monkeypatch.setenv("KEY_A", "alpha-key")
    monkeypatch.setenv("KEY_B", "beta-key")
    for server, key in zip(servers, ("alpha-key", "beta-key"), strict=True):
        server.configure(ttft_s=0.001, tpot_s=0.0, api_key=key)
    more = ("--noise-blocks", "0", "--api-key-env", "KEY_A", "--api-key-env", "KEY_B")
    _, found = compare(servers, *more, "--output", str(tmp_path / "run"))
    assert [row["errors"] for row in found["failures"]] == [{}, {}]
    assert "-key" not in "".join(one.read_text() for one in (tmp_path / "run").iterdir())
    for server in servers:
        server.configure(api_key=None)


def test_a_divergence_that_fails_leaves_the_verdict(
    servers: tuple[Scripted, Scripted],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An hour of measuring is not lost because two models do not fit beside one another."""

    async def none_fits(*_: Any) -> AsyncIterator[dict[str, Any]]:
        raise ConfigError("The divergence of the arms was not computed: out of memory")
        yield {}

    monkeypatch.setattr(session_module, "divergence_windows", none_fits)
    monkeypatch.setattr(session_module, "is_possible", lambda specs: True)
    for server in servers:
        server.configure(ttft_s=0.001, tpot_s=0.0, answers=answers(0))
    more = ("--prompts", str(prompts), "--blocks", "0", "--output", str(tmp_path / "run"))
    _, found = compare(servers, *more)
    assert found["quality"]["pooled"]["n"] == NUM_ITEMS
    assert found["divergence"] is None
    assert "out of memory" in (tmp_path / "run" / "report.html").read_text()


def test_design_is_interleaved_and_the_seed_fixes_it() -> None:
    for block in range(4):
        roles = [leg.role for leg in design.legs(block, 7)]
        assert roles in ([0, 1, 1, 0], [1, 0, 0, 1])
        assert {(leg.role, leg.part) for leg in design.legs(block, 7)} == {
            (role, part) for role in (0, 1) for part in (0, 1)
        }
        assert design.legs(block, 7)[0].role != design.legs(block + 1, 7)[0].role
    assert design.looks(6, 20) == [6, 12, 18, 20]
    assert design.looks(6, 6) == [6]
    taken = [
        p
        for block in range(2)
        for part in (0, 1)
        for p in design.prompts_of("abcdefgh", block, part, 2, 1)
    ]
    assert sorted(taken) == list("abcdefgh")  # none twice before all were used
    parts = design.chunks(list(range(10)), 3, 0)
    assert sorted(one for part in parts for one in part) == list(range(10))


def test_two_finished_runs_are_paired(
    servers: tuple[Scripted, Scripted], prompts: Path, tmp_path: Path, anyio_backend: str
) -> None:
    import asyncio

    from penstock.measure.load.endpoint import Endpoint

    task = suites.find(str(prompts))
    for server, name, num_wrong in zip(servers, ("one", "two"), (0, NUM_WRONG), strict=True):
        server.configure(ttft_s=0.001, tpot_s=0.0, answers=answers(num_wrong))
        header = Header(
            run_id=name,
            kind="eval",
            started_at="",
            version="",
            settings={
                "tasks": {
                    task.name: task.facts(NUM_ITEMS).__struct_fields__
                    and {"main_score": task.main_score, "scores": {task.main_score: {}}}
                }
            },
            arms=[Arm(name=name, target=server.url)],
        )

        async def ask(server: Scripted = server, header: Header = header, name: str = name) -> None:
            target = Endpoint(server.url, arm_name=name)
            await target.connect()
            with Writer(header, tmp_path / name) as writer:
                await run_task(target, task, writer=writer)
            await target.close()

        asyncio.run(ask())
    arguments = [str(tmp_path / "one"), str(tmp_path / "two"), "--json"]
    result = CliRunner().invoke(
        command,
        [*arguments, "--output", str(tmp_path / "both")],
        standalone_mode=False,
        catch_exceptions=False,
    )
    found = json.loads(result.stdout)["figures"]
    # Neither of the two came to its end: figures are there, and it is said.
    assert result.return_value == 3
    told = [one.split(": ")[1] for one in json.loads(result.stdout)["problems"]]
    assert told == ["the run came to no end"] * 2
    assert found["axes"].keys() == {"quality"}
    for ignored in (["--blocks", "4"], ["--usd-per-hour", "1"], ["--tasks", "brook"]):
        with pytest.raises(click.UsageError, match=f"`{ignored[0]}` is for arms that are asked"):
            CliRunner().invoke(
                command, [*arguments, *ignored], standalone_mode=False, catch_exceptions=False
            )
    # Rows have a price: the cost of tokens is compared over groups of items.
    for name in ("one", "two"):
        path = tmp_path / name / "records.jsonl"
        rows = [json.loads(line) | {"usd": 0.001} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(
        command,
        [*arguments, "--guard", "cost", "--output", str(tmp_path / "priced")],
        standalone_mode=False,
        catch_exceptions=False,
    )
    cost = json.loads(result.stdout)["figures"]["axes"]["cost"]
    assert cost["verdict"] == "worse"
    assert cost["estimate"] == pytest.approx(NUM_ITEMS / (NUM_ITEMS - NUM_WRONG))
    assert found["quality"]["pooled"]["num_lost"] == NUM_WRONG
    assert (tmp_path / "both" / "report.html").is_file()


def test_the_page_is_the_same_every_time_and_escapes_answers(tmp_path: Path) -> None:
    header, records = simulated(Truth(num_items=60, share_lost=0.1, slower=0.1), 2)
    for row in records:
        if getattr(row, "output", None) == "wrong":
            row.output = "<script>alert(1)</script>"  # type: ignore[union-attr]
    records.append(window_mark(kl=[0.1, 0.2], nll_a=[1.0, 2.0], nll_b=[1.1, 2.2], top1=[1, 0]))
    records.append(window_mark(kl=[0.3], nll_a=[1.0], nll_b=[1.1], top1=[1]))
    figures, _ = kinds.compute(header, records)
    from penstock.measure.verdict.page import page

    html = page(header, figures, records)
    assert html == page(header, figures, records)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "KL divergence" in html
    for word in ("Noise floor", "Flips", "Memory, energy, cost", "How these figures were made"):
        assert word in html
