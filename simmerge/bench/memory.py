"""`simmerge bench memory`: merges per second into a live model, against writing and loading a folder for each.

The sources are read once and a candidate changes coefficients only, as in a search. Both ways run in this
process, so that no start of an interpreter and no import counts for or against either.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from simmerge.bench.checkpoints import INPUTS, checkpoints
from simmerge.bench.result import Target, report
from simmerge.checkpoint import open_checkpoint
from simmerge.data import shipped
from simmerge.errors import RangeError, SimMergeError
from simmerge.merge.engine import Extra, no_extra
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Source, Sources
from simmerge.merge.statistics import fisher_statistics, gram_statistics
from simmerge.operators import OPERATORS, Coefficient, OperatorSpec
from simmerge.operators.table import operator
from simmerge.pipeline.models import load_model
from simmerge.recipe import Recipe, Value, step
from simmerge.rng import rng_for

TARGET = 50.0
"""Fewest candidates in memory in the time of one by folder."""
CATALOG = ("german", "code", "french")
"""The shipped checkpoints that stand for the inputs."""
QUICK = ("linear", "slerp", "ties")
_WEIGHTS = (0.2, 0.8)  # between which weights are drawn

_TEXTS = (
    "The mean of two checkpoints is a checkpoint, and often a good one.",
    "What a layer is given decides which of its weights matter.",
)

_MODELS: Any = transformers.AutoModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operator on one family of checkpoints.

    Attributes:
        memory_seconds: median seconds of a candidate in memory, after the first.
        first_seconds: seconds of the first candidate, which also measures the tensors.
        folder_seconds: median seconds of a candidate that is written and loaded.
        candidates_per_second: 1 / `memory_seconds`.
        ratio: `folder_seconds / memory_seconds`.
        varied: what differs between candidates: 'coefficients', or 'inputs' of operators that have none.
        error: why it could not be measured; the rest then means nothing.
    """

    memory_seconds: float = 0.0
    first_seconds: float = 0.0
    folder_seconds: float = 0.0
    candidates_per_second: float = 0.0
    ratio: float = 0.0
    varied: str = "coefficients"
    error: str | None = None


