"""Coefficients and options that several operators have."""

from simmerge.operators.spec import Coefficient, Option

KERNELS = "simmerge.operators.kernels"
TRUE_FALSE = ("true", "false")
FALSE_TRUE = ("false", "true")


def weight(levels: tuple[float, ...] = (), *, low: float = -2.0, help: str = "share of each input") -> Coefficient:
    """What each input counts; not below zero where an operator cannot subtract."""
    return Coefficient(name="weight", low=low, high=2.0, default=1.0, per_input=True, levels=levels, help=help)


def lam(levels: tuple[float, ...] = ()) -> Coefficient:
    """Scale of the merged task vector."""
    return Coefficient(
        name="lambda", low=0.0, high=3.0, default=1.0, levels=levels, help="scale of the merged task vector"
    )


def density(default: float, levels: tuple[float, ...] = ()) -> Coefficient:
    """Share of each task vector's entries that is kept."""
    return Coefficient(
        name="density", low=0.0, high=1.0, default=default, per_input=True, levels=levels,
        help="share of each task vector's entries that is kept",
    )  # fmt: skip


def normalize(
    choices: tuple[str, str] = FALSE_TRUE, *, help: str = "divide by the sum of the weights (that take part)"
) -> Option:
    """Whether the sum is divided by the weights; the first choice is the default."""
    return Option(name="normalize", choices=choices, help=help)


def vote() -> Option:
    """Whether weights count in an election of signs."""
    return Option(
        name="vote", choices=("weighted", "unweighted"),
        help="weighted: weights count in the election of signs, as in mergekit; unweighted: as in the TIES paper",
    )  # fmt: skip


def floor(what: str) -> Option:
    """Whether mergekit's bound against division by zero is taken over; it changes results for small changes."""
    return Option(name="floor", choices=("none", "mergekit"), help=f"mergekit: {what}")
