"""What a report says in plain sentences: the page, the card and the terminal say the same."""

from simmerge.recipe import Node, Stack, Step
from simmerge.report import text
from simmerge.report.data import ReportData, Spend


def headline(data: ReportData) -> str:
    """The answer in one or two plain sentences."""
    answer = data.answer
    if answer is None:
        return data.why_absent("answer")
    merged = _merged(answer.recipe.root)
    if answer.parent is not None:
        return f"{merged}. {comparison(data)}"
    if answer.report is not None or answer.select is not None:
        return f"{merged}. Whether it beats its best parent was not measured."
    return f"{merged}. This is a prediction: the merge was not evaluated."


def _merged(root: Node) -> str:
    if isinstance(root, Stack):
        return f"Stack the layers of {text.step_phrase(root)}, in this order"
    if any(isinstance(item, Step | Stack) for item in root.inputs):
        return f"Merge {text.step_phrase(root)}, the innermost first"
    names = text.listed(text.step_phrase(item) for item in root.inputs)
    values = f" ({text.coefficients(root.coefficients)})" if root.coefficients else ""
    return f"Merge {names}, in this order, with {root.operator}{values}"


def comparison(data: ReportData) -> str:
    """Whether the answer beats its best parent, said so that no reader can take it for more."""
    answer = data.answer
    if answer is None or answer.parent is None:
        return ""
    parent = answer.parent
    ends = text.interval(parent.low, parent.high)
    size = text.number(abs(parent.difference))
    if parent.verdict == "better":
        return f"It scores {size} more than its best parent, {parent.name} (interval of the difference {ends})."
    if parent.verdict == "worse":
        return (
            f"It scores {size} less than its best parent, {parent.name} (interval of the difference {ends}): "
            f"do not merge, use {parent.name}."
        )
    return (
        f"It cannot be told apart from its best parent, {parent.name}: the difference of "
        f"{text.signed(parent.difference)} has the interval {ends}, which holds 0."
    )


def saving(spent: Spend) -> str:
    """What was spent against exhaustive evaluation, in words; '' where that is not known."""
    full = spent.exhaustive
    if full is None:
        return ""
    parts = [
        f"{text.count(spent.full_evaluations)} of {text.count(full.full_evaluations)} full evaluations "
        f"({text.share(spent.full_evaluations, full.full_evaluations)})",
        f"{text.duration(spent.seconds)} of {text.duration(full.seconds)} ({text.share(spent.seconds, full.seconds)})",
        f"{text.count(spent.items)} of {text.count(full.items)} items ({text.share(spent.items, full.items)})",
    ]
    return "; ".join(parts)
