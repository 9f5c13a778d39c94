"""The built-in operators, a literal table; plug-ins add theirs by the entry point group `simmerge.operators`."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType

from simmerge.errors import UnknownNameError, UsageError
from simmerge.operators.spec import Coefficient, OperatorSpec, Option

_KERNELS = "simmerge.operators.kernels"
_NORMALIZE = "divide by the sum of the weights (that take part)"


def _weight(levels: tuple[float, ...] = ()) -> Coefficient:
    return Coefficient(
        name="weight",
        low=-2.0,
        high=2.0,
        default=1.0,
        per_input=True,
        levels=levels,
        help="share of each input",
    )


def _lambda(levels: tuple[float, ...]) -> Coefficient:
    return Coefficient(
        name="lambda", low=0.0, high=3.0, default=1.0, levels=levels, help="scale of the merged task vector"
    )


def _density(default: float, levels: tuple[float, ...]) -> Coefficient:
    return Coefficient(
        name="density", low=0.0, high=1.0, default=default, per_input=True, levels=levels,
        help="share of each task vector's entries that is kept",
    )  # fmt: skip


LINEAR = OperatorSpec(
    name="linear",
    summary="Weighted mean of the weights.",
    paper="Wortsman et al. 2022, https://arxiv.org/abs/2203.05482",
    kernel=f"{_KERNELS}:linear",
    min_inputs=1,
    linear=True,
    coefficients=(_weight((0.3, 0.5, 0.7)),),
    options=(Option(name="normalize", choices=("true", "false"), help="divide by the sum of the weights"),),
)
SLERP = OperatorSpec(
    name="slerp",
    summary="Interpolation along the great circle between two checkpoints, tensor by tensor.",
    paper="Shoemake 1985, https://doi.org/10.1145/325165.325242",
    kernel=f"{_KERNELS}:slerp",
    max_inputs=2,
    ordered=True,
    coefficients=(
        Coefficient(name="t", low=0.0, high=1.0, default=0.5, levels=(0.3, 0.5, 0.7), help="0 first, 1 second input"),
        Coefficient(
            name="threshold",
            low=0.0,
            high=1.0,
            default=0.9995,
            help="cosine above which it interpolates linearly",
        ),
    ),
    traits=MappingProxyType({"spherical": 1.0}),
)
TASK_ARITHMETIC = OperatorSpec(
    name="task_arithmetic",
    summary="Base plus the scaled sum of the task vectors.",
    paper="Ilharco et al. 2023, https://arxiv.org/abs/2212.04089",
    kernel=f"{_KERNELS}:task_arithmetic",
    min_inputs=1,
    needs_base=True,
    linear=True,
    coefficients=(_weight(), _lambda((0.4, 0.7, 1.0))),
    options=(Option(name="normalize", choices=("false", "true"), help=_NORMALIZE),),
)
TIES = OperatorSpec(
    name="ties",
    summary="Trims every task vector to its largest entries, elects a sign per entry, averages those that agree.",
    paper="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
    kernel=f"{_KERNELS}:ties",
    min_inputs=1,
    needs_base=True,
    coefficients=(_weight(), _density(0.2, (0.2, 0.5)), _lambda((0.6, 1.0))),
    options=(
        Option(name="normalize", choices=("true", "false"), help=_NORMALIZE),
        Option(name="rescale", choices=("none", "l1"), help="restore each trimmed task vector's L1 norm"),
    ),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0, "by_magnitude": 1.0}),
)
DARE_TIES = OperatorSpec(
    name="dare_ties",
    summary="Drops entries of every task vector at random, rescales the rest, elects signs as TIES does.",
    paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
    kernel=f"{_KERNELS}:dare_ties",
    min_inputs=1,
    needs_base=True,
    random=True,
    coefficients=(_weight(), _density(0.5, (0.5, 0.8)), _lambda((0.4, 0.7))),
    options=(
        Option(name="normalize", choices=("false", "true"), help=_NORMALIZE),
        Option(
            name="rescale", choices=("inverse", "l1", "none"),
            help="inverse: by 1/density, as in the paper; l1: to the old L1 norm, as in mergekit",
        ),
    ),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0}),
)  # fmt: skip

OPERATORS: Mapping[str, OperatorSpec] = MappingProxyType(
    {spec.name: spec for spec in (LINEAR, SLERP, TASK_ARITHMETIC, TIES, DARE_TIES)}
)


@cache
def operators() -> Mapping[str, OperatorSpec]:
    """Built-in operators and those of installed plug-ins, by name, in a fixed order.

    Raises:
        UsageError: a plug-in gives something that is no OperatorSpec, or takes a name that is taken.
    """
    table = dict(OPERATORS)
    for entry in sorted(entry_points(group="simmerge.operators"), key=lambda e: (e.name, e.value)):
        spec = entry.load()
        if not isinstance(spec, OperatorSpec):
            raise UsageError(f"plug-in operator '{entry.name}' ({entry.value}) is no OperatorSpec but {type(spec)}")
        if spec.name in table:
            raise UsageError(f"plug-in operator '{spec.name}' ({entry.value}): the name is taken; rename it")
        table[spec.name] = spec
    return MappingProxyType(table)


def operator(name: str) -> OperatorSpec:
    """The operator of that name.

    Raises:
        UnknownNameError: there is none; the message has the nearest name.
    """
    table = operators()
    if name not in table:
        raise UnknownNameError("operator", name, table, "See: simmerge operator list.")
    return table[name]