def run(
    workspace: Path,
    *,
    operators: Sequence[str] | None = None,
    candidates: int = 20,
    folders: int = 3,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time every operator in memory and by folder, on the shipped catalogue and on a Llama of 15M parameters.

    Args:
        workspace: folder that keeps the drawn checkpoints between runs.
        operators: which to run; None for all built-in ones, or three with `quick`.
        candidates: candidates in memory per operator, at least 1, after a first one that is not counted.
        folders: candidates by folder per operator, at least 1.
        quick: the shipped catalogue, two candidates and one folder: checks that the bench works; no target.
        progress: called with family and operator before each is run.

    Returns:
        Figures and targets (`simmerge.bench.result.report`).

    Raises:
        UnknownNameError: no such operator.
        RangeError: `candidates` or `folders` below 1.
        WorkspaceError: the disk is full.
    """
    if candidates < 1 or folders < 1:
        raise RangeError(f"candidates and folders must be at least 1, got {candidates} and {folders}")
    specs = [operator(name) for name in operators or (QUICK if quick else tuple(OPERATORS))]
    candidates, folders = (2, 1) if quick else (candidates, folders)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    families = {"catalog": {n: shipped("catalog", s) for n, s in zip(INPUTS, CATALOG, strict=True)}}
    families["catalog"]["base"] = shipped("catalog", "base")
    if not quick:
        families["llama-15m"] = checkpoints(workspace / "checkpoints", "15m")
    workspace.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    targets: list[Target] = []
    for family, paths in families.items():
        figures[family] = {"parameters": open_checkpoint(paths["base"]).parameters, "operators": {}}
        for spec in specs:
            if progress is not None:
                progress(f"{family} {spec.name}")
            row = _measured(spec, paths, workspace, candidates, folders)
            figures[family]["operators"][spec.name] = asdict(row)
            targets += [] if quick else _targets(family, spec.name, row)
    chosen = "".join(f" --operator {name}" for name in operators or ())
    counts = " --quick" if quick else f" --candidates {candidates} --folders {folders}"
    threads = torch.get_num_threads()
    return report({"families": figures, "threads": threads}, targets, f"simmerge bench memory{counts}{chosen}")


def recipes_of(spec: OperatorSpec, count: int) -> tuple[list[Recipe], str]:
    """Different candidates of one operator, the same in every run.

    Coefficients that a search varies (weights, and those with levels) are drawn; where there are none of these,
    every other one between half and twice its default. Where an operator has no such coefficient at all, the
    ordered inputs differ instead, and there are as many candidates as orders: at most `count` of them.

    Args:
        spec: the operator.
        count: how many are wanted.

    Returns:
        The recipes, and 'coefficients' or 'inputs'.
    """
    searched = [c for c in spec.coefficients if c.levels or c.name == "weight"]
    # A default above 1 is a count (of iterations), not a size.
    varied = searched or [c for c in spec.coefficients if 0 < c.default <= 1]
    size = len(INPUTS) if spec.max_inputs is None else min(spec.max_inputs, len(INPUTS))
    base = "base" if spec.needs_base else None
    if not varied:
        sizes = range(size, min(size, max(spec.min_inputs, 2)) - 1, -1)
        orders = [order for length in sizes for order in permutations(INPUTS, length)]
        return [Recipe(root=step(spec.name, order, base)) for order in orders[:count]], "inputs"
    made: list[Recipe] = []
    for k in range(count):
        values: dict[str, Value] = {}
        for coefficient in varied:
            low, high = _range(coefficient)
            draws = rng_for(0, "bench memory", spec.name, coefficient.name, str(k))
            drawn = tuple(float(v) for v in draws.uniform(low, high, size if coefficient.per_input else 1))
            values[coefficient.name] = drawn if coefficient.per_input else drawn[0]
        made.append(Recipe(root=step(spec.name, INPUTS[:size], base, values)))
    return made, "coefficients"


def _range(coefficient: Coefficient) -> tuple[float, float]:
    """Between which values a coefficient is drawn."""
    if coefficient.name == "weight":
        return _WEIGHTS
    if coefficient.levels:
        return min(coefficient.levels), max(coefficient.levels)
    return max(coefficient.low, coefficient.default / 2), min(coefficient.high, 2 * coefficient.default)


def _measured(spec: OperatorSpec, paths: Mapping[str, Path], workspace: Path, candidates: int, folders: int) -> Row:
    recipes, varied = recipes_of(spec, candidates + 1)
    extra = extra_of(spec, paths)
    opened = {n: Source(name=n, checkpoint=open_checkpoint(p), digest=f"bench-{n}") for n, p in paths.items()}
    try:
        with Sources(opened) as sources:
            sources.extra = extra
            merger, model = MemoryMerger(sources), _loaded(paths["base"])
            first = _seconds(lambda: _into(merger, recipes[0], model))
            each = [_seconds(lambda r=r: _into(merger, r, model)) for r in recipes[1:]]
            with tempfile.TemporaryDirectory(dir=workspace, prefix="merges-") as scratch:
                written = [
                    _seconds(lambda k=k: _by_folder(recipes[k], sources, Path(scratch) / str(k)))
                    for k in range(min(folders, len(recipes)))
                ]
    except SimMergeError as error:
        return Row(varied=varied, error=str(error))
    in_memory, by_folder = median(each), median(written)
    return Row(
        memory_seconds=in_memory,
        first_seconds=first,
        folder_seconds=by_folder,
        candidates_per_second=1 / in_memory,
        ratio=by_folder / in_memory,
        varied=varied,
    )


def extra_of(spec: OperatorSpec, paths: Mapping[str, Path]) -> Extra:
    """What an operator reads beside the weights, measured on a few texts; no part of any time.

    Args:
        spec: the operator.
        paths: folder by checkpoint name, each of `INPUTS` among them.
    """
    if not spec.needs:
        return no_extra
    held: dict[str, Mapping[str, torch.Tensor]] = {}
    for name in INPUTS:
        model, tokenizer = load_model(str(paths[name]))
        stored = tuple(open_checkpoint(paths[name]).tensors)
        measure = gram_statistics if spec.needs == "gram" else fisher_statistics
        held[name] = measure(model, tokenizer, _TEXTS, stored=stored)
    return lambda _kind, checkpoint, tensor: held[checkpoint].get(tensor)


def _into(merger: MemoryMerger, recipe: Recipe, model: Any) -> None:
    """Make a candidate in a live model: the one place that knows the call."""
    merger.load(recipe, model)


def _by_folder(recipe: Recipe, sources: Sources, out: Path) -> None:
    """Make a candidate as a folder and load it."""
    merge_to_folder(recipe, sources, out)
    _loaded(out)


def _loaded(folder: Path) -> Any:
    # In the stored dtype: the faster way, and the one that keeps what was saved.
    return _MODELS.from_pretrained(
        str(folder), dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _targets(family: str, name: str, row: Row) -> list[Target]:
    """The promise for one operator; it is about new coefficients, so operators that have none are timed only."""
    if row.error is not None:
        return [Target(name=f"{family}, {name}: failures", value=1.0, target="<= 0", holds=False)]
    title = f"{family}, {name}: candidates in memory in the time of one by folder"
    bar = Target(name=title, value=row.ratio, target=f">= {TARGET:g}", holds=row.ratio >= TARGET)
    return [bar] if row.varied == "coefficients" else []
