"""Answers by item, kept while an evaluation is not finished."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "answers",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("task_digest", sa.String(128), nullable=False),
        sa.Column("settings_digest", sa.String(64), nullable=False),
        sa.Column("item", sa.Text(), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.UniqueConstraint(
            "subject",
            "task_digest",
            "settings_digest",
            "item",
            name="uq_answers_subject_task_digest_settings_digest_item",
        ),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("answers")
