"""Declarations of the operators on singular vectors, with data, and with consensus masks."""

from types import MappingProxyType

from simmerge.operators.builtin.shared import KERNELS, lam, normalize, weight
from simmerge.operators.spec import Coefficient, OperatorSpec, Option

_NORMALIZE = normalize(help="divide the weights by their sum")
_SHARE = weight(low=0.0)

TSV = OperatorSpec(
    name="tsv",
    summary="Keeps the first singular vectors of every task vector and makes them orthogonal to one another.",
    paper="Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081",
    kernel=f"{KERNELS}.matrix:tsv",
    min_inputs=1,
    needs_base=True,
    coefficients=(
        weight(low=0.0, help="factor of each input's singular values"),
        Coefficient(
            name="rank", low=0.0, high=1.0, default=0.0,
            help="share of singular vectors kept of each input; 0 is one over the number of inputs",
        ),
        lam((0.7, 1.0, 1.3)),
    ),
    options=(_NORMALIZE,),
    traits=MappingProxyType({"spectral": 1.0}),
)  # fmt: skip
ISOTROPIC = OperatorSpec(
    name="isotropic",
    summary="Gives all directions of the summed task vectors the same strength.",
    paper="Marczak et al. 2025, https://arxiv.org/abs/2502.04959",
    kernel=f"{KERNELS}.matrix:isotropic",
    min_inputs=1,
    needs_base=True,
    coefficients=(
        _SHARE,
        Coefficient(
            name="common_share", low=0.0, high=1.0, default=0.8,
            help="variant common_and_task: share of directions taken from the sum",
        ),
        lam((0.7, 1.0, 1.3)),
    ),
    options=(
        Option(
            name="variant", choices=("common", "common_and_task"),
            help="common: Iso-C, directions of the sum only; common_and_task: Iso-CTS, also each input's own",
        ),
        _NORMALIZE,
    ),
    traits=MappingProxyType({"spectral": 1.0}),
)  # fmt: skip
REGMEAN = OperatorSpec(
    name="regmean",
    summary="Least squares on activations: outputs as near as can be to every input's outputs on its own activations.",
    paper="Jin et al. 2023, https://arxiv.org/abs/2212.09849",
    kernel=f"{KERNELS}.averaging:regmean",
    min_inputs=1,
    needs="gram",
    coefficients=(
        _SHARE,
        Coefficient(
            name="alpha", low=0.0, high=1.0, default=0.9, levels=(0.5, 0.9),
            help="factor of the Gram matrices' entries off the diagonal",
        ),
    ),
)  # fmt: skip
FISHER = OperatorSpec(
    name="fisher",
    summary="Mean weighted entry by entry with what each input's predictions depend on (diagonal Fisher information).",
    paper="Matena and Raffel 2022, https://arxiv.org/abs/2111.09832",
    kernel=f"{KERNELS}.averaging:fisher",
    min_inputs=1,
    needs="fisher",
    coefficients=(
        _SHARE,
        Coefficient(
            name="floor", low=1e-12, high=1.0, default=1e-6, scale="log", levels=(1e-6, 1e-2),
            help="least Fisher information, relative to the tensor's mean",
        ),
    ),
)  # fmt: skip
CONSENSUS_TA = OperatorSpec(
    name="consensus_ta",
    summary="Task arithmetic without the entries that fewer than a few inputs need.",
    paper="Wang et al. 2024, https://arxiv.org/abs/2405.07813",
    kernel=f"{KERNELS}.consensus:consensus_ta",
    needs_base=True,
    uniform=True,
    coefficients=(
        _SHARE,
        Coefficient(
            name="tall", low=0.0, high=2.0, default=0.4, per_input=True,
            help="an input needs an entry that is at least this much of the others' there; 0.2 to 0.6 in the paper",
        ),
        Coefficient(name="least", low=1.0, high=64.0, default=2.0, help="inputs that must need an entry to keep it"),
        lam((0.4, 0.7, 1.0)),
    ),
    options=(_NORMALIZE,),
    traits=MappingProxyType({"sparsifies": 1.0}),
)  # fmt: skip
EMR = OperatorSpec(
    name="emr",
    summary="Elects a sign per entry, takes the largest entry that agrees, and rescales to the inputs' size.",
    paper="Huang et al. 2024, https://arxiv.org/abs/2405.17461",
    kernel=f"{KERNELS}.consensus:emr",
    min_inputs=1,
    needs_base=True,
    coefficients=(lam((0.4, 0.7, 1.0)),),
    traits=MappingProxyType({"elects_signs": 1.0, "by_magnitude": 1.0}),
)

MATRIX_OPERATORS: tuple[OperatorSpec, ...] = (TSV, ISOTROPIC, REGMEAN, FISHER, CONSENSUS_TA, EMR)
"""In the order in which lists show them."""
