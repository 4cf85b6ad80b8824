"""Pages: well-formed, without anything from elsewhere, and no text of others becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.measure.records import Arm, Header
from penstock.measure.report import page, plots, tables
from penstock.measure.report.axes import Axis
from penstock.measure.report.html import Html, element, escape
from penstock.measure.report.plots import Bar, Effect, Point, Series
from penstock.measure.report.style import STYLE

HOSTILE = (
    "</title></script><script>alert('x')</script><img src=x onerror=\"a\">&amp;\x00\u202e\ud800"
)
S = Axis("ttft", "s")
RATE = Axis("rate", "tokens/s")
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)

PLOTS: dict[str, Callable[[str], Html]] = {
    "ecdf": lambda name: plots.ecdf({name: [0.1, 0.2, 0.4]}, S, title=name, note=name, limit=0.3),
    "histogram": lambda name: plots.histogram([0.1, 0.2, 0.4], S, title=name, note=name),
    "timeline": lambda name: plots.timeline(
        [Series(name, [(0, 1.0), (1, None), (2, 3.0)])], RATE, title=name, marks=[(1.0, name)]
    ),
    "line": lambda name: plots.line(
        [Series(name, [(1, 1.0), (2, 3.0)], [(0.5, 2.0), None])], S, RATE, title=name, limit=2
    ),
    "scatter": lambda name: plots.scatter(
        [Point(1, 2, name, name, (0.5, 2), (1, 3)), Point(2, 3, "b")],
        S,
        RATE,
        title=name,
        better=("low", "high"),
    ),
    "bars": lambda name: plots.bars(
        [Bar(name, 0.5, (0.4, 0.6), name), Bar("b", None)], Axis(name, "%"), title=name, limit=0.2
    ),
    "forest": lambda name: plots.forest(
        [Effect(name, -0.01, -0.02, 0.01, name), Effect("b", None, None, None)],
        Axis(name, "points"),
        title=name,
        margin=-0.015,
    ),
}


def whole(text: str) -> str:
    header = Header(
        run_id=text,
        kind="bench",
        started_at=text,
        version=text,
        command=["penstock", text],
        settings={text: text, "list": [text], "inner": {text: [{text: text}]}},
        arms=[Arm(name=text, target=text, model=text)],
        hashes={text: text},
        prices={text: {text: 1.5}},
        environment={"cpu": {"name": text}},
    )
    table = tables.table(
        [tables.Column(text, "s", text), text],
        [[text, 1.5], [None, tables.Absent(text)], [tables.Marked(2, text), text]],
        caption=text,
    )
    parts = [text, page.details(text, text), page.listing([text]), page.code(text), table]
    cards = tables.cards([(text, text, text)])
    return page.document(
        text,
        [
            page.Section(text, parts),
            *(page.Section(text, [make(text)]) for make in PLOTS.values()),
            page.provenance(header),
        ],
        summary=[text, cards],
        problems=[text],
    )


class Reader(HTMLParser):
    """What a browser would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_hostile_text_stays_text() -> None:
    plain, hostile = read(whole("a" * len(HOSTILE))), read(whole(HOSTILE))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert sum("alert('x')" in text for text in hostile.texts) > 30
    whole(HOSTILE).encode("utf-8")  # no surrogate is left


def test_page_is_well_formed_and_loads_nothing() -> None:
    made = whole(HOSTILE)
    body = re.sub(r"<script>.*?</script>", "", made.removeprefix("<!DOCTYPE html>\n"), flags=re.S)
    ET.fromstring(body)
    reader = read(made)
    assert not {"link", "iframe", "img", "object", "base", "form"} & set(reader.tags)
    for name, value in reader.attributes:
        assert name not in ("src", "style", "srcset", "action", "data")
        assert not name.startswith("on")
        assert name != "href" or value.startswith("#")
    assert "url(" not in made
    assert "@import" not in made
    assert "prefers-color-scheme: dark" in made
    assert "@media print" in made


