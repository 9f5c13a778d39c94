"""Declarations: operators that thin out task vectors."""

from collections.abc import Mapping
from types import MappingProxyType

from simmerge.operators.builtin.shared import (
    FALSE_TRUE,
    KERNELS,
    TRUE_FALSE,
    density,
    lam,
    normalize,
    vote,
    weight,
)
from simmerge.operators.spec import Coefficient, OperatorSpec, Option

_RANDOM_RESCALE = Option(
    name="rescale", choices=("inverse", "l1", "none"),
    help="inverse: by 1/density, as in the paper; l1: to the old L1 norm, as in mergekit",
)  # fmt: skip
_RESCALE = Option(name="rescale", choices=("none", "l1"), help="restore each thinned task vector's L1 norm")
_DELLA_RESCALE = Option(
    name="rescale", choices=("inverse", "l1", "none"),
    help="inverse: each entry by 1/its chance, as in the paper; l1: to the old L1 norm, as in mergekit",
)  # fmt: skip
_DENSE: Mapping[str, float | str] = MappingProxyType({"density": 1.0})
_DENSE_L1: Mapping[str, float | str] = MappingProxyType({"density": 1.0, "rescale": "l1"})

TIES = OperatorSpec(
    name="ties",
    summary="Trims every task vector to its largest entries, elects a sign per entry, averages those that agree.",
    paper="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
    kernel=f"{KERNELS}.sparse:ties",
    min_inputs=1,
    needs_base=True,
    batched=True,
    coefficients=(weight(), density(0.2, (0.2, 0.5)), lam((0.6, 1.0))),
    options=(normalize(TRUE_FALSE), _RESCALE, vote()),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0, "by_magnitude": 1.0}),
    peer_defaults=_DENSE,
)
DARE_LINEAR = OperatorSpec(
    name="dare_linear",
    summary="Drops entries of every task vector at random, rescales the rest, adds them up.",
    paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
    kernel=f"{KERNELS}.sparse:dare_linear",
    min_inputs=1,
    needs_base=True,
    batched=True,
    random=True,
    coefficients=(weight(), density(0.5, (0.5, 0.8)), lam((0.4, 0.7))),
    options=(normalize(), _RANDOM_RESCALE),
    traits=MappingProxyType({"sparsifies": 1.0}),
    peer_defaults=_DENSE_L1,
)
DARE_TIES = OperatorSpec(
    name="dare_ties",
    summary="Drops entries of every task vector at random, rescales the rest, elects signs as TIES does.",
    paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
    kernel=f"{KERNELS}.sparse:dare_ties",
    min_inputs=1,
    needs_base=True,
    batched=True,
    random=True,
    coefficients=(weight(), density(0.5, (0.5, 0.8)), lam((0.4, 0.7))),
    options=(normalize(), _RANDOM_RESCALE, vote()),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0}),
    peer_defaults=_DENSE_L1,
)
_EPSILON = Coefficient(
    name="epsilon", low=0.0, high=0.5, default=0.15, per_input=True,
    help="how far the chance to stay goes up and down from the density, by rank",
)  # fmt: skip
DELLA = OperatorSpec(
    name="della",
    summary="Drops entries at random, small ones more often, rescales, elects signs.",
    paper="Deep et al. 2024, https://arxiv.org/abs/2406.11617",
    kernel=f"{KERNELS}.sparse:della",
    min_inputs=1,
    needs_base=True,
    batched=True,
    random=True,
    coefficients=(weight(), density(0.5, (0.5, 0.8)), _EPSILON, lam((0.6, 1.0))),
    options=(normalize(TRUE_FALSE), _DELLA_RESCALE, vote()),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0, "by_magnitude": 0.5}),
    peer_defaults=_DENSE_L1,
)
DELLA_LINEAR = OperatorSpec(
    name="della_linear",
    summary="Drops entries at random, small ones more often, rescales, adds them up.",
    paper="Deep et al. 2024, https://arxiv.org/abs/2406.11617",
    kernel=f"{KERNELS}.sparse:della_linear",
    min_inputs=1,
    needs_base=True,
    batched=True,
    random=True,
    coefficients=(weight(), density(0.5, (0.5, 0.8)), _EPSILON, lam((0.4, 0.7))),
    options=(normalize(), _DELLA_RESCALE),
    traits=MappingProxyType({"sparsifies": 1.0, "by_magnitude": 0.5}),
    peer_defaults=_DENSE_L1,
)
_GAMMA = Coefficient(
    name="gamma", low=0.0, high=1.0, default=0.01, per_input=True, help="share of the largest entries that is dropped"
)
BREADCRUMBS = OperatorSpec(
    name="breadcrumbs",
    summary="Drops the largest and the smallest entries of every task vector, adds up the rest.",
    paper="Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795",
    kernel=f"{KERNELS}.sparse:breadcrumbs",
    min_inputs=1,
    needs_base=True,
    batched=True,
    coefficients=(weight(), density(0.9, (0.3, 0.9)), _GAMMA, lam((0.4, 0.7))),
    options=(normalize(FALSE_TRUE), _RESCALE),
    traits=MappingProxyType({"sparsifies": 1.0, "by_magnitude": 1.0}),
    peer_defaults=_DENSE,
)
BREADCRUMBS_TIES = OperatorSpec(
    name="breadcrumbs_ties",
    summary="Breadcrumbs, then an election of signs.",
    paper="Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795",
    kernel=f"{KERNELS}.sparse:breadcrumbs_ties",
    min_inputs=1,
    needs_base=True,
    batched=True,
    coefficients=(weight(), density(0.9, (0.3, 0.9)), _GAMMA, lam((0.6, 1.0))),
    options=(normalize(FALSE_TRUE), _RESCALE, vote()),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0, "by_magnitude": 1.0}),
    peer_defaults=_DENSE,
)
