import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from simmerge.errors import WorkspaceError
from simmerge.ledger import SqlLedger, migrations, open_ledger
from simmerge.ledger.migrations import HEAD
from simmerge.ledger.schema import Base
from simmerge.testing.ledger_contract import SCORE, LedgerContract


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


class TestSqlite(LedgerContract):
    @pytest.fixture
    def ledger(self, file: Path) -> Iterator[SqlLedger]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with open_ledger(file) as opened:
            yield opened


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_migrations_make_what_the_models_say(file: Path) -> None:
    open_ledger(file).close()
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        made = sa.inspect(connection)
        for table in Base.metadata.sorted_tables:
            names = {c["name"] for c in made.get_unique_constraints(table.name)}
            expected = {c.name for c in table.constraints if isinstance(c, sa.UniqueConstraint)}
            assert names == expected
    engine.dispose()


def test_partial_indexes_of_the_migrations_equal_those_of_the_models(file: Path) -> None:
    """Alembic does not compare the conditions of indexes, on which 'once' depends."""
    open_ledger(file).close()
    plain = sa.create_engine("sqlite://")
    Base.metadata.create_all(plain)
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
    with plain.connect() as connection:
        models = [tuple(row) for row in connection.exec_driver_sql(query)]
    plain.dispose()
    migrated = sqlite3.connect(file)
    assert migrated.execute(query).fetchall() == models
    migrated.close()


def _at(file: Path, revision: str) -> None:
    """Make a ledger as the version of SimMerge with that newest revision made it."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_head_is_the_newest_revision() -> None:
    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_current_head() == HEAD


def test_a_ledger_of_an_older_version_is_migrated_and_keeps_what_it_holds(file: Path) -> None:
    _at(file, "0001")
    older = sqlite3.connect(file)
    assert older.execute("SELECT name FROM sqlite_master WHERE name = 'answers'").fetchall() == []
    older.execute("INSERT INTO tasks VALUES (1, 't', 'd', 'p', '{}', 1, 'now')")
    older.commit()
    older.close()
    with open_ledger(file) as ledger:
        assert [entry.name for entry in ledger.tasks()] == ["t"]
        ledger.put_answers("subject", "d", {"item": [1.0]}, settings="s")
        assert ledger.answers("subject", "d", settings="s") == {"item": [1.0]}


def test_settings_of_sqlite(file: Path) -> None:
    with open_ledger(file) as ledger, ledger._engine.connect() as connection:
        pragmas = ("journal_mode", "busy_timeout", "foreign_keys")
        assert [connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in pragmas] == ["wal", 30_000, 1]


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(file: Path) -> None:
    open_ledger(file).close()
    connection = sqlite3.connect(file)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    with pytest.raises(WorkspaceError, match=rf"'9999', made by a newer SimMerge; this one knows '{HEAD}'"):
        open_ledger(file)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    connection.close()


def test_a_file_that_is_no_database_is_refused(file: Path) -> None:
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(WorkspaceError, match="is damaged"):
        open_ledger(file)


def test_a_database_of_something_else_is_refused(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE customers (id INTEGER)")
    connection.close()
    with pytest.raises(WorkspaceError, match="'customers'"):
        open_ledger(file)


def test_a_url_without_its_driver_is_explained_and_keeps_its_password() -> None:
    with pytest.raises(WorkspaceError, match="cannot use ledger") as caught:
        open_ledger("nosuchdb://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_ledger_is_opened_by_url_too(file: Path) -> None:
    with open_ledger(f"sqlite:///{file}") as ledger:
        ledger.record_score("r", "v", SCORE)
    with open_ledger(file) as ledger:
        assert ledger.score("r", "v", "select") == SCORE


WRITER = """
import sys
from simmerge.ledger import open_ledger
from simmerge.testing.ledger_contract import SCORE
from simmerge.types import Score
with open_ledger(sys.argv[1]) as ledger:
    run = ledger.start_run("race", {"seed": 0})
    new = 0
    for n in range(15):
        new += ledger.record_score(f"r{n}", "v", SCORE)
        ledger.append_event(run.run_id, "step", [sys.argv[2], n])
print(run.run_id, new)
"""


def test_two_processes_make_and_fill_one_ledger(file: Path) -> None:
    processes = [start(WRITER, file, name) for name in ("one", "two")]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert told[0][0] == told[1][0]  # one run, shared
    assert int(told[0][1]) + int(told[1][1]) == 15  # each score was new to one of them
    with open_ledger(file) as ledger:
        events = ledger.events(told[0][0])
        assert [e.sequence for e in events] == list(range(30))
        for name in ("one", "two"):
            assert [e.payload[1] for e in events if e.payload[0] == name] == list(range(15))
        assert sorted(s.subject for s in ledger.scores()) == sorted(f"r{n}" for n in range(15))


ENDLESS = """
import sys
from simmerge.ledger import open_ledger
from simmerge.testing.ledger_contract import SCORE
ledger = open_ledger(sys.argv[1])
run = ledger.start_run("search", {"seed": 0})
n = 0
while True:
    ledger.record_score(f"r{n}", "v", SCORE)
    ledger.append_event(run.run_id, "step", n)
    print(n, flush=True)
    n += 1
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_loses_nothing_that_it_was_told_is_written(file: Path) -> None:
    process = start(ENDLESS, file)
    assert process.stdout is not None
    told = 0
    while told < 10:
        told = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    told = max([told, *(int(line) for line in rest.splitlines() if line.isdigit())])
    with open_ledger(file) as ledger:
        run = ledger.start_run("search", {"seed": 0})
        assert run.resumed
        assert [e.payload for e in ledger.events(run.run_id)][: told + 1] == list(range(told + 1))
        assert [s.score.value for s in ledger.scores()][: told + 1] == [SCORE.value] * (told + 1)
        assert not ledger.record_score("r0", "v", SCORE)  # repeating the run adds nothing


def test_rows_hold_plain_json(file: Path) -> None:
    with open_ledger(file) as ledger:
        ledger.record_score("r", "v", SCORE)
    connection = sqlite3.connect(file)
    [(stored,)] = connection.execute("SELECT per_item FROM scores")
    connection.close()
    assert json.loads(stored) == [["a", 1.0, 1.0, {"nll": 1.0}], ["é", 0.0, 3.0, {}]]
