"""Data that the program needs at run time: the demo's catalogue, tasks, recorded scores, a fitted surrogate."""

from pathlib import Path

if __name__ != "simmerge.data":
    raise ImportError(f"import simmerge.data, not {__name__}: this folder is a part of the simmerge package")


def shipped(*parts: str) -> Path:
    """Path of something that is shipped with the package, `parts` from `data/` inwards."""
    return Path(__file__).parent.joinpath(*parts)
