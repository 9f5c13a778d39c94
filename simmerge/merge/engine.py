"""One tensor of a recipe: the same arithmetic whether a folder is written or a model is made in memory."""

from collections.abc import Callable

import torch

from simmerge.errors import MergeError
from simmerge.operators import KernelCall, resolve
from simmerge.recipe import Recipe, Step

Read = Callable[[str, str], torch.Tensor]
"""`read(checkpoint, tensor)` gives the stored tensor."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge_tensor(recipe: Recipe, tensor: str, read: Read, digests: dict[str, str]) -> torch.Tensor:
    """The recipe's value of one tensor, computed in float32 and rounded once to the recipe's dtype.

    Tensors that are not floating point, and empty ones, are taken from the first source.

    Args:
        recipe: what to do; its steps must have been checked (`simmerge.operators.check_recipe`).
        tensor: name of a tensor that all sources have in the same shape.
        read: gives stored tensors.
        digests: digest by checkpoint name; the key of random draws, so renaming changes nothing.

    Raises:
        MergeError: the result is not finite.
    """
    first = read(recipe.sources()[0], tensor)
    if not first.is_floating_point() or first.numel() == 0:
        return first.clone()
    merged = _evaluate(recipe.root, recipe, tensor, read, digests)
    merged = merged.to(DTYPES[recipe.dtype] if recipe.dtype is not None else first.dtype)
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"tensor '{tensor}' of the merge is not finite in {merged.dtype}; "
            "use smaller coefficients or out_dtype: float32"
        )
    return merged


def _evaluate(item: Step, recipe: Recipe, tensor: str, read: Read, digests: dict[str, str]) -> torch.Tensor:
    resolved = resolve(item)
    inputs: list[torch.Tensor] = []
    keys: list[str] = []
    for source in item.inputs:
        if isinstance(source, Step):
            inputs.append(_evaluate(source, recipe, tensor, read, digests))
            keys.append(Recipe(root=source, seed=recipe.seed).recipe_id(digests))
        else:
            inputs.append(read(source, tensor).float())
            keys.append(digests[source])
    base = read(item.base, tensor).float() if item.base is not None and resolved.spec.needs_base else None
    call = KernelCall(
        tensor=tensor,
        inputs=tuple(inputs),
        base=base,
        numbers=resolved.numbers,
        options=resolved.options,
        keys=tuple(keys),
        seed=recipe.seed,
    )
    return resolved.spec.load()(call)
