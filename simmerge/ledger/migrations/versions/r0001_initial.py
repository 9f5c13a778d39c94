"""Checkpoints, tasks, recipes, scores, runs and events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the six tables."""
    _catalog_tables()
    op.create_table(
        "scores",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("task_digest", sa.String(128), nullable=False),
        sa.Column("split", sa.String(64), nullable=False),
        sa.Column("settings_digest", sa.String(64), nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("stderr", sa.Float(53), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("extra", sa.JSON(), nullable=False),
        sa.Column("per_item", sa.JSON(), nullable=True),
        sa.Column("rung", sa.String(64), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.UniqueConstraint(
            "subject",
            "task_digest",
            "split",
            "settings_digest",
            name="uq_scores_subject_task_digest_split_settings_digest",
        ),
    )
    op.create_index("ix_scores_task", "scores", ["task"])
    _run_tables()


def _catalog_tables() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("tokenizer_digest", sa.String(128), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("base", sa.String(255), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("added_at", sa.String(40), nullable=False),
        sa.Column("removed_at", sa.String(40), nullable=True),
    )
    op.create_index(
        "uq_checkpoints_name_present",
        "checkpoints",
        ["name"],
        unique=True,
        sqlite_where=sa.text("removed_at IS NULL"),
        postgresql_where=sa.text("removed_at IS NULL"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("current", sa.Integer(), nullable=False),
        sa.Column("added_at", sa.String(40), nullable=False),
        sa.UniqueConstraint("name", "digest", name="uq_tasks_name_digest"),
    )
    op.create_table(
        "recipes",
        sa.Column("recipe_id", sa.String(64), primary_key=True),
        sa.Column("canonical", sa.Text(), nullable=False),
        sa.Column("added_at", sa.String(40), nullable=False),
    )


def _run_tables() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("parameters_digest", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started_at", sa.String(40), nullable=False),
        sa.Column("finished_at", sa.String(40), nullable=True),
        sa.UniqueConstraint("run_id", name="uq_runs_run_id"),
    )
    op.create_index(
        "uq_runs_unfinished",
        "runs",
        ["kind", "parameters_digest"],
        unique=True,
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_events_run_id"),
        sa.UniqueConstraint("run_id", "sequence", name="uq_events_run_id_sequence"),
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("events", "runs", "scores", "recipes", "tasks", "checkpoints"):
        op.drop_table(table)
