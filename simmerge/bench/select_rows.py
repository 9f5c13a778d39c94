"""Training rows of the recorded families."""

from collections.abc import Sequence

from simmerge.data import shipped
from simmerge.errors import UnknownNameError, UsageError
from simmerge.features.candidates import feature_names
from simmerge.pipeline.recorded import joined, read_rows
from simmerge.surrogate.rows import TrainingRows

FAMILIES = ("mini", "small", "medium", "135m")
"""Recorded families, from the smallest models to the largest."""


def rows_of(families: Sequence[str]) -> TrainingRows:
    """Rows of one family, or of several under the names 'family/name'.

    Raises:
        UnknownNameError: a family that there is not.
        UsageError: no family, or one twice.
        SurrogateError: its table is not there, or was made with other features.
    """
    for name in families:
        if name not in FAMILIES:
            raise UnknownNameError("family", name, FAMILIES)
    if not families or len({*families}) != len(families):
        raise UsageError(f"families must be named once each, got {', '.join(families) or 'none'}")
    made = {name: read_rows(shipped("scores", f"{name}.rows.parquet"), feature_names()) for name in families}
    return joined(made) if len(made) > 1 else made[families[0]]