def test_policy_allows_just_what_is_there() -> None:
    made = whole("a")
    policy = next(value for name, value in read(made).attributes if "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_problems_come_first_and_pages_are_the_same_twice() -> None:
    made = page.document("T", [page.Section("S", ["text"])], problems=["the client was late"])
    assert made.index("This run is not valid") < made.index("<h2>S</h2>")
    assert "the client was late" in made
    assert "not valid" not in page.document("T", [page.Section("S", [])])
    assert whole("a") == whole("a")


def svg(figure: Html) -> ET.Element:
    (found,) = re.findall(r"<svg xmlns.*?</svg>(?=<|$)", figure, re.S)
    return ET.fromstring(found)


def parts(root: ET.Element, tag: str, name: str = "") -> list[ET.Element]:
    found = root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [part for part in found if name in part.get("class", "").split() or not name]


@pytest.mark.parametrize("kind", PLOTS)
def test_plots_say_what_they_show(kind: str) -> None:
    figure = PLOTS[kind](HOSTILE)
    root = svg(figure)
    assert root.get("role") == "img"
    assert root[0].tag.endswith("title")
    assert root[0].text
    assert root[1].tag.endswith("desc")
    assert "<details>" in figure, "the numbers are behind it"
    ET.fromstring(figure)


@pytest.mark.parametrize("kind", PLOTS)
def test_plots_stay_inside_and_labels_apart(kind: str) -> None:
    root = svg(PLOTS[kind]("a name"))
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    boxes = []
    for part in parts(root, "text"):
        told = part.text or (part[0].tail if len(part) else "") or ""
        wide, x, y = len(told) * 6.0, float(str(part.get("x"))), float(str(part.get("y")))
        left = x - {"start": 0, "middle": 0.5, "end": 1}[part.get("text-anchor", "start")] * wide
        boxes.append((left, y - 9, left + wide, y + 2, told))
        assert left >= -1, told
        assert left + wide <= width + 1, told
        assert 0 <= y <= height, told
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            apart |= one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


def axis_of(root: ET.Element) -> Callable[[float], float]:
    """The value of a pixel of x, as the labels below the plot say."""
    height = float(str(root.get("viewBox")).split()[3])
    marks = [
        (float(str(part.get("x"))), float(str(part.text).replace(",", "").replace("−", "-")))
        for part in parts(root, "text", "soft")
        if abs(float(str(part.get("y"))) - (height - 29)) < 1
    ]
    (x1, v1), (x2, v2) = marks[0], marks[-1]
    return lambda x: v1 + (x - x1) * (v2 - v1) / (x2 - x1)


def test_a_thinned_curve_keeps_its_upper_tail_and_is_on_the_whole_one() -> None:
    corners = plots._curve([float(value) for value in range(100_000)])
    assert len(corners) < 1000
    assert corners[0] == (0.0, 0.0)
    assert [x for x, _ in corners[-50:]] == [float(value) for value in range(99_950, 100_000)]
    assert all(y == (x + 1) / 100_000 for x, y in corners[1:])


def test_ecdf_is_where_its_axis_says() -> None:
    root = svg(plots.ecdf({"": [0.010, 0.020, 0.020, 0.040]}, S, title="t"))
    value = axis_of(root)
    (curve,) = parts(root, "path", "stroke")
    moves = re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", str(curve.get("d")))
    xs = [float(one) for move, one, _ in moves if move in "MH"]
    ys = [float(two or one) for move, one, two in moves if move in "MV"]
    assert [value(x) for x in xs] == pytest.approx([10, 10, 20, 20, 40], abs=0.1)  # ms
    shares = [(ys[0] - y) / (ys[0] - ys[-1]) for y in ys]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.001)


def test_histogram_counts_everything_once() -> None:
    values = [0.0, 0.05, 0.1, 0.1, 0.7, 1.0]
    figure = plots.histogram(values, S, title="t")
    rows = [
        [float(cell) for cell in row]
        for row in re.findall(
            r'data-value="([^"]+)">[^<]*</td><td[^>]*data-value="([^"]+)">[^<]*</td>'
            r'<td[^>]*data-value="([^"]+)"',
            figure,
        )
    ]
    assert sum(count for _, _, count in rows) == len(values)
    for low, high, count in rows:
        assert count == sum(low - 1e-9 <= value < high - 1e-9 for value in values)
    assert "n = 6" in figure


def test_forest_shows_interval_and_margin() -> None:
    effects = [Effect("a", -0.004, -0.011, 0.003, "not worse")]
    root = svg(plots.forest(effects, Axis("loss", "points"), title="t", margin=-0.01))
    value = axis_of(root)
    (limit,) = parts(root, "line", "limit")
    assert value(float(str(limit.get("x1")))) == pytest.approx(-1, abs=0.02)  # points
    (interval,) = parts(root, "path", "whisker")
    ends = [float(x) for x in re.findall(r"[ML]([\d.]+)", str(interval.get("d")))[:2]]
    assert [value(x) for x in ends] == pytest.approx([-1.1, 0.3], abs=0.02)
    told = "".join(part.text or "" for part in parts(root, "text"))
    assert "−0.400 [−1.10, 0.300] points not worse" in told


@pytest.mark.parametrize("better", [("low", "high"), ("low", "low"), ("high", "high")])
@given(
    points=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12),
)
def test_pareto_is_what_nothing_beats(
    points: list[tuple[float, float]], better: tuple[plots.Better, plots.Better]
) -> None:
    signs = [1 if side == "low" else -1 for side in better]

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        pairs = [(sign * x, sign * y) for sign, x, y in zip(signs, a, b, strict=True)]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = {
        at for at, one in enumerate(points) if not any(beats(other, one) for other in points)
    }
    assert set(plots.pareto(points, better)) == expected


def test_pareto_front_is_steps() -> None:
    points = [Point(1, 10, "a"), Point(2, 30, "b"), Point(4, 20, "c")]
    root = svg(plots.scatter(points, S, RATE, title="t", better=("low", "high")))
    (curve,) = parts(root, "path", "c6")
    told = str(curve.get("d"))
    assert re.fullmatch(r"M[\d.]+ [\d.]+( H[\d.]+ V[\d.]+){2}", told), "no slope between points"
    value = axis_of(root)
    assert value(float(told.split("H")[1].split()[0])) == pytest.approx(2, abs=0.01)


