"""Tables of the ledger. A change here needs a migration in `simmerge/ledger/migrations/versions`."""

from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Named constraints, so that a migration can name what it drops, on every database alike.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Root of the tables."""

    metadata = MetaData(naming_convention=_NAMES)


class CheckpointRow(Base):
    """One checkpoint; a removed one keeps its row, and its name may be given again."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        Index(
            "uq_checkpoints_name_present",
            "name",
            unique=True,
            sqlite_where=text("removed_at IS NULL"),
            postgresql_where=text("removed_at IS NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    digest: Mapped[str] = mapped_column(String(128))
    tokenizer_digest: Mapped[str] = mapped_column(String(128))
    path: Mapped[str] = mapped_column(Text)
    base: Mapped[str | None] = mapped_column(String(255))
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    added_at: Mapped[str] = mapped_column(String(40))
    removed_at: Mapped[str | None] = mapped_column(String(40))


class TaskRow(Base):
    """One version of a task; `current` counts up with every call that names it."""

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("name", "digest"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    digest: Mapped[str] = mapped_column(String(128))
    path: Mapped[str] = mapped_column(Text)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    current: Mapped[int] = mapped_column(Integer)
    added_at: Mapped[str] = mapped_column(String(40))


class RecipeRow(Base):
    """One recipe."""

    __tablename__ = "recipes"

    recipe_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    canonical: Mapped[str] = mapped_column(Text)
    added_at: Mapped[str] = mapped_column(String(40))


class ScoreRow(Base):
    """One score, at most once for what it is the score of."""

    __tablename__ = "scores"
    __table_args__ = (UniqueConstraint("subject", "task_digest", "split", "settings_digest"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    subject: Mapped[str] = mapped_column(String(128))
    task: Mapped[str] = mapped_column(String(255), index=True)
    task_digest: Mapped[str] = mapped_column(String(128))
    split: Mapped[str] = mapped_column(String(64))
    settings_digest: Mapped[str] = mapped_column(String(64))
    value: Mapped[float] = mapped_column(Float(53))
    stderr: Mapped[float] = mapped_column(Float(53))
    items: Mapped[int] = mapped_column(Integer)
    seconds: Mapped[float] = mapped_column(Float(53))
    extra: Mapped[dict[str, float]] = mapped_column(JSON)
    per_item: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True), deferred=True)
    rung: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[str] = mapped_column(String(40))


class AnswerRow(Base):
    """What one model answered to one item, until the score that it is a part of is recorded."""

    __tablename__ = "answers"
    __table_args__ = (UniqueConstraint("subject", "task_digest", "settings_digest", "item"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    subject: Mapped[str] = mapped_column(String(128))
    task_digest: Mapped[str] = mapped_column(String(128))
    settings_digest: Mapped[str] = mapped_column(String(64))
    item: Mapped[str] = mapped_column(Text)
    value: Mapped[Any] = mapped_column(JSON)


class RunRow(Base):
    """One run; at most one of a kind and of equal parameters is unfinished."""

    __tablename__ = "runs"
    __table_args__ = (
        Index(
            "uq_runs_unfinished",
            "kind",
            "parameters_digest",
            unique=True,
            sqlite_where=text("status = 'running'"),
            postgresql_where=text("status = 'running'"),
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(64))
    parameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    parameters_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[str] = mapped_column(String(40))
    finished_at: Mapped[str | None] = mapped_column(String(40))


class EventRow(Base):
    """One event of a run."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("run_id", "sequence"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    sequence: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(64))
    payload: Mapped[Any] = mapped_column(JSON)
    created_at: Mapped[str] = mapped_column(String(40))
