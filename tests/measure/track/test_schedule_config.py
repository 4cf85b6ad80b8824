"""Configuration and slots of a tracker."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.errors import ConfigError
from penstock.measure.track.config import Schedule, interval_s, read_config
from penstock.measure.track.schedule import per_year, slots_of

GOOD = """
database = "t.sqlite"
[schedule]
every = "30min"
[[provider]]
name = "here"
url = "http://127.0.0.1:8000"
[[provider.model]]
name = "brook"
[[provider.model]]
name = "brook-int8"
reference = "here/brook"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "track.toml"
    path.write_text(text)
    return path


def test_good(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, GOOD))
    assert [model.name for _, model in config.series] == ["brook", "brook-int8"]
    assert config.probe.concurrency == [1, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('every = "30min"', 'every = "soon"'), "`schedule.every` is `soon`"),
        (('every = "30min"', 'every = "0s"'), "`schedule.every` is `0s`"),
        (('every = "30min"', ""), "one of `cron` and `every`"),
        (('every = "30min"', 'every = "1h"\ncron = "* * * * *"'), "one of `cron` and `every`"),
        (('every = "30min"', 'cron = "61 * * * *"'), "`schedule.cron`"),
        (('every = "30min"', 'cron = "* * * * *"\ntimezone = "Mars"'), "`schedule.timezone`"),
        (('url = "http', 'url = "ftp'), "`url` of provider `here`"),
        (("127.0.0.1", "me:secret@127.0.0.1"), "holds a user or a password"),
        (("http://127.0.0.1", "me:secret@127.0.0.1"), "`url` of provider `here`"),
        (("127.0.0.1:8000", "[me:secret"), "`url` of provider `here`"),
        (('every = "30min"', 'every = "1h"\ntimezone = "UTC"'), "`schedule.timezone` goes with"),
        (('every = "30min"', 'every = "99999999d"'), "`schedule.every` is `99999999d`"),
        (("[schedule]", "[probe]\npause_s = inf\n[schedule]"), "`pause_s` is `inf`"),
        (("[schedule]", "[alarm]\nfalse_alarms_per_year = inf\n[schedule]"), "false_alarms"),
        (('"brook-int8"', '"a\\u001b[2Jb"'), "not printable"),
        (('"brook-int8"', '"' + 300 * "x" + '"'), "too long"),
        (('url = "http://127.0.0.1:8000"', ""), "provider[0]"),
        (("brook-int8", "brook"), "`here/brook` is there twice"),
        (('"here/brook"', '"there/brook"'), "`there/brook`, which is no series"),
        (("[schedule]", "[schedul]"), "schedul"),
        (("[schedule]", "[probe]\nconcurrency = [0]\n[schedule]"), "probe.concurrency"),
        (("[schedule]", "not toml ["), "track.toml"),
    ],
)
def test_bad(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, GOOD.replace(*change)))
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    more = 'prices = "p.toml"\n[probe]\ncanaries = "/c.txt"'
    config = read_config(write(tmp_path, GOOD.replace('"t.sqlite"', '"d/t.sqlite"\n' + more)))
    assert config.database == str(tmp_path / "d/t.sqlite")
    assert config.prices == str(tmp_path / "p.toml")
    assert config.probe.canaries == "/c.txt"
    url = "postgresql://me@host/x"
    assert read_config(write(tmp_path, GOOD.replace("t.sqlite", url))).database == url


def test_an_at_sign_in_a_path_is_no_password(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, GOOD.replace(":8000", ":8000/run/@cf")))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "missing.toml")


@given(st.integers(1, 10**6), st.integers(0, 2 * 10**9), st.integers(0, 10**6))
def test_interval_slots_do_not_depend_on_when_one_asks(every: int, after: int, later: int) -> None:
    slots = slots_of(Schedule(every=f"{every}s"))
    first = list(islice(slots(after), 3))
    assert [slot % every for slot in first] == [0, 0, 0]
    assert after < first[0] <= after + every
    assert next(slots(after + later)) == next(
        slot for slot in slots(max(after, after + later - 2 * every)) if slot > after + later
    )


def test_cron_slots() -> None:
    slots = slots_of(Schedule(cron="30 2 * * *", timezone="Europe/Berlin"))
    after = int(datetime(2026, 7, 1, tzinfo=UTC).timestamp())
    first = datetime.fromtimestamp(next(slots(after)), UTC)
    assert (first.hour, first.minute) == (0, 30)  # summer: two hours before UTC
    assert next(slots(next(slots(after)))) == next(slots(after)) + 86400


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
@pytest.mark.parametrize("cron", ["*/30 * * * *", "30 2 * * *", "5,35 0-4 * * *", "0 1,2,3 * * *"])
def test_restarts_find_the_same_slots_when_the_clocks_change(zone: str, cron: str) -> None:
    slots = slots_of(Schedule(cron=cron, timezone=zone))
    for month, day in ((3, 7), (3, 28), (4, 3), (10, 2), (10, 23), (10, 31)):
        found = list(islice(slots(int(datetime(2026, month, day, tzinfo=UTC).timestamp())), 40))
        assert found == sorted(set(found))
        assert [next(slots(slot)) for slot in found[:-1]] == found[1:]


def test_per_year() -> None:
    def found(after: int = 0, **told: str) -> float:
        return per_year(slots_of(Schedule(**told)), after)

    assert found(every="1d") == pytest.approx(365.25, rel=0.01)
    assert found(every="1s") == pytest.approx(365.25 * 86400, rel=0.01)
    assert found(cron="0 0 1 1 *") == pytest.approx(1, rel=0.01)
    assert found(cron="0 0 29 2 *") <= 1
    # One busy day of the year, asked in it and before it: slots are not spread evenly.
    begin = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    for after in (begin - 86400, begin + 12 * 3600, begin + 86390, begin + 100 * 86400):
        assert found(after, cron="*/5 * 1 1 *") == pytest.approx(288, abs=1)


def test_interval_units() -> None:
    assert [interval_s(text) for text in ("45s", "30min", "6h", "1d")] == [45, 1800, 21600, 86400]