@settings(max_examples=40)
@given(values=st.lists(NUMBERS, max_size=8), log=st.booleans())
def test_no_numbers_break_a_plot(values: list[float], log: bool) -> None:
    axis = Axis("x", "s", log=log)
    for figure in (
        plots.ecdf({"a": values, "b": []}, axis, title="t"),
        plots.histogram(values, axis, title="t"),
        plots.timeline([Series("a", list(enumerate(values)))], axis, title="t"),
        plots.line([Series("a", [(value, value) for value in values])], axis, axis, title="t"),
        plots.scatter([Point(value, value, "a") for value in values], axis, axis, title="t"),
        plots.bars([Bar("a", value) for value in values], axis, title="t"),
    ):
        ET.fromstring(figure)
        assert '"nan"' not in figure
        assert not re.search(r"[MLHV ]nan", figure)


def test_many_points_are_thinned_and_extremes_kept() -> None:
    points: list[tuple[float, float | None]] = [(at / 100, 1.0) for at in range(50_000)]
    points[31_234] = (312.34, 9.0)
    figure = plots.timeline([Series("a", points)], RATE, title="t")
    assert len(figure) < 200_000
    root = svg(figure)
    (curve,) = parts(root, "path", "stroke")
    ys = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", str(curve.get("d")))]
    labels = {part.text: float(str(part.get("y"))) - 4 for part in parts(root, "text", "soft")}
    one, two = labels["2"], labels["4"]
    assert two + (min(ys) - two) == pytest.approx(one + (9 - 2) * (two - one) / 2, abs=0.5)


def test_tables() -> None:
    made = tables.table(
        ["arm", tables.Column("p99", "s", "the formula")],
        [["a", 0.0123], ["b", tables.Absent("no token came")], ["c", tables.Marked(0.5, "few")]],
    )
    root = ET.fromstring(made)
    heads = ["".join(cell.itertext()) for cell in root.iter("th") if cell.get("scope") == "col"]
    assert heads == ["arm", "p99 (ms)"]
    cells = [(cell.get("class"), "".join(cell.itertext()), cell) for cell in root.iter("td")]
    assert [told for _, told, _ in cells] == ["12.3", "—", "500*"]
    assert all("number" in str(names) for names, _, _ in cells)
    assert cells[1][2].get("title") == "no token came"
    assert cells[0][2].get("data-value") == "0.0123"
    assert "number" in str(list(root.iter("th"))[1].get("class"))
    apart = tables.table(["arm", tables.Column("wait", "s")], [["a", 2.5], ["b", 0.0001]])
    told = ["".join(cell.itertext()) for cell in ET.fromstring(apart).iter("td")]
    assert told == ["2.50 s", "100 µs"], "one unit would be no help"
    with pytest.raises(ValueError, match="2 cells"):
        tables.table(["a", "b"], [["only one"]])


def test_units_of_a_table_stand_in_heads_or_in_cells() -> None:
    p50, p99 = tables.Column("p50", "s"), tables.Column("p99", "s")
    share = tables.Column("share", "%")

    def texts(rows: list[list[Any]]) -> list[str]:
        root = ET.fromstring(tables.table(["arm", p50, p99, share], rows))
        return ["".join(cell.itertext()) for tag in ("th", "td") for cell in root.iter(tag)]

    alike = texts([["a", 0.0405, 0.06, 0.5]])
    assert alike == ["arm", "p50 (ms)", "p99 (ms)", "share (%)", "a", "40.5", "60.0", "50.0"]
    apart = texts([["a", 0.0405, 0.06, 0.5], ["b", 0.041, 90.0, 1.0]])
    assert apart[:4] == ["arm", "p50", "p99", "share (%)"]
    assert apart[6:9] == ["40.5 ms", "60.0 ms", "50.0"]


def test_a_wide_table_scrolls_on_screen_and_wraps_on_paper() -> None:
    screen, paper = STYLE.split("@media print")
    assert ".scroll { overflow-x: auto; max-width: 100%;" in screen
    for rule in (
        "@page { size: A4;",
        "table.wide { font-size:",
        "thead th, th.number, td.number, .pairs th { white-space: normal; }",
        "thead th, tbody th, td.text, .pairs th, .pairs td { overflow-wrap: anywhere; }",
    ):
        assert rule in paper
    wide = tables.table([f"c{at}" for at in range(12)], [list(range(12))])
    assert '<table class="wide">' in wide
    assert 'class="wide"' not in tables.table(["a", "b"], [[1, 2]])


def test_element_escapes_once() -> None:
    inner = element("b", "<1>")
    assert element("a", inner, title='"<"') == '<a title="&quot;&lt;&quot;"><b>&lt;1&gt;</b></a>'
    assert escape(escape("<")) == "&lt;"
