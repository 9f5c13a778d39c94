"""The ledger's database: connecting, migrating, and saying in words what went wrong with it."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, make_url

from simmerge.errors import WorkspaceError
from simmerge.files import free_bytes
from simmerge.ledger.migrations import HEAD

BUSY_SECONDS = 30.0
"""How long a writer waits for another process that is writing."""

_SCRIPTS = Path(__file__).parent / "migrations"


def connect(where: str | Path) -> Engine:
    """An engine for a path (SQLite) or for any URL of SQLAlchemy, migrated to `HEAD`.

    Raises:
        WorkspaceError: the database cannot be opened, is damaged, or was made by a newer version.
    """
    url = make_url(where) if isinstance(where, str) and "://" in where else sa.URL.create("sqlite", database=str(where))
    shown = url.render_as_string(hide_password=True)
    with guard(shown):
        engine = sa.create_engine(url, json_serializer=_json)
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine)
        try:
            _migrate(engine, shown)
        except BaseException:
            engine.dispose()
            raise
    return engine


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def writing(engine: Engine) -> Engine:
    """The same engine, whose transactions take SQLite's write lock when they begin.

    A transaction that reads first and writes later would fail at once, without waiting, if another
    process had written in between.
    """
    return engine.execution_options(simmerge_begin="IMMEDIATE")


@contextlib.contextmanager
def guard(shown: str) -> Generator[None]:
    """Turn failures of the database into WorkspaceError with the next step."""
    try:
        yield
    except (exc.OperationalError, exc.DatabaseError, sqlite3.DatabaseError) as error:
        if isinstance(error, exc.IntegrityError):
            raise
        text = str(getattr(error, "orig", None) or error)
        raise WorkspaceError(_explain(shown, text)) from error
    except (exc.ArgumentError, exc.NoSuchModuleError, ModuleNotFoundError) as error:
        raise WorkspaceError(
            f"cannot use ledger '{shown}': {error}. Give a path, or a URL with its driver installed"
        ) from error


def _explain(shown: str, text: str) -> str:
    if "locked" in text:
        return (
            f"ledger '{shown}' was locked by another process for {BUSY_SECONDS:.0f} seconds; "
            "wait for it to end, or end it, and run the same command again"
        )
    if "full" in text:
        file = shown.removeprefix("sqlite:///")
        return f"disk full: ledger '{shown}', free {free_bytes(file)} bytes; free some space and run again"
    if "not a database" in text or "malformed" in text:
        return f"ledger '{shown}' is damaged ({text}); restore it from a copy, or choose another workspace"
    return f"ledger '{shown}' cannot be used: {text}"


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _(connection: sqlite3.Connection, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # the driver's own BEGIN comes too late; ours is below
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        _write_ahead(connection)
        # What is committed survives the death of every process. A power cut may take the last few
        # commits (never a part of one), and a run that is resumed measures them again; FULL would wait for
        # the disk at every score, which took 0.5 s on a busy one.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        mode = connection.get_execution_options().get("simmerge_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    # SQLite does not wait for the busy timeout when two processes switch a new file at the same time.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _migrate(engine: Engine, shown: str) -> None:
    with engine.connect() as connection:
        found = _revision(connection)
    if found == HEAD:
        return
    with writing(engine).begin() as connection:
        found = _revision(connection)  # again, now that no other process can migrate
        if found == HEAD:
            return
        _upgrade(connection, found, shown)


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: Connection, found: str | None, shown: str) -> None:
    from alembic import command  # takes a tenth of a second, and only a new or an old ledger needs it
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if found is not None and found not in known:
        raise WorkspaceError(
            f"ledger '{shown}' has revision '{found}', made by a newer SimMerge; this one knows '{HEAD}'. "
            "Install the newer SimMerge, or choose another workspace"
        )
    tables = sa.inspect(connection).get_table_names()
    if found is None and tables:
        raise WorkspaceError(
            f"'{shown}' is a database of something else: it has table '{sorted(tables)[0]}', no revision. "
            "Choose another path or URL; nothing was written"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
