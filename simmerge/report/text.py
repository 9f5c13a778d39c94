"""How numbers are written: four significant digits, the same on the page, in the card and in a terminal."""

import unicodedata
from collections.abc import Iterable

from simmerge.recipe import Filtered, Gradient, Input, Recipe, Slice, Value

NOTHING = "—"
DIGITS = 4
"""Significant digits of every measured or predicted number."""


def number(value: float | None) -> str:
    """A number with four significant digits: '0.6120', '-1.234', '12,345', '1.234e-05'; '—' for None or NaN.

    From 1,000 on, whole numbers are written; below 0.0001, powers of ten.
    """
    if value is None or value != value:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 999.95:  # would round to 1000 or more
        return f"{value:,.0f}"
    return f"{value:#.{DIGITS}g}".removesuffix(".")


def error(value: float | None) -> str:
    """A standard error with two significant digits ('0.0070'): the rest of it is noise."""
    return NOTHING if value is None else f"{value:#.2g}".removesuffix(".") if value < 99.5 else number(value)


def setting(value: float) -> str:
    """A number that was set, not measured: at most four significant digits, no padding ('0.5', '1')."""
    return f"{value:.{DIGITS}g}"


def signed(value: float | None) -> str:
    """`number` with its sign, for differences."""
    return number(value) if value is None or value <= 0 or value != value else f"+{number(value)}"


def count(value: int | None) -> str:
    """A whole number with thousands separators; '—' for None."""
    return NOTHING if value is None else f"{value:,}"


def spent(value: float) -> str:
    """A number of evaluations: whole where it is whole ('12'), `number` where it is a share ('12.50')."""
    return count(int(value)) if value == int(value) else number(value)


def interval(low: float | None, high: float | None) -> str:
    """'[low, high]', or '—' where an end is unknown."""
    return NOTHING if low is None or high is None else f"[{number(low)}, {number(high)}]"


def probability(value: float | None) -> str:
    """A p-value: '0.0123', '< 0.0001', or '—'."""
    if value is None:
        return NOTHING
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent with at most three digits; '—' where `whole` is 0."""
    if whole == 0:
        return NOTHING
    percent = 100 * part / whole
    return f"{percent:.0f}%" if percent >= 99.95 else f"{percent:.3g}%"


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, minutes below two hours, hours above; four significant digits."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{number(seconds)} s"
    if seconds < 7200:
        return f"{number(seconds / 60)} min"
    return f"{number(seconds / 3600)} h"


def coefficient(value: Value) -> str:
    """One coefficient; a value per input stands in parentheses, in their order; a variant is its name.

    A gradient over the layers is '0.1 → 0.9', a value by tensor names '0.5 (mlp), 0.3 (*)'.
    """
    if isinstance(value, tuple):
        return f"({', '.join(coefficient(v) for v in value)})"
    if isinstance(value, Gradient):
        return " → ".join(setting(v) for v in value.values)
    if isinstance(value, Filtered):
        return ", ".join(f"{coefficient(case)} ({name})" for name, case in value.cases)
    return value if isinstance(value, str) else setting(value)


def coefficients(values: Iterable[tuple[str, Value]], separator: str = ", ") -> str:
    """'density 0.5, weights (0.6, 0.4)'; '—' where an operator has none."""
    return separator.join(f"{name} {coefficient(value)}" for name, value in values) or NOTHING


def step_phrase(node: Input) -> str:
    """A node as `operator(inputs)`, steps inside steps: 'slerp(ties(a, b), c)'; layers of a as 'a[0:8]'."""
    match node:
        case str():
            return node
        case Slice():
            return f"{node.source}[{node.start}:{node.end}]"
        case _:
            return f"{node.operator}({', '.join(step_phrase(item) for item in node.inputs)})"


def recipe_phrase(recipe: Recipe) -> str:
    """A recipe on one line, without coefficients."""
    return step_phrase(recipe.root)


NAMES_LISTED = 30
"""Names that prose lists before it says how many more there are."""


def listed(names: Iterable[str]) -> str:
    """Names as prose: 'a', 'a and b', 'a, b and c'; the first 30 'and 121 more' where there are more."""
    every = list(names) or [NOTHING]
    if len(every) > NAMES_LISTED:
        return f"{', '.join(every[:NAMES_LISTED])} and {count(len(every) - NAMES_LISTED)} more"
    *most, last = every
    return f"{', '.join(most)} and {last}" if most else last


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters, with an ellipsis in the middle, where kin tend to agree."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def printable(text: str) -> str:
    """`text` with control and format characters replaced, so that a name cannot steer a terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf") and c != "\n" else c for c in text
    )
