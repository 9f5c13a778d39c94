"""Migrations of the ledger, run in code when a ledger is opened (`simmerge.ledger.database`).

A new one is a file in `versions` with `revision` and `down_revision`; then set `HEAD` below.
"""

HEAD = "0002"
"""Revision that this version of SimMerge reads and writes."""
