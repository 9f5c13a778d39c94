"""A team's own table of past merges as training rows: any CSV or Parquet file, its columns named by the caller."""

# pyright: basic
# pyarrow ships no types.

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from simmerge.errors import UnknownNameError, UsageError
from simmerge.surrogate.rows import Floats, TrainingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What is what in a table with one row per merge.

    Attributes:
        features: numeric columns that are known before a merge is made; patterns such as `cos_*` too.
        operator: column that names the merge's operator.
        targets: one column per task, higher is better; an empty cell was not measured.
        groups: columns that name the checkpoints that were merged, or whatever else shall be held out together;
            a cell may be a list of names.
    """

    features: tuple[str, ...]
    operator: str
    targets: tuple[str, ...]
    groups: tuple[str, ...]


def read_past_merges(path: Path, columns: Columns) -> TrainingRows:
    """Rows for the surrogate: one per merge and task that was measured.

    Each task's scores are divided by their standard deviation, so that tasks weigh the same whatever their unit; the
    mean is taken off. Beside the named features every operator has a column `operator=NAME` that is 0 or 1. A
    problem is a set of checkpoints: rows with the same groups are alternatives to one another.

    Raises:
        UsageError: a file that cannot be read, a column that holds what it may not, nothing measured.
        UnknownNameError: a column that the file does not have.
    """
    table = _read(path)
    wanted = _expanded(columns.features, table, path)
    for name in (columns.operator, *columns.targets, *columns.groups):
        _require(name, table, path)
    _disjoint(wanted, columns)
    operators = _texts(table, columns.operator, path)
    kinds = list(dict.fromkeys(operators))
    numbers = np.stack([_numbers(table, name, path) for name in wanted], axis=1)
    onehot = np.array([[float(own == kind) for kind in kinds] for own in operators])
    features = np.concatenate([numbers, onehot], axis=1)
    sources = _groups(table, columns.groups, path)
    rows: list[int] = []
    tasks: list[str] = []
    targets: list[float] = []
    for task in columns.targets:
        scores = _numbers(table, task, path)
        measured = np.flatnonzero(~np.isnan(scores))
        if not len(measured):
            raise UsageError(f"column '{task}' of '{path}' has no number in any row; name a column with scores")
        rows += measured.tolist()
        tasks += [task] * len(measured)
        targets += _standardised(scores[measured]).tolist()
    return TrainingRows(
        features=features[rows],
        names=(*wanted, *(f"operator={kind}" for kind in kinds)),
        target=np.array(targets),
        weight=np.ones(len(rows)),
        recipe=tuple(f"row {row + 1}" for row in rows),
        task=tuple(tasks),
        sources=tuple(sources[row] for row in rows),
        operator=tuple(operators[row] for row in rows),
        form=tuple(operators[row] for row in rows),
    )


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise UsageError(f"'{path}' is no file; give a CSV or Parquet table of past merges")
    try:
        if path.suffix.lower() == ".csv":
            return csv.read_csv(path)
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(
            f"'{path}' cannot be read as {'CSV' if path.suffix.lower() == '.csv' else 'Parquet'}: "
            f"{str(error).splitlines()[0][:200]}; give a CSV file that ends in .csv, or a Parquet file"
        ) from error


def _require(name: str, table: pa.Table, path: Path) -> None:
    if name not in table.column_names:
        raise UnknownNameError("column", name, table.column_names, hint=f"These are the columns of '{path}'.")


def _expanded(patterns: Sequence[str], table: pa.Table, path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in table.column_names if name == pattern or fnmatchcase(name, pattern)]
        if not hits:
            raise UnknownNameError("column", pattern, table.column_names, hint=f"These are the columns of '{path}'.")
        found += hits
    return tuple(dict.fromkeys(found))


def _disjoint(features: Sequence[str], columns: Columns) -> None:
    for name in features:
        if name in (columns.operator, *columns.targets, *columns.groups):
            other = "a target" if name in columns.targets else "the operator or a group"
            raise UsageError(
                f"column '{name}' is a feature and {other} too; a feature is a number that is known before the "
                "merge is made: leave it out of --features"
            )


def _texts(table: pa.Table, name: str, path: Path) -> list[str]:
    values = table.column(name).to_pylist()
    for row, value in enumerate(values, 1):
        if value is None or value == "":
            raise UsageError(f"column '{name}' of '{path}' is empty in row {row}; every merge has one: fill it in")
    return [str(value) for value in values]


def _numbers(table: pa.Table, name: str, path: Path) -> Floats:
    column: Any = table.column(name)
    try:
        values = np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UsageError(
            f"column '{name}' of '{path}' holds {column.type}, not numbers; encode it as numbers or leave it out"
        ) from None
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise UsageError(
            f"column '{name}' of '{path}' is infinite in row {infinite[0] + 1}; leave the cell empty if it is unknown"
        )
    return values


def _groups(table: pa.Table, names: Sequence[str], path: Path) -> list[tuple[str, ...]]:
    columns = [table.column(name).to_pylist() for name in names]
    found: list[tuple[str, ...]] = []
    for row in range(table.num_rows):
        own: list[str] = []
        for column in columns:
            cell = column[row]
            own += [str(part) for part in (cell if isinstance(cell, list) else [cell]) if part not in (None, "")]
        if not own:
            raise UsageError(
                f"row {row + 1} of '{path}' has no name in {', '.join(names)}; "
                "name the checkpoints that were merged, so that they can be held out"
            )
        found.append(tuple(own))
    return found


def _standardised(scores: Floats) -> Floats:
    spread = float(scores.std())
    return (scores - scores.mean()) / (spread if spread > 0 else 1.0)
