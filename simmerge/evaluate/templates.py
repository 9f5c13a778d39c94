"""Templates of tasks, where they cannot reach Python: a task that somebody sends is data."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from jinja2 import Environment
from jinja2.sandbox import SandboxedEnvironment

# Not typed by jinja2.
_FILTERS: Callable[[Environment], dict[str, Any]] = attrgetter("filters")


def sandboxed(environment: Environment) -> SandboxedEnvironment:
    """The same templates, from which attributes that lead to code cannot be reached (jinja2's sandbox).

    Args:
        environment: lm-eval's, whose treatment of undefined names and whose filters are kept.
    """
    made = SandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    _FILTERS(made).update(_FILTERS(environment))
    return made
