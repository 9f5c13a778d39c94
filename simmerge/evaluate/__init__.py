"""Evaluate: tasks, and the scores of live models on them.

A task is an lm-eval YAML over local JSONL files. `simmerge.evaluate.lm_eval_adapter.LmEvalEvaluator` is the
built-in `Evaluator`; it is not named here, because it imports torch, transformers and lm-eval.
"""

from simmerge.evaluate.statistics import (
    McNemar,
    PairedDifference,
    mcnemar_exact,
    paired_bootstrap,
    standard_error,
    weighted_mean,
)
from simmerge.evaluate.tasks import Task, load_task, load_tasks, task_named

__all__ = [
    "McNemar",
    "PairedDifference",
    "Task",
    "load_task",
    "load_tasks",
    "mcnemar_exact",
    "paired_bootstrap",
    "standard_error",
    "task_named",
    "weighted_mean",
]
