"""Kernels against float64 formulas that were written apart from them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.operators import OPERATORS
from simmerge.operators.kernels.operands import BLOCK
from simmerge.recipe import Value
from simmerge.testing.formulas import FORMULAS
from simmerge.testing.kernel_runs import expected, family, operands, relative_error

SHAPES = ((257, 130), (1000,), (3, 5, 7))
LARGE = (600, 500)
MIXED = (0.6, -0.3, 1.1)
PLAIN = (0.2, 0.5, 0.7)
BOTH = ("true", "false")


@dataclass(frozen=True)
class Case:
    operator: str
    count: int
    values: Mapping[str, Value]
    base: bool = True

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.values.items())
        return f"{self.operator}-{self.count}{'' if self.base else '-free'}-{shown}"


def sparse_cases() -> list[Case]:
    """Every operator that thins task vectors: weights of both signs, densities alike and apart, all rescalings."""
    found: list[Case] = []
    for name in ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"):
        spec = OPERATORS[name]
        rescale = spec.option("rescale")
        assert rescale is not None
        for how in rescale.choices:
            for normalize in BOTH:
                common: dict[str, Value] = {"rescale": how, "normalize": normalize, "lambda": 0.8}
                found += [
                    Case(name, 3, {**common, "weight": MIXED, "density": 0.5}),
                    Case(name, 4, {**common, "weight": (*PLAIN, 0.4), "density": (0.3, 0.5, 0.7, 1.0)}),
                ]
        found += [Case(name, 1, {"density": 0.3}), Case(name, 2, {"density": 1.0}), Case(name, 3, {"density": 0.0})]
        if spec.coefficient("epsilon") is None:  # less than one entry: TIES keeps one all the same
            found.append(Case(name, 1, {"density": 1e-6}))
        # Weights that nearly cancel are divided by their small sum; ones that cancel are left as they are.
        for weights in ((0.52, -0.5, 0.03), (0.5, -0.5, 0.0)):
            found.append(Case(name, 3, {"weight": weights, "density": 0.6, "normalize": "true"}))
        if spec.option("vote") is not None:
            found.append(Case(name, 3, {"vote": "unweighted", "weight": MIXED, "density": 0.6, "normalize": "false"}))
            found.append(Case(name, 3, {"vote": "unweighted", "weight": PLAIN, "density": 0.6, "normalize": "true"}))
        if spec.coefficient("gamma") is not None:
            found.append(Case(name, 3, {"density": (0.2, 0.6, 0.95), "gamma": (0.0, 0.1, 0.3)}))
        if spec.coefficient("epsilon") is not None:
            found.append(Case(name, 3, {"density": (0.2, 0.6, 0.9), "epsilon": (0.0, 0.3, 0.05)}))
    return found


def other_cases() -> list[Case]:
    """Every operator that takes whole task vectors or whole inputs."""
    found = [Case("linear", 3, {"weight": w, "normalize": n}) for w in (MIXED, PLAIN) for n in BOTH]
    found += [Case("linear", 1, {}), Case("passthrough", 1, {"scale": -1.3}), Case("karcher", 1, {})]
    found += [
        Case("task_arithmetic", 3, {"weight": w, "normalize": n, "lambda": 1.7})
        for w in (MIXED, PLAIN, (0.52, -0.5, 0.03), (0.5, -0.5, 0.0))
        for n in BOTH
    ]
    found += [Case("slerp", 2, {"t": t, "threshold": h}) for t in (0.0, 0.3, 1.0) for h in (0.9995, 0.5)]
    found += [Case("nearswap", 2, {"t": t}) for t in (0.0, 0.05, 0.4)]
    found += [Case("arcee_fusion", 2, {})]
    for flat in BOTH:
        for rows in BOTH:
            for base in (True, False):
                chosen: dict[str, Value] = {"nuslerp_flatten": flat, "nuslerp_row_wise": rows}
                found.append(Case("nuslerp", 2, {"weight": (0.4, 0.9), **chosen}, base))
                found.append(Case("nuslerp", 2, {"weight": (1.2, -0.2), **chosen}, base))
    found += [Case("nuslerp", 2, {"weight": (0.5, -0.5)})]
    for base in (True, False):
        for normalize in BOTH:
            found.append(Case("multislerp", 3, {"weight": MIXED, "normalize_weights": normalize}, base))
            found.append(Case("multislerp", 4, {"weight": (*PLAIN, 0.1), "normalize_weights": normalize}, base))
    found += [Case("karcher", 3, {"max_iter": n, "tol": t}) for n in (1.0, 10.0) for t in (1e-5, 1e-2)]
    found += [Case("model_stock", n, {"filter_wise": f, "floor": "mergekit"}) for n in (2, 3, 5) for f in BOTH]
    found += [Case("model_stock", 3, {"filter_wise": f}) for f in BOTH]
    found += [Case("sce", n, {"select_topk": k}) for n in (2, 3) for k in (0.0, 0.1, 0.5, 1.0)]
    found += [Case("sce", 1, {}), Case("sce", 3, {"select_topk": 0.5, "floor": "mergekit"})]
    found += [Case(name, 3, {"epsilon": e}) for name in ("ram", "ramplus_tl") for e in (0.0, 1e-5, 0.2)]
    found += [Case("ramplus_tl", 3, {"epsilon": 0.4, "r": 0.5, "alpha": 3.0}), Case("ram", 1, {"epsilon": 0.3})]
    return found


CASES = tuple(sparse_cases() + other_cases())


def selects_by_rounded_variance(case: Case) -> bool:
    """Whether equal variances are told apart by the rounding of a mean of three alone: then any of them may stay."""
    return case.operator == "sce" and case.count == 3 and case.values.get("select_topk") not in (None, 0.0, 1.0)


def check(case: Case, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    base, inputs = family(shape, case.count, dtype=dtype)
    things = operands(case.operator, inputs, base if case.base else None)
    assert relative_error(case.operator, things, case.values) <= 1e-6


def test_every_operator_with_a_formula_has_cases_and_exists() -> None:
    assert {case.operator for case in CASES} == set(FORMULAS)
    assert set(FORMULAS) <= set(OPERATORS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_formula(case: Case, shape: tuple[int, ...]) -> None:
    check(case, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not selects_by_rounded_variance(c)], ids=str)
def test_kernel_equals_formula_on_rounded_inputs(case: Case, dtype: torch.dtype) -> None:
    # Stored in half precision, task vectors lie on a grid: hundreds of equal magnitudes at every threshold.
    check(case, (64, 48), dtype)


@pytest.mark.parametrize("name", FORMULAS)
def test_kernel_equals_formula_across_blocks(name: str) -> None:
    cases = [c for c in CASES if c.operator == name]
    assert LARGE[0] * LARGE[1] > BLOCK
    for case in (cases[0], cases[len(cases) // 2], cases[-1]):
        check(case, LARGE)
        if not selects_by_rounded_variance(case):
            check(case, LARGE, torch.bfloat16)


grid = st.integers(-4, 4).map(lambda k: k / 8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("normalize", BOTH)
@pytest.mark.parametrize("vote", ["weighted", "unweighted"])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs_ties", "dare_ties", "della"])
def test_equal_magnitudes_and_tied_votes_go_as_the_rule_says(
    name: str, vote: str, normalize: str, data: st.DataObject
) -> None:
    # Values and weights are eighths: every sum is exact in float32, so a tie is a tie, and elects plus.
    shape = data.draw(st.sampled_from([(5,), (3, 4), (2, 3, 2)]))
    size = int(np.prod(shape))
    count = data.draw(st.integers(1, 4))
    arrays = [data.draw(st.lists(grid, min_size=size, max_size=size)) for _ in range(count + 1)]
    base, *inputs = (torch.tensor(a).reshape(shape) for a in arrays)
    weight = tuple(data.draw(st.lists(grid, min_size=count, max_size=count)))
    density = data.draw(st.sampled_from([0.25, 0.5, 0.75]))
    values: dict[str, Value] = {"weight": weight, "density": density, "rescale": "none"}
    values |= {"vote": vote, "normalize": normalize}
    assert relative_error(name, operands(name, inputs, base), values, undecided=0.0) <= 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_equal_variances_and_tied_votes_go_as_the_rule_says(share: float, data: st.DataObject) -> None:
    # Of 1, 2 or 4 inputs, so that means and variances of eighths are exact too.
    count = data.draw(st.sampled_from([1, 2, 4]))
    arrays = [data.draw(st.lists(grid, min_size=12, max_size=12)) for _ in range(count + 1)]
    base, *inputs = (torch.tensor(a).reshape(3, 4) for a in arrays)
    assert relative_error("sce", operands("sce", inputs, base), {"select_topk": share}, undecided=0.0) <= 1e-6


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_is_blind_to_nothing_that_its_operator_declares(name: str) -> None:
    """Every coefficient and every option changes the formula's result, so parity cannot pass without it."""
    spec = OPERATORS[name]
    count = spec.max_inputs or 3
    base, inputs = family((6, 7), count, scale=0.3)
    start: dict[str, Value] = {"weight": (0.6, -0.3, 1.1)[:count], "density": 0.5, "lambda": 0.8, "t": 0.3}
    start |= {
        "rescale": "none",
        "epsilon": 0.2,
        "gamma": 0.3,
        "select_topk": 0.5,
        "scale": 1.2,
        "nuslerp_flatten": "false",
    }
    start |= {"r": 0.5, "alpha": 0.05, "tol": 1e-12}
    known = {c.name for c in spec.coefficients} | {o.name for o in spec.options}
    values = {k: v for k, v in start.items() if k in known}
    if spec.option("floor") is not None:  # acts on small changes only
        base, inputs = base / 4096, tuple(x / 4096 for x in inputs)
    reference = expected(name, operands(name, inputs, base), values)
    changes: dict[str, Value] = {c.name: (c.low + c.high) / 3 for c in spec.coefficients}
    changes |= {"threshold": 0.5, "eps": 1e-3, "max_iter": 1.0, "tol": 0.1, "density": 0.7, "epsilon": 0.45}
    changes |= {"weight": (0.6, 0.3, 1.1)[:count]}
    changes |= {o.name: next(c for c in o.choices if c != values.get(o.name, o.choices[0])) for o in spec.options}
    for item in sorted(known):
        assert not np.array_equal(
            reference, expected(name, operands(name, inputs, base), values | {item: changes[item]})
        ), item
