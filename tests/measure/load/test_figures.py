"""Figures of hand-made rows: every one is known beforehand."""

from __future__ import annotations

import msgspec
import pytest

from penstock.measure import kinds
from penstock.measure.load import page as load_page
from penstock.measure.load.figures import figures, load_figures
from penstock.measure.load.progress import Progress
from penstock.measure.load.slo import parse
from penstock.measure.records import Arm, Header, Mark, Record, Request, Sample

MS = 10**6
S = 10**9


def request(index: int, due_s: float, e2e_s: float = 1.0, **more: object) -> Request:
    """Sent 2 ms late; first token after 0.1 s; 11 tokens to the end; 20 in, 5 of them cached."""
    due, sent = round(due_s * S), round(due_s * S) + 2 * MS
    end = sent + round(e2e_s * S)
    first = sent + S // 10
    step = (end - first) // 10
    row = Request(
        stage="load",
        index=index,
        prompt_id=str(index),
        t_due_ns=due,
        t_sent_ns=sent,
        t_first_ns=first,
        t_last_ns=end,
        t_done_ns=end,
        chunk_t_ns=[first + step * n for n in range(11)],
        chunk_n=[1] * 11,
        n_in=20,
        n_cached=5,
        n_out=11,
        count_source="usage",
        finish_reason="stop",
    )
    return msgspec.structs.replace(row, **more)


def failed(index: int, due_s: float, error: str = "http_429") -> Request:
    at = round(due_s * S)
    return Request(
        stage="load",
        index=index,
        prompt_id=str(index),
        t_due_ns=at,
        t_sent_ns=at + 2 * MS,
        t_done_ns=at + 5 * MS,
        error_class=error,
        error="Too many requests.",
    )


def marks(end_s: float = 10.0, *, interrupted: bool = False, **facts: object) -> list[Mark]:
    return [
        Mark(t_ns=0, stage="load", name="stage_begin", facts={"loop": "open", **facts}),
        Mark(t_ns=2 * S, stage="load", name="steady_begin"),
        Mark(t_ns=round(end_s * S), stage="load", name="steady_end"),
        Mark(t_ns=round(end_s * S), stage="load", name="stage_end",
             facts={"interrupted": interrupted}),
    ]  # fmt: skip


def stage_rows() -> list[Request]:
    """Ramp at 0 and 1; then one a second from 2 to 9: six answers, one refusal, one cut."""
    ramp = [msgspec.structs.replace(request(n, float(n)), phase="ramp") for n in range(2)]
    answers = [request(n, float(n), e2e_s=1.0 if n < 7 else 1.5) for n in range(2, 8)]
    cut = msgspec.structs.replace(
        request(9, 9.0), error_class="cut", t_last_ns=None, n_out=None, chunk_t_ns=[], chunk_n=[]
    )
    cut.t_first_ns = None
    return [*ramp, *answers, failed(8, 8.0), cut]


def test_known_figures() -> None:
    made = load_figures(
        stage_rows(), marks(rate=1.0), limits=parse("e2e=1.2s,e2e_p50=2s,error_rate=20%")
    )
    assert made["window"] == {"begin_s": 2.0, "duration_s": 8.0}
    requests = made["requests"]
    assert (requests["num"], requests["num_ok"], requests["num_cut"]) == (8, 6, 1)
    assert requests["errors"] == {"http_429": 1}
    assert requests["error_examples"] == {"http_429": "Too many requests."}
    assert requests["num_outside"] == 2
    assert made["rate"] == {
        "requested_per_s": 1.0,
        "scheduled_per_s": 1.0,
        "achieved_per_s": 1.0,
        # the answer of the ramp's last request, and six of the window, end within it
        "answered_per_s": 7 / 8,
    }
    latency = made["latency"]
    assert latency["e2e_s"]["n"] == 6
    assert latency["e2e_s"]["p50"] == pytest.approx(1.0)
    assert latency["e2e_from_due_s"]["max"] == pytest.approx(1.502)
    assert latency["queue_s"]["p99"] == pytest.approx(0.002)
    assert latency["tpot_s"]["p50"] == pytest.approx(0.09)
    assert latency["chunk_gap_s"]["n"] == 60
    goodput = made["goodput"]
    assert (goodput["num_good"], goodput["num_bad"], goodput["num_unknown"]) == (5, 2, 1)
    assert goodput["share"] == pytest.approx(5 / 7)
    assert goodput["per_s"] == pytest.approx(5 / 8)
    assert [one["kept"] for one in made["slo"]] == [True, True]
    assert made["slo"][1]["value"] == pytest.approx(1 / 7)


