"""Opening and migrating, on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from penstock.errors import ConfigError
from penstock.storage.database import Migration, holds, migrate, open_database, reading


def make(connection: sa.Connection) -> None:
    connection.execute(sa.text("CREATE TABLE things (name VARCHAR(20) PRIMARY KEY)"))


def add(connection: sa.Connection) -> None:
    connection.execute(sa.text("INSERT INTO things VALUES ('one')"))


def fail(connection: sa.Connection) -> None:
    connection.execute(sa.text("INSERT INTO things VALUES ('two')"))
    raise RuntimeError("half way")


def names(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT name FROM things ORDER BY name")))


def test_migrations_are_applied_once_and_whole(database_url: str) -> None:
    engine = open_database(database_url)
    migrate(engine, "shop", [make])
    migrate(engine, "shop", [make, add])
    migrate(engine, "shop", [make, add])
    assert names(engine) == ["one"]
    with pytest.raises(RuntimeError, match="half way"):
        migrate(engine, "shop", [make, add, fail])
    assert names(engine) == ["one"]
    migrate(engine, "other", [add_two])
    assert names(engine) == ["one", "two"]
    with pytest.raises(ConfigError, match="version `2`"):
        migrate(engine, "shop", [make])
    engine.dispose()


def add_two(connection: sa.Connection) -> None:
    connection.execute(sa.text("INSERT INTO things VALUES ('two')"))


def test_many_start_at_once(database_url: str) -> None:
    failures: list[BaseException] = []
    steps: list[Migration] = [make, add]

    def start() -> None:
        try:
            engine = open_database(database_url)
            migrate(engine, "shop", steps)
            engine.dispose()
        except BaseException as error:  # noqa: BLE001  # the test asserts that there is none
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    engine = open_database(database_url)
    assert names(engine) == ["one"]
    engine.dispose()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for url, message in (
        ("mysql://root:secret@127.0.0.1/x", "`mysql` is no database"),
        ("postgresql://me:secret@127.0.0.1:1/x", "cannot be opened"),
        ("postgresql://me@127.0.0.1:1/x?password=secret", "cannot be opened"),
        ("postgresql://me:secret@host:port/x", "cannot be read"),
        ("postgresql://me:not@secret@127.0.0.1:1/x", "more than one `@`"),
        ("postgresql+asyncpg://me:secret@127.0.0.1/x", "`postgresql\\+asyncpg` is no database"),
        ("no scheme://", "cannot be read"),
        (str(tmp_path), "cannot be opened"),
        (str(tmp_path / "file" / "x.sqlite"), "cannot be made"),
        (str(tmp_path / "file"), "not a database"),
    ):
        (tmp_path / "file").write_bytes(b"this is no database" * 99)
        with pytest.raises(ConfigError, match=message) as caught:
            open_database(url)
        assert "secret" not in str(caught.value)


def test_a_path_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "50%20 of?what#is.sqlite"
    with pytest.raises(ConfigError, match="its directory is not there"):
        open_database(str(path))
    assert not path.parent.exists(), "a directory that was mistyped is not made"
    path.parent.mkdir()
    with pytest.raises(ConfigError, match="There is no database"):
        open_database(str(path), create=False)
    open_database(str(path)).dispose()
    assert path.is_file()
    engine = open_database(str(path), create=False)
    assert not holds(engine, "shop")
    migrate(engine, "shop", [make])
    assert holds(engine, "shop")
    engine.dispose()


def test_who_reads_sees_one_state_and_stops_nobody(database_url: str) -> None:
    engine = open_database(database_url)
    migrate(engine, "shop", [make, add])
    query = sa.text("SELECT name FROM things ORDER BY name")
    with reading(engine) as reader:
        assert list(reader.scalars(query)) == ["one"]
        migrate(engine, "other", [add_two])  # writes, while that one reads
        assert list(reader.scalars(query)) == ["one"]
    assert names(engine) == ["one", "two"]
    engine.dispose()
