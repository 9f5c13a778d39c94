"""An operator says how tensors are combined; its declaration says what it takes and what it does."""

from simmerge.operators.resolve import (
    ResolvedStep,
    check_recipe,
    describe,
    form,
    label,
    normal_form,
    resolve,
    shares,
)
from simmerge.operators.spec import Coefficient, OperatorSpec, Option
from simmerge.operators.table import OPERATORS, RECORDED, operator, operators

__all__ = [
    "OPERATORS",
    "RECORDED",
    "Coefficient",
    "OperatorSpec",
    "Option",
    "ResolvedStep",
    "check_recipe",
    "describe",
    "form",
    "label",
    "normal_form",
    "operator",
    "operators",
    "resolve",
    "shares",
]