def test_tokens_by_the_time_of_their_chunks() -> None:
    """Of the request due at 1 s, 10 of 11 tokens... come within [2, 10): those after 2 s only."""
    rows = stage_rows()
    inside = sum(2 * S <= at < 10 * S for row in rows if row.error_class is None
                 for at in row.chunk_t_ns)  # fmt: skip
    tokens = load_figures(rows, marks())["tokens"]
    assert tokens["output_per_s"] == pytest.approx(inside / 8)
    assert 66 <= inside <= 68
    assert tokens["input_per_s"] == pytest.approx(6 * 20 / 8)
    assert tokens["total_per_s"] == pytest.approx((inside + 120) / 8)
    assert tokens["cached_share"] == 0.25
    assert (tokens["output"]["mean"], tokens["sources"]) == (11, {"usage": 6})


def test_in_flight_is_weighted_by_time() -> None:
    rows = [request(0, 2.0, 4.0), request(1, 4.0, 4.0)]
    made = load_figures(rows, marks())
    assert made["in_flight"] == {"mean": pytest.approx(1.0), "max": 2}


def test_errors_are_no_latencies_and_not_forgotten() -> None:
    made = load_figures([failed(0, 3.0), failed(1, 4.0, "timeout")], marks())
    assert made["latency"]["e2e_s"]["n"] == 0
    assert "None of 2 requests was answered: 1 http_429, 1 timeout" in made["problems"][0]
    assert "Too many requests" in made["problems"][0]


def test_counts_that_nobody_told_are_in_no_rate() -> None:
    rows = [
        msgspec.structs.replace(
            request(n, 3.0 + n), chunk_n=[], n_out=None, count_source="chunks", n_in=None
        )
        for n in range(3)
    ]
    made = load_figures(rows, marks())
    assert made["tokens"]["output_per_s"] == 0
    assert made["latency"]["tpot_s"]["n"] == 0
    chunks = [
        msgspec.structs.replace(request(n, 3.0 + n), chunk_n=[], count_source="chunks")
        for n in range(3)
    ]
    made = load_figures(chunks, marks())  # as the client writes them: chunks stand for tokens
    assert made["tokens"]["output_per_s"] == 0
    assert made["tokens"]["output"]["n"] == 0
    assert any("Nobody said how many tokens 3 answers have" in note for note in made["notes"])
    spread = [msgspec.structs.replace(request(n, 3.0 + n), chunk_n=[]) for n in range(3)]
    made = load_figures(spread, marks())
    assert made["tokens"]["output_per_s"] == pytest.approx(33 / 8)
    assert any("spread evenly" in note for note in made["notes"])


def test_few_answers_make_high_quantiles_weak() -> None:
    def notes(num: int) -> str:
        return " ".join(load_figures([request(n, 3.0) for n in range(num)], marks())["notes"])

    assert "p95 and p99 say little" in notes(199)
    assert "p99 says little" in notes(200)
    assert "little" not in notes(1000)


def test_repeated_prompts_and_warm_caches_are_told() -> None:
    rows = [msgspec.structs.replace(request(n, 3.0), prompt_hash="same") for n in range(4)]
    made = load_figures(rows, marks(), settings={"prefix": "cold"})
    assert any("4 requests had 1 different prompts" in note for note in made["notes"])
    assert any(
        "25% of prompt tokens came from the server's cache" in note for note in made["notes"]
    )
    assert not any("cache, although" in note for note in load_figures(rows, marks())["notes"])


def test_a_window_shorter_than_an_answer_is_widened_for_throughput() -> None:
    rows = [request(n, 2.0, 2.0) for n in range(4)]
    made = load_figures(rows, marks(2.5))
    assert made["throughput_window"] == "whole stage"
    assert made["tokens"]["output_per_s"] == pytest.approx(44 / 2.0, rel=0.01)
    assert any("shorter than an answer" in note for note in made["notes"])


def test_an_end_that_never_came() -> None:
    made = load_figures(stage_rows(), marks()[:2])
    assert "interrupted" in made["problems"][0]
    assert made["window"]["duration_s"] > 7
    assert load_figures([], marks()[:2])["problems"]
    no_marks = load_figures(stage_rows(), [])
    assert no_marks["requests"]["num_ok"] == 6
    assert not no_marks["problems"]


def test_samples_of_other_arms_and_times_are_not_ours() -> None:
    def lag(at_s: float, arm: str, value: float) -> Sample:
        return Sample(t_ns=round(at_s * S), arm=arm, source="client", values={"loop_lag_s": value})

    meters: list[Record] = [lag(3, "", 0.004), lag(1, "", 9.0), lag(3, "other", 9.0)]
    made = load_figures(stage_rows(), marks(), meters=meters)
    assert made["client"]["loop_lag_s"] == 0.004
    assert not made["problems"]


def run_of(stages: dict[str, float]) -> tuple[Header, list[Record]]:
    """A sweep: a stage a name, with answers of that many seconds."""
    records: list[Record] = []
    for name, e2e_s in stages.items():
        records += [msgspec.structs.replace(mark, stage=name, arm="a") for mark in marks()]
        records += [
            msgspec.structs.replace(request(n, n / 2, e2e_s), stage=name, arm="a")
            for n in range(4, 18)
        ]
    header = Header(
        run_id="r",
        kind="bench",
        started_at="2026-01-01T00:00:00Z",
        version="0",
        settings={"slo": [{"metric": "e2e", "limit": 1.2}], "notes": ["A note."]},
        arms=[Arm(name="a", target="http://127.0.0.1:1")],
    )
    return header, records


