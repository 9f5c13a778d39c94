"""Templates of tasks, where they cannot reach Python: a task that somebody sends is data."""

from jinja2 import Environment
from jinja2.sandbox import SandboxedEnvironment


def sandboxed(environment: Environment) -> SandboxedEnvironment:
    """The same templates, from which attributes that lead to code cannot be reached (jinja2's sandbox).

    Args:
        environment: lm-eval's, whose treatment of undefined names and whose filters are kept.
    """
    made = SandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    made.filters.update(environment.filters)
    return made
