"""Declarations: weighted sums, interpolation on spheres, Model Stock, and what chooses entry by entry."""

from types import MappingProxyType

from simmerge.operators.builtin.shared import (
    FALSE_TRUE,
    KERNELS,
    TRUE_FALSE,
    floor,
    lam,
    normalize,
    weight,
)
from simmerge.operators.spec import Coefficient, OperatorSpec, Option

_SPHERICAL = MappingProxyType({"spherical": 1.0})

LINEAR = OperatorSpec(
    name="linear",
    summary="Weighted mean of the weights.",
    paper="Wortsman et al. 2022, https://arxiv.org/abs/2203.05482",
    kernel=f"{KERNELS}.affine:linear",
    min_inputs=1,
    linear=True,
    uniform=True,
    coefficients=(weight((0.3, 0.5, 0.7)),),
    options=(normalize(TRUE_FALSE, help="divide by the sum of the weights"),),
)
PASSTHROUGH = OperatorSpec(
    name="passthrough",
    summary="One input as it is, for the parts of a layer stack.",
    paper="mergekit, https://github.com/arcee-ai/mergekit",
    kernel=f"{KERNELS}.affine:passthrough",
    min_inputs=1,
    max_inputs=1,
    linear=True,
    uniform=True,
    coefficients=(Coefficient(name="scale", low=-3.0, high=3.0, default=1.0, help="factor of every tensor"),),
)
SLERP = OperatorSpec(
    name="slerp",
    summary="Interpolation along the great circle between two checkpoints, tensor by tensor.",
    paper="Shoemake 1985, https://doi.org/10.1145/325165.325242",
    kernel=f"{KERNELS}.affine:slerp",
    batched=True,
    max_inputs=2,
    peer_base=True,
    ordered=True,
    coefficients=(
        Coefficient(name="t", low=0.0, high=1.0, default=0.5, levels=(0.3, 0.5, 0.7), help="0 first, 1 second input"),
        Coefficient(
            name="threshold", low=0.0, high=1.0, default=0.9995, help="cosine above which it interpolates linearly"
        ),
    ),
    traits=_SPHERICAL,
)
NUSLERP = OperatorSpec(
    name="nuslerp",
    summary="Spherical interpolation of two inputs by their weights; of task vectors where a base is given.",
    paper="mergekit, https://github.com/arcee-ai/mergekit",
    kernel=f"{KERNELS}.affine:nuslerp",
    batched=True,
    max_inputs=2,
    takes_base=True,
    coefficients=(weight((0.3, 0.5, 0.7)),),
    options=(
        Option(name="nuslerp_flatten", choices=TRUE_FALSE, help="one angle per tensor; false: one per row"),
        Option(
            name="nuslerp_row_wise", choices=FALSE_TRUE,
            help="without flattening, one angle per column (the reverse of the name, as in mergekit)",
        ),
    ),
    traits=_SPHERICAL,
)  # fmt: skip
MULTISLERP = OperatorSpec(
    name="multislerp",
    summary="Barycentric interpolation on a sphere, of any number of inputs.",
    paper="Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    kernel=f"{KERNELS}.affine:multislerp",
    batched=True,
    takes_base=True,
    min_inputs=1,
    coefficients=(
        weight((0.3, 0.5, 0.7)),
        Coefficient(name="eps", low=0.0, high=1e-3, default=1e-8, scale="log", help="added to norms"),
    ),
    options=(
        Option(name="normalize_weights", choices=TRUE_FALSE, help="divide the weights by their sum"),
    ),
    traits=_SPHERICAL,
)  # fmt: skip
KARCHER = OperatorSpec(
    name="karcher",
    summary="Karcher mean on the unit sphere, times the inputs' mean norm.",
    paper="Wang et al. 2026, https://arxiv.org/abs/2603.04972",
    kernel=f"{KERNELS}.affine:karcher",
    batched=True,
    min_inputs=1,
    coefficients=(
        Coefficient(name="max_iter", low=1.0, high=1000.0, default=10.0, scale="log", help="most steps"),
        Coefficient(name="tol", low=1e-12, high=0.1, default=1e-5, scale="log", help="length of a step that ends it"),
    ),
    traits=_SPHERICAL,
)
TASK_ARITHMETIC = OperatorSpec(
    name="task_arithmetic",
    summary="Base plus the scaled sum of the task vectors.",
    paper="Ilharco et al. 2023, https://arxiv.org/abs/2212.04089",
    kernel=f"{KERNELS}.affine:task_arithmetic",
    min_inputs=1,
    needs_base=True,
    linear=True,
    uniform=True,
    coefficients=(weight(), lam((0.4, 0.7, 1.0))),
    options=(normalize(),),
)
MODEL_STOCK = OperatorSpec(
    name="model_stock",
    summary="Between the base and the inputs' mean, as far as the angles between their task vectors say.",
    paper="Jang et al. 2024, https://arxiv.org/abs/2403.19522",
    kernel=f"{KERNELS}.affine:model_stock",
    batched=True,
    needs_base=True,
    options=(
        Option(name="filter_wise", choices=FALSE_TRUE, help="one ratio per row instead of one per tensor"),
        floor("bounds the product of two norms by 1e-6 from below"),
    ),
    peer_defaults=MappingProxyType({"floor": "mergekit"}),
)
SCE = OperatorSpec(
    name="sce",
    summary="Selects positions by variance, weighs inputs by energy, erases minority signs.",
    paper="Wan et al. 2024, https://arxiv.org/abs/2408.07990",
    kernel=f"{KERNELS}.elect:sce",
    batched=True,
    min_inputs=1,
    needs_base=True,
    coefficients=(
        Coefficient(
            name="select_topk", low=0.0, high=1.0, default=1.0, levels=(0.2, 1.0),
            help="share of the positions with variance that is kept",
        ),
    ),
    options=(floor("makes weights equal where the mean squares sum to less than 1e-6"),),
    traits=MappingProxyType({"sparsifies": 1.0, "elects_signs": 1.0}),
    peer_defaults=MappingProxyType({"floor": "mergekit"}),
)  # fmt: skip
_EPSILON = Coefficient(
    name="epsilon", low=0.0, high=1.0, default=1e-5, scale="log", help="a change below it counts as none"
)
RAM = OperatorSpec(
    name="ram",
    summary="Takes a change that one input made as it is, and the mean of changes that several made.",
    paper="Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572",
    kernel=f"{KERNELS}.elect:ram",
    min_inputs=1,
    needs_base=True,
    uniform=True,
    coefficients=(_EPSILON,),
)
RAMPLUS_TL = OperatorSpec(
    name="ramplus_tl",
    summary="RAM with unshared changes enlarged where an input shares many.",
    paper="Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572",
    kernel=f"{KERNELS}.elect:ramplus_tl",
    min_inputs=1,
    needs_base=True,
    coefficients=(
        _EPSILON,
        Coefficient(name="r", low=0.0, high=2.0, default=0.1, help="how much sharing enlarges"),
        Coefficient(name="alpha", low=0.0, high=10.0, default=0.2, help="most sharing that counts"),
    ),
)
NEARSWAP = OperatorSpec(
    name="nearswap",
    summary="The first input, moved to the second where the two are near.",
    paper="Alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    kernel=f"{KERNELS}.elect:nearswap",
    max_inputs=2,
    peer_base=True,
    ordered=True,
    uniform=True,
    coefficients=(
        Coefficient(name="t", low=0.0, high=1.0, default=1e-3, scale="log", help="distance that counts as near"),
    ),
)
ARCEE_FUSION = OperatorSpec(
    name="arcee_fusion",
    summary="The first input with the second's entries where their importance stands out.",
    paper="Arcee Fusion in mergekit, https://github.com/arcee-ai/mergekit",
    kernel=f"{KERNELS}.elect:arcee_fusion",
    max_inputs=2,
    peer_base=True,
    ordered=True,
    traits=MappingProxyType({"sparsifies": 1.0, "by_magnitude": 1.0}),
)