def test_a_run_of_several_stages() -> None:
    header, records = run_of({"slow": 4.0, "quick": 1.0})
    warm = msgspec.structs.replace(request(0, 0.0), phase="warmup", stage="warmup", arm="a")
    made, problems = figures(header, [warm, *records])
    assert [stage["stage"] for stage in made["stages"]] == ["slow", "quick"]
    assert made["warmup"] == {"num": 1, "num_ok": 1}
    assert problems == []
    assert made["notes"].count("A note.") == 1
    assert sum("p95 and p99 say little" in note for note in made["notes"]) == 1  # of both stages
    by_label = {point["label"]: point for point in made["pareto"]}
    assert by_label["a quick"]["best"]  # faster for one, and not fewer tokens for all
    assert by_label["a quick"]["user_per_s"] == pytest.approx(1 / 0.09)
    assert not by_label["a slow"]["best"]


def test_a_run_without_a_stage_is_not_valid() -> None:
    header, _ = run_of({})
    assert figures(header, [])[1] == ["No load was begun."]
    assert "No load was begun." in load_page.page(header, figures(header, [])[0], [])


def test_the_page_is_the_same_of_stored_figures() -> None:
    header, records = run_of({"rate=1": 1.0, "rate=2": 2.0})
    found = {
        "highest_passing": 1.0,
        "lowest_failing": 2.0,
        "ended": "the bracket is within 5%",
        "tried": [{"rate": 1.0, "passed": True}, {"rate": 2.0, "passed": False, "why": "<e2e>"}],
    }
    records.append(Mark(t_ns=11 * S, name="search", facts=found))
    made, _ = kinds.compute(header, records)
    page = load_page.page(header, made, records)
    assert page == load_page.page(header, msgspec.json.decode(msgspec.json.encode(made)), records)
    for text in ("1 requests a second keep the limits, 2 do not", "&lt;e2e&gt;", "Over loads"):
        assert text in page
    assert "<e2e>" not in page


def test_what_breaks_above_the_highest_rate_is_no_problem_of_the_answer() -> None:
    header, records = run_of({"rate=1": 1.0, "rate=2": 1.0})
    for record in records:
        if isinstance(record, Request) and record.stage == "rate=2":
            record.error_class, record.error = "http_503", "Full."
    tried = [{"rate": 1.0, "passed": True}, {"rate": 2.0, "passed": False, "why": "x"}]
    facts = {"highest_passing": 1.0, "lowest_failing": 2.0, "ended": "x", "tried": tried}
    assert "rate=2: None of 14" in figures(header, records)[1][0]
    made, problems = figures(header, [*records, Mark(t_ns=S, name="search", facts=facts)])
    assert problems == []
    assert any("rate=2: None of 14 requests was answered" in note for note in made["notes"])


def test_progress_on_a_terminal_and_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream)
    progress.begin("load", 3)
    progress.add(request(0, 0.0))
    progress.add(failed(1, 0.0))
    line = progress.line()
    assert "2/3" in line
    assert "1 failed" in line
    assert "ttft 100 ms" in line
    progress._shown_s = 0.0
    progress.add(request(2, 0.0))
    assert "3/3" in stream.getvalue()
    progress.say("done")
    assert stream.getvalue().endswith("done\n")


def test_a_server_that_refuses_connections_does_not_make_the_client_late() -> None:
    rows = [request(n, 2.0 + n / 2) for n in range(16)]
    for row in rows[::4]:
        row.t_sent_ns, row.t_first_ns, row.error_class = None, None, "connect"
    made = load_figures(rows, marks())
    assert made["rate"]["achieved_per_s"] == pytest.approx(2.0)
    assert not made["problems"]
    slow = [msgspec.structs.replace(row, details={"connect_s": 0.05}) for row in rows]
    for row in slow:
        row.t_sent_ns = (row.t_due_ns or 0) + 52 * MS
    assert not load_figures(slow, marks())["problems"]


def test_all_at_once_is_no_rate() -> None:
    rows = [request(n, 2.0) for n in range(4)]
    made = load_figures(rows, marks(2.0001))
    assert made["rate"]["scheduled_per_s"] is None
    assert made["rate"]["answered_per_s"] == pytest.approx(4.0)
    assert not made["problems"]


def test_the_client_is_watched_until_the_last_answer() -> None:
    lag = Sample(t_ns=11 * S, source="client", values={"loop_lag_s": 0.4})
    ended = [*marks()[:3], Mark(t_ns=12 * S, stage="load", name="stage_end")]
    problems = load_figures(stage_rows(), ended, meters=[lag])["problems"]
    assert any("stood still for 0.4 s" in problem for problem in problems)
