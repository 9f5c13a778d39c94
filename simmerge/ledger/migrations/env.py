"""Alembic's entry: migrates the connection that `simmerge.ledger.database` hands over."""

from alembic import context

from simmerge.ledger.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
