"""Devices that a model can be evaluated on."""

import torch

from simmerge.errors import UsageError


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the first there is of CUDA, MPS and the processor.

    Raises:
        UsageError: no such device, or it is not there.
    """
    if name is None:
        return torch.device(next((kind for kind in ("cuda", "mps") if _count(kind)), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name[:80]}'; give cpu, cuda, cuda:0, mps or xpu") from None
    count = _count(device.type)
    if (device.index or 0) >= count:
        there = [f"{kind}:{i}" for kind in ("cuda", "mps", "xpu") for i in range(_count(kind))]
        raise UsageError(f"device '{name}' is not there; there are {', '.join(['cpu', *there])}")
    return device


def _count(kind: str) -> int:
    """How many devices of one kind there are; 0 for kinds that no model is evaluated on."""
    match kind:
        case "cpu":
            return 1
        case "cuda":
            return torch.cuda.device_count() if torch.cuda.is_available() else 0
        case "mps":
            return int(torch.backends.mps.is_available())
        case "xpu":
            return torch.xpu.device_count() if torch.xpu.is_available() else 0
        case _:
            return 0
