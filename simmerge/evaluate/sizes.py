"""How much of a model's work is tried at once, and what was found to fit."""

from dataclasses import dataclass

from simmerge.errors import RangeError

PROCESSOR_TOKENS = 2048
"""Tokens of a pass on a processor: larger ones leave its cache and are slower."""

ACCELERATOR_TOKENS = 65_536
"""Tokens of the first pass on an accelerator; halved until they fit."""

PROCESSOR_PROMPTS = 16
"""Prompts that a processor continues together."""

ACCELERATOR_PROMPTS = 128
"""Prompts that an accelerator continues together at first; halved until they fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a model is.

    Attributes:
        accelerated: whether that is no processor.
        key: equal for models of one shape on one device.
    """

    accelerated: bool
    key: str


class Sizes:
    """Sizes of passes by place: the ones given or the place's first ones, and never more than was found to fit.

    What was found is not tried to be exceeded again: the memory of one device and one shape does not grow.
    """

    def __init__(self, batch_tokens: int | None, generate_batch: int | None) -> None:
        """See the class.

        Args:
            batch_tokens: tokens of a pass, or None for the place's.
            generate_batch: prompts that are continued together, or None for the place's.

        Raises:
            RangeError: a size below 1.
        """
        for what, size in (("batch_tokens", batch_tokens), ("generate_batch", generate_batch)):
            if size is not None and size < 1:
                raise RangeError(f"{what} must be at least 1, got {size}")
        self._given = {"tokens": batch_tokens, "prompts": generate_batch}
        self._found: dict[tuple[str, str], int] = {}

    def tokens(self, place: Place) -> int:
        """Most tokens, padding included, of one pass of more than one row."""
        return self._size("tokens", place, ACCELERATOR_TOKENS if place.accelerated else PROCESSOR_TOKENS)

    def prompts(self, place: Place) -> int:
        """Most prompts that are continued together."""
        return self._size("prompts", place, ACCELERATOR_PROMPTS if place.accelerated else PROCESSOR_PROMPTS)

    def learn(self, place: Place, *, tokens: int | None = None, prompts: int | None = None) -> None:
        """Remember what fitted after memory had run out; None where it did not run out."""
        for what, size in (("tokens", tokens), ("prompts", prompts)):
            if size is not None:
                self._found[what, place.key] = max(1, min(size, self._found.get((what, place.key), size)))

    def _size(self, what: str, place: Place, first: int) -> int:
        given = self._given[what]
        begin = first if given is None else given
        return min(begin, self._found.get((what, place.key), begin))
