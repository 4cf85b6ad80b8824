"""The page of an evaluation, and the table for a terminal. Knows figures and rows, no task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.measure.quality.questions import shortened
from penstock.measure.records import Header, Record, Request
from penstock.measure.report import page as report
from penstock.measure.report.plots import Axis, Bar, bars
from penstock.measure.report.tables import Absent, Column, Marked, cards, table
from penstock.measure.report.units import interval, percent, quantity

NUM_EXAMPLES = 12  # wrong answers that are shown of each task
MAX_CHARACTERS = 600
_Questions = Mapping[tuple[str, str], str]  # by task and item: only an item's first row has it
_RULES = (
    "An item's score is the mean of its repeats. A request that failed counts as 0 and is counted "
    "beside; `of answered` leaves failures out. Intervals are two-sided 95 %: Wilson's for shares, "
    "mean ± t·SE otherwise, with errors clustered by group; where none or all are right, the rule "
    "of three."
)


def page(header: Header, figures: dict[str, Any], records: Sequence[Record]) -> str:
    """The report, self-contained."""
    rows = [record for record in records if isinstance(record, Request)]
    questions = {
        (row.task, row.prompt_id): row.details["question"]
        for row in rows
        if "question" in row.details
    }
    sections: list[report.Section] = []
    for arm, made in figures["arms"].items():
        sections += _arm_sections(arm, made, rows, questions)
    if judged := figures.get("judge"):
        sections.append(_judge_section(judged))
    return report.document(
        "Evaluation: " + ", ".join(figures["arms"]),
        [*sections, report.provenance(header)],
        summary=[cards(_cards(figures)), _RULES],
        problems=_problems(header, records),
    )


def _problems(header: Header, records: Sequence[Record]) -> list[str]:
    from penstock.measure.quality.figures import figures

    return figures(header, records)[1]


def _cards(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for arm, made in figures["arms"].items():
        for name, task in made["tasks"].items():
            main = task["scores"].get(task["main_score"]) or {}
            note = f"{task['main_score']}, n = {task['num_items']}"
            if main.get("low") is not None:
                note += f", {_range(main)}"
            several = len(figures["arms"]) > 1
            yield (f"{arm}: {name}" if several else name, _value(main), note)


def _is_share(figure: Mapping[str, Any]) -> bool:
    ends = [figure.get(name) for name in ("value", "low", "high")]
    return all(end is None or 0 <= end <= 1 for end in ends)


def _value(figure: Mapping[str, Any]) -> str:
    value = figure.get("value")
    return percent(value) if _is_share(figure) else quantity(value)


def _range(figure: Mapping[str, Any]) -> str:
    return interval(figure.get("low"), figure.get("high"), "%" if _is_share(figure) else "")


def _arm_sections(
    arm: str, made: Mapping[str, Any], rows: Sequence[Request], questions: _Questions
) -> Iterator[report.Section]:
    parts: list[str] = [_scores(made["tasks"]), _answers(made["tasks"])]
    for name, board in made.get("boards", {}).items():
        shown = [(column, value) for column, value in board["columns"].items()]
        if any(value is not None for _, value in shown):
            heads = ["column", "of 100"]
            parts.append(table(heads, shown, caption=f"Open LLM Leaderboard, {name}"))
    if exact := made.get("harness"):
        parts.append(_harness(exact))
    yield report.Section(f"Scores of {arm}", parts)
    for name, task in made["tasks"].items():
        mine = [row for row in rows if row.arm == arm and row.task == name]
        if found := [*_categories(task), *_examples(task["main_score"], mine, questions)]:
            yield report.Section(f"{arm}: {name}", found)


def _scores(tasks: Mapping[str, Any]) -> str:
    lines = []
    for name, task in tasks.items():
        for score, figure in task["scores"].items():
            is_main = score == task["main_score"]
            lines.append(
                [
                    name,
                    score,
                    _value(figure) if figure["value"] is not None else Absent(figure["why"]),
                    _range(figure) if figure.get("low") is not None else Absent(_why(figure)),
                    figure.get("num_items"),
                    figure.get("num_groups"),
                    percent(task["random_baseline"]) if is_main else "",
                    Marked("yes", "the main score") if is_main else "",
                ]
            )
    heads: list[Column | str] = [
        "task",
        "score",
        "value",
        "95 % interval",
        "items",
        "groups",
        "chance",
        "main",
    ]
    return table(heads, lines, caption="Scores")


def _why(figure: Mapping[str, Any]) -> str:
    return str(figure.get("signature") or figure.get("method") or figure.get("why") or "")


def _answers(tasks: Mapping[str, Any]) -> str:
    heads: list[Column | str] = [
        "task",
        "rows",
        "answered",
        Column("errors", help="requests without a whole answer: they count as wrong"),
        Column("empty", help="answered with nothing but white space"),
        Column("cut at the limit", help="finish_reason is `length`"),
        Column("of answered", "%", "the main score without the failures"),
        "tokens in",
        "tokens out",
        Column("cost", "usd"),
    ]
    lines = [
        [
            name,
            task["num_rows"],
            task["num_answered"],
            ", ".join(f"{kind}: {n}" for kind, n in task["errors"].items()) or 0,
            task["num_empty"],
            task["num_truncated"],
            task["of_answered"],
            task["input_tokens"],
            task["output_tokens"],
            task["usd"],
        ]
        for name, task in tasks.items()
    ]
    return table(heads, lines, caption="What became of the requests")


def _harness(exact: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        (task, metric, value) for task, told in exact.items() for metric, value in told.items()
    ]
    return table(["task", "metric,filter", "value"], lines, caption="As lm-eval prints them")


def _categories(task: Mapping[str, Any]) -> Iterator[str]:
    categories = task["categories"]
    if not categories:
        return
    published = task["published"]
    known = published.get("by_category", {})
    heads: list[Column | str] = ["category", "score", "95 % interval", "items", "groups"]
    if known:
        heads.append(str(published["of"]))
    lines = [
        [
            name or "(none)",
            _value(figure),
            _range(figure) if figure.get("low") is not None else Absent(_why(figure)),
            figure.get("num_items"),
            figure.get("num_groups"),
            *([_published(known.get(name))] if known else []),
        ]
        for name, figure in categories.items()
    ]
    yield table(heads, lines, caption=f"{task['main_score']} by category")
    items = [
        Bar(name or "(none)", figure["value"], _ends(figure)) for name, figure in categories.items()
    ]
    yield bars(items, Axis(task["main_score"], "%"), title=f"{task['main_score']} by category")


def _ends(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    return None if figure.get("low") is None else (figure["low"], figure["high"])


def _published(told: Sequence[float] | None) -> str:
    return "" if told is None else f"{percent(told[0])}, n = {told[1]:.0f}"


def _examples(main: str, rows: Sequence[Request], questions: _Questions) -> Iterator[str]:
    """Some answers that are wrong, each to open; the first of every category first."""
    wrong = [row for row in rows if row.error_class is None and row.scores.get(main, 1.0) < 0.5]
    by_category: dict[str, list[Request]] = {}
    for row in wrong:
        by_category.setdefault(str(row.details.get("category", "")), []).append(row)
    chosen: list[Request] = []
    while len(chosen) < NUM_EXAMPLES and any(by_category.values()):
        for queue in by_category.values():
            if queue and len(chosen) < NUM_EXAMPLES:
                chosen.append(queue.pop(0))
    if chosen:
        shown = [report.details(row.prompt_id, *_shown(row, questions)) for row in chosen]
        title = f"{len(wrong)} answers below one half; {len(chosen)} of them"
        yield report.details(title, *shown)


def _shown(row: Request, questions: _Questions) -> Iterator[str]:
    if question := questions.get((row.task, row.prompt_id)):
        yield "question:"
        yield report.code(shortened(question, MAX_CHARACTERS))
    yield "answer:"
    yield report.code(_short(row.output))
    for name in ("expected", "references", "instructions", "target"):
        if name in row.details:
            yield f"{name}:"
            yield report.code(_short(json.dumps(row.details[name], ensure_ascii=False)))


def _short(text: str | None) -> str:
    text = text or "(empty)"
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def _judge_section(judged: Mapping[str, Any]) -> report.Section:
    parts: list[str] = []
    if judged["refusals"]:
        parts += ["This judge may not rank:", report.listing(judged["refusals"])]
    elif "calibration" not in judged:
        parts.append("This judge was not calibrated against votes of people.")
    parts.append(table(["conduct", "value"], _facts(judged["conduct"]), caption="The judge"))
    if calibrated := judged.get("calibration"):
        caption = "Agreement with people"
        parts.append(table(["figure", "value"], _facts(calibrated), caption=caption))
    parts += _pairs(judged)
    for arm, by_task in judged.get("ratings", {}).items():
        lines = [
            [task, quantity(told["value"]), interval(told["low"], told["high"]), told["num"]]
            for task, told in by_task.items()
        ]
        heads = ["task", "mean rating (1 to 5)", "95 % interval", "ratings"]
        parts.append(table(heads, lines, caption=f"Ratings of {arm}"))
    parts.append(table(["cost", "value"], _facts(judged["cost"]), caption="What judging took"))
    return report.Section("Judge", parts)


def _facts(told: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, percent(value) if name.endswith("_rate") or name.startswith("agreement") else value)
        for name, value in told.items()
    ]


def _pairs(judged: Mapping[str, Any]) -> Iterator[str]:
    names = ("first", "second", "num_pairs", "wins", "ties", "losses", "inconsistent")
    if pairs := judged.get("pairs"):
        lines = [[*(pair[name] for name in names), *_rate(pair["win_rate"])] for pair in pairs]
        heads = [*names, "win rate of first", "95 % interval"]
        yield table(heads, lines, caption="Pairs, judged in both orders")
    if length := judged.get("length"):
        if length["value"] is None:
            yield f"Slope over length: {length['why']}."
        else:
            yield (
                "An answer twice as long as the other has a win rate higher by "
                f"{quantity(length['value'], 'points')} "
                f"({interval(length['low'], length['high'], 'points')})."
            )
    if why := judged.get("no_ranking"):
        yield f"There is no ranking: {why}."
    if ranking := judged.get("ranking"):
        no_end = Absent("won or lost every game: the strength is the prior's")
        lines = [
            [one["arm"], one["strength"], *(_or(one[end], no_end) for end in ("low", "high"))]
            for one in ranking
        ]
        heads = ["arm", "log strength", "low", "high"]
        yield table(heads, lines, caption="Bradley-Terry, bootstrap over prompts")


def _or(value: Any, absent: Absent) -> Any:
    return absent if value is None else value


def _rate(told: Mapping[str, Any]) -> tuple[Any, Any]:
    if told["value"] is None:
        return Absent(told["why"]), Absent(told["why"])
    return percent(told["value"]), interval(told["low"], told["high"], "%")


def text_table(figures: Mapping[str, Any]) -> str:
    """The scores for a terminal: a line for each score, and what failed."""
    lines = []
    for arm, made in figures["arms"].items():
        lines.append(arm)
        for name, task in made["tasks"].items():
            for score, figure in task["scores"].items():
                shown = f"{_value(figure):>10}  {_range(figure):<20}"
                lines.append(f"  {name:<24} {score:<20} {shown} n = {figure.get('num_items', 0)}")
            troubles = {**task["errors"], "empty": task["num_empty"]}
            troubles["cut at the limit"] = task["num_truncated"]
            told = ", ".join(f"{kind}: {n}" for kind, n in troubles.items() if n)
            if told:
                lines.append(f"  {'':<24} {told}")
            for category, figure in task["categories"].items():
                lines.append(
                    f"    {category or '(none)':<43} {_value(figure):>10}  {_range(figure)}"
                )
    if judged := figures.get("judge"):
        lines += _judge_lines(judged)
    return "\n".join(lines)


def _judge_lines(judged: Mapping[str, Any]) -> Iterator[str]:
    conduct = judged["conduct"]
    yield (
        f"judge: flips {percent(conduct['flip_rate'])}, unreadable "
        f"{percent(conduct['unreadable_rate'])}, abstains {percent(conduct['abstain_rate'])}"
    )
    if calibrated := judged.get("calibration"):
        yield (
            f"judge: kappa with people {calibrated['kappa']:.2f} "
            f"({calibrated['kappa_low']:.2f} to {calibrated['kappa_high']:.2f}, "
            f"{calibrated['num_votes']} votes)"
        )
    else:
        yield "judge: not calibrated against votes of people"
    for reason in judged["refusals"]:
        yield f"judge may not rank: {reason}"
    for pair in judged.get("pairs", []) if not judged["refusals"] else []:
        yield (
            f"  {pair['first']} against {pair['second']}: {pair['wins']} wins, "
            f"{pair['ties']} ties, {pair['losses']} losses, {pair['inconsistent']} inconsistent; "
            f"win rate {_value(pair['win_rate'])} ({_range(pair['win_rate'])})"
        )
    if why := judged.get("no_ranking"):
        yield f"judge: no ranking: {why}"
    for place, one in enumerate(judged.get("ranking", []), start=1):
        known = one["low"] is not None
        ends = f"{one['low']:.2f} to {one['high']:.2f}" if known else "won or lost every game"
        yield f"  {place}. {one['arm']}: {one['strength']:.2f} ({ends})"
    for arm, by_task in judged.get("ratings", {}).items():
        for task, told in by_task.items():
            yield f"  {arm}, {task}: rated {quantity(told['value'])} of 5, n = {told['num']}"
