"""Opening a database and bringing its tables up to date. Knows no table but its own.

A component (such as `track`) owns its tables and a list of migrations, each a function that changes
them; the number of those that were applied is kept in `penstock_schema`. Invariant: a migration is
applied once, whole or not at all, however many processes start at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.errors import ConfigError

Migration = Callable[[sa.Connection], None]

BUSY_TIMEOUT_S = 30  # how long a writer waits for another one, in SQLite
_LOCK = 0x70656E73  # of PostgreSQL's advisory locks: ours while we migrate
_READS = "penstock_reads"  # option of a connection that does not write

_METADATA = sa.MetaData()
_SCHEMA = sa.Table(
    "penstock_schema",
    _METADATA,
    sa.Column("component", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


def open_database(url: str, *, create: bool = True) -> sa.Engine:
    """Connect to a database.

    Args:
        url: a path (SQLite), or a URL of SQLAlchemy such as `postgresql://user@host/name`.
        create: make the file of SQLite if it is not there; never its directory.

    Raises:
        ConfigError: it cannot be opened, or is not there; the message holds no password.
    """
    address = _address(url)
    _check_file(address, create)
    engine = sa.create_engine(address, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    try:
        engine.connect().close()
    except sa.exc.DBAPIError as error:
        cause = str(error.orig).strip().splitlines()[0]
        shown = address.set(query={}).render_as_string(hide_password=True)
        raise ConfigError(f"The database `{shown}` cannot be opened: {cause}.") from None
    return engine


def _check_file(address: sa.URL, create: bool) -> None:
    """Whether the file of SQLite is there, or can be made: SQLite itself says neither."""
    path = address.database
    if address.get_backend_name() != "sqlite" or path in (None, "", ":memory:"):
        return
    assert path is not None
    if path.startswith("file:"):
        return  # a URI of SQLite, which has its own modes
    if not create and not Path(path).exists():
        raise ConfigError(f"There is no database `{path}`.")
    if not Path(path).parent.is_dir():
        raise ConfigError(
            f"The database `{path}` cannot be made: its directory is not there.",
            hint=f"mkdir -p {Path(path).parent}",
        )


def holds(engine: sa.Engine, component: str) -> bool:
    """Whether a component has tables in the database."""
    with reading(engine) as connection:
        if not sa.inspect(connection).has_table(_SCHEMA.name):
            return False
        query = sa.select(_SCHEMA.c.version).where(_SCHEMA.c.component == component)
        return connection.scalar(query) is not None


def _address(url: str) -> sa.URL:
    """A path or a URL as SQLAlchemy has it. No message repeats the URL: it may hold a password."""
    if "://" not in url:
        return sa.URL.create("sqlite", database=url)
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError(
            "The database's URL cannot be read.", hint="a path, or postgresql://user@host/name"
        ) from None
    if "@" in (address.host or ""):
        raise ConfigError(
            "The database's URL has more than one `@`.", hint="write %40 in a user or a password"
        )
    if address.drivername in ("postgres", "postgresql"):
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigError(
            f"`{address.drivername}` is no database that penstock writes to.",
            hint="SQLite (a path) or PostgreSQL (postgresql://user@host/name)",
        )
    return address


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that only reads: it sees one state of the database, and nobody waits for it."""
    options: dict[str, Any] = {_READS: True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect() as connection:
        yield connection.execution_options(**options)


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin when we say so
    for setting in (
        "journal_mode=WAL",  # who reads does not wait for who writes
        "synchronous=FULL",  # what was committed survives a power cut
        f"busy_timeout={BUSY_TIMEOUT_S * 1000}",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later would fail at once if another one wrote.
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def migrate(engine: sa.Engine, component: str, migrations: Sequence[Migration]) -> None:
    """Apply those of a component's migrations that were not applied yet.

    Raises:
        ConfigError: the database was written by a later version of penstock.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        _METADATA.create_all(connection)
        mine = _SCHEMA.c.component == component
        version = connection.scalar(sa.select(_SCHEMA.c.version).where(mine))
        if version is None:
            version = 0
            connection.execute(sa.insert(_SCHEMA).values(component=component, version=0))
        if version > len(migrations):
            raise ConfigError(
                f"The tables of `{component}` are of version `{version}`; this penstock knows "
                f"`{len(migrations)}`.",
                hint="update penstock",
            )
        for migration in migrations[version:]:
            migration(connection)
        connection.execute(sa.update(_SCHEMA).where(mine).values(version=len(migrations)))
