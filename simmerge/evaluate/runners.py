"""What an evaluator asks of a model: answers to a plan, and texts."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from simmerge.evaluate.generation import generated
from simmerge.evaluate.judge import CompiledSplit
from simmerge.evaluate.lm_eval_tasks import max_length
from simmerge.evaluate.scorer import Plan, Scored, evaluating, run
from simmerge.evaluate.sizes import Place

After = Callable[[Scored, NDArray[np.bool_]], None]
"""Called with the answers so far and which requests are answered, shape `(requests,)`."""


@runtime_checkable
class PlanRunner(Protocol):
    """A model that answers plans and writes texts by its own means; given to an evaluator in place of a live model."""

    @property
    def config(self) -> Any:
        """The checkpoint's configuration, as transformers reads it."""
        ...

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: token ids are below."""
        ...

    @property
    def place(self) -> Place:
        """By what the sizes of its passes are chosen and remembered."""
        ...

    def context(self, tokenizer: Any) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    def longest(self, tokenizer: Any) -> int:
        """Most tokens of a request's input: context and continuation without the last token."""
        ...

    def run(self, planned: Plan, *, greedy: bool = True, after: After | None = None) -> Scored:
        """Answer a plan's requests, as `scorer.run`.

        Raises:
            EvaluationError: it cannot, or its answers are none.
        """
        ...

    def write(
        self, tokenizer: Any, compiled: CompiledSplit, instances: Sequence[Any], batch: int, found: dict[int, str]
    ) -> int | None:
        """Continue prompts as lm-eval's HFLM does: greedily, to a stop string or the task's most tokens.

        Args:
            tokenizer: left as it was.
            compiled: the split they are of.
            instances: lm-eval's requests, whose `args` are `(context, generation_kwargs)`.
            batch: most prompts that are continued together.
            found: takes in the texts by position in `instances`, as they come: those stay if an error ends it.

        Returns:
            How many prompts together fitted after memory had run out, or None where it never did.

        Raises:
            EvaluationError: the model's context has no room for an answer, or one prompt alone does not fit.
        """
        ...


class LiveModel:
    """A causal language model of transformers as a `PlanRunner`, on whatever device it is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def config(self) -> Any:
        """As `PlanRunner`."""
        return self._model.config

    @property
    def embeddings(self) -> int:
        """As `PlanRunner`."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def place(self) -> Place:
        """The model's device, dtype, type and number of parameters."""
        device = self._model.device
        count = sum(parameter.numel() for parameter in self._model.parameters())
        kind = getattr(self.config, "model_type", "")
        return Place(accelerated=device.type != "cpu", key=f"{device} {self._model.dtype} {kind} {count}")

    def context(self, tokenizer: Any) -> int:
        """As `PlanRunner`."""
        return max_length(self._model, tokenizer)

    def longest(self, tokenizer: Any) -> int:
        """As `PlanRunner`: the last token of a continuation is only predicted, so that all of the context is there."""
        return max_length(self._model, tokenizer)

    def run(self, planned: Plan, *, greedy: bool = True, after: After | None = None) -> Scored:
        """As `scorer.run`."""
        return run(self._model, planned, greedy=greedy, after=after)

    def write(
        self, tokenizer: Any, compiled: CompiledSplit, instances: Sequence[Any], batch: int, found: dict[int, str]
    ) -> int | None:
        """As `PlanRunner`, by lm-eval's own HFLM; the model's mode is left as it was."""
        with evaluating(self._model):
            return generated(self._model, tokenizer, compiled, instances, batch, found)


def runner_of(model: Any) -> PlanRunner:
    """The model itself where it answers plans, else a live model of transformers."""
    return model if isinstance(model, PlanRunner) else LiveModel(model)
