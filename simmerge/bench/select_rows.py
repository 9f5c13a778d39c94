"""Training rows of the recorded families, from their files or, for the shipped catalogue, from its checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path

from simmerge.data import shipped
from simmerge.demo import FOREIGN
from simmerge.demo.materialize import materialize_tasks
from simmerge.errors import UnknownNameError, UsageError
from simmerge.features.candidates import feature_names
from simmerge.pipeline.predicting import rows_of_table
from simmerge.pipeline.project import Project
from simmerge.pipeline.recorded import joined, read_rows
from simmerge.pipeline.table import read_table
from simmerge.surrogate.rows import TrainingRows

FAMILIES = ("mini", "small", "medium", "135m")
"""Recorded families, from the smallest models to the largest."""


def rows_of(workspace: Path, families: Sequence[str]) -> TrainingRows:
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
    made = {name: _one(workspace, name) for name in families}
    return joined(made) if len(made) > 1 else made[families[0]]


def _one(workspace: Path, family: str) -> TrainingRows:
    if family == "mini":
        return _shipped_rows(workspace)
    return read_rows(shipped("scores", f"{family}.rows.parquet"), feature_names())


def _shipped_rows(workspace: Path) -> TrainingRows:
    facts = json.loads(shipped("catalog", "catalog.json").read_text())
    table = read_table(shipped("scores", "mini.parquet"))
    with Project(workspace / "select") as project:
        project.add_tasks(materialize_tasks(shipped("tasks"), project.workspace.root / "tasks"))
        for name, base in facts["checkpoints"].items():
            if name != FOREIGN:
                project.add_checkpoint(shipped("catalog", name), name=name, base=base)
        names = [n for n in facts["checkpoints"] if n not in (facts["base"], FOREIGN)]
        return rows_of_table(project, table, project.probes(), names)
