"""Loops compiled for the processor, in the interpreter's words: one pass where torch's operations need a dozen."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import numba

if TYPE_CHECKING:
    import torch  # features are computed without it

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    """A tensor, or a block of some."""

    @property
    def device(self) -> "torch.device":
        """Where it is."""
        ...


def suits(tensor: OnDevice) -> bool:
    """Whether compiled passes can read a tensor: it is on the processor; elsewhere torch does the same."""
    return tensor.device.type == "cpu"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of numpy arrays and numbers when it is first called, and keep the code beside the source.

    Arithmetic is IEEE 754's, in the order written (no reassociation, no contraction): results are the same on every
    processor. The interpreter's lock is released while it runs. Indices are not checked.
    """
    made: Any = numba.njit(cache=True, nogil=True, error_model="numpy")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast("Callable[P, R]", made(function))
