"""Kernels run as the engine runs them, on tensors made for tests, and posed as problems for the formulas."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from simmerge.operators import OperatorSpec, operator, resolve
from simmerge.operators.kernels.operands import KernelCall, Operands, run
from simmerge.operators.kernels.random import fine_draws, kept
from simmerge.recipe import Value, step
from simmerge.rng import rng_for
from simmerge.testing.formulas import FORMULAS
from simmerge.testing.problems import Array, Problem


def family(
    shape: Sequence[int], count: int, *, seed: int = 0, scale: float = 0.3, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A base of standard normal entries and `count` inputs whose task vectors are `scale` as large.

    Task vectors share a common part, so that their cosines are about 0.3, as those of related fine-tunes.
    """
    draws = rng_for(seed, "family", *(str(extent) for extent in shape))

    def normal() -> torch.Tensor:
        return torch.as_tensor(np.asarray(draws.standard_normal(tuple(shape))))

    base, common = normal(), normal()
    inputs = [base + scale * (math.sqrt(0.3) * common + math.sqrt(0.7) * normal()) for _ in range(count)]
    return base.to(dtype), tuple(tensor.to(dtype) for tensor in inputs)


def operands(
    name: str,
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    *,
    keys: Sequence[str] = (),
    seed: int = 3,
    tensor: str = "layer.weight",
    keep: bool = False,
) -> Operands:
    """Operands for an operator; a base that it does not take is left out, extras that it needs are made."""
    spec = operator(name)
    takes = spec.needs_base or spec.takes_base
    return Operands(
        tensor,
        inputs,
        base if takes else None,
        keys=keys,
        seed=seed,
        extras=tuple(_extra(spec, x, k) for k, x in enumerate(inputs)) if spec.needs else (),
        keep=keep,
    )


def _extra(spec: OperatorSpec, tensor: torch.Tensor, index: int) -> torch.Tensor | None:
    """A Gram matrix of made activations, or a positive diagonal; by index, so that equal calls are equal."""
    draws = rng_for(index, "extra", spec.needs)
    if spec.needs == "fisher":
        return torch.as_tensor(np.asarray(draws.random(tuple(tensor.shape)) + 0.1)).float()
    if tensor.ndim != 2 or tensor.numel() == 0:
        return None
    seen = torch.as_tensor(draws.standard_normal((2 * tensor.shape[1], tensor.shape[1])))
    return (seen.T @ seen).float()


def kernel_call(name: str, things: Operands, values: Mapping[str, Value] | None = None) -> KernelCall:
    """The call of an operator's kernel with every coefficient that is not given at its default."""
    names = [f"input{k}" for k in range(len(things))]
    resolved = resolve(step(name, names, None if things.stored_base is None else "base", values))
    numbers, options = resolved.typical()  # exact where, as here, nothing depends on the tensor
    return KernelCall(operands=things, numbers=numbers, options=options)


def known(name: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Those of some settings that an operator declares."""
    spec = operator(name)
    names = {c.name for c in spec.coefficients} | {o.name for o in spec.options}
    return {key: value for key, value in values.items() if key in names}


def lively(name: str, count: int) -> dict[str, Value]:
    """Settings at which every part of the operator is at work."""
    weights = (0.5, 0.9, 0.7)[:count]
    chosen: dict[str, Value] = {"weight": weights, "density": 0.6, "lambda": 0.7, "select_topk": 0.5, "t": 0.3}
    chosen |= {"gamma": 0.05, "epsilon": 0.1, "scale": 1.5, "r": 0.5, "alpha": 0.8 if name == "regmean" else 0.5}
    return known(name, chosen)


def merge(name: str, things: Operands, values: Mapping[str, Value] | None = None) -> torch.Tensor:
    """The whole result of an operator, float32."""
    return run(operator(name).load(), kernel_call(name, things, values))


def expected(name: str, things: Operands, values: Mapping[str, Value] | None = None, *, tilt: float = 0.0) -> Array:
    """The result of the operator's formula in float64, with the kernel's own draws; `tilt` as in `Problem`."""
    call = kernel_call(name, things, values)
    base = things.stored_base
    problem = Problem(
        inputs=tuple(_array(t) for t in things.stored),
        base=None if base is None else _array(base),
        numbers=call.numbers,
        options=call.options,
        draws=_draws(name, call),
        tilt=tilt,
    )
    return FORMULAS[name](problem)


def relative_error(
    name: str, things: Operands, values: Mapping[str, Value] | None = None, *, undecided: float = 1e-6
) -> float:
    """`|got - formula| / |formula - origin|`, the origin being the base or the first input.

    What storing the result in float32 costs is not counted: half a unit in its last place, 2^-24 of the result's
    norm. Entries whose election is nearer to zero than `undecided` may have gone either way, since float32
    cannot tell; with 0 they must have gone as the formula says.
    """
    want = expected(name, things, values)
    got = _array(merge(name, things, values))
    origin = _array(things.stored[0] if things.stored_base is None else things.stored_base)
    miss = np.abs(got - want)
    if undecided and operator(name).traits.get("elects_signs"):
        for tilt in (-undecided, undecided):
            miss = np.minimum(miss, np.abs(got - expected(name, things, values, tilt=tilt)))
    error = float(np.linalg.norm(miss.ravel())) - 2.0**-24 * float(np.linalg.norm(want.ravel()))
    change = float(np.linalg.norm((want - origin).ravel()))
    return max(0.0, error) / change if change else max(0.0, error)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def _draws(name: str, call: KernelCall) -> tuple[Array, ...]:
    things, spec = call.operands, operator(name)
    if not spec.random:
        return ()
    shape = tuple(things.shape)
    if spec.coefficient("epsilon") is not None:
        found = (fine_draws(things, k, 0, things.numel) for k in range(len(things)))
        return tuple(f.astype(np.float64).reshape(shape) for f in found)
    masks = (kept(things, k, 0, things.numel, d) for k, d in enumerate(call.per_input("density")))
    return tuple(np.where(m, 0.0, 1.0).reshape(shape) for m in masks)
