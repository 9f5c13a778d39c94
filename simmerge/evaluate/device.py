"""Devices that a model can be evaluated on."""

import torch

from simmerge.errors import UsageError


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Args:
        name: 'cpu', 'cuda', or one of several as 'cuda:1'.

    Raises:
        UsageError: another word, or a device that this machine or this build of torch lacks.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not number.isdecimal()) or (kind == "cpu" and colon):
        raise UsageError(f"unknown device {name[:40]!r}; give cpu, cuda, or one of several as cuda:0")
    there = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= there:
        raise UsageError(f"device '{name}' is not here: torch finds {there} CUDA device(s); use --device cpu")
