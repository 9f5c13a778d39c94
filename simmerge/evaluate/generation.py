"""Texts as lm-eval's HFLM writes them: by itself on a live model, and its prompts and cuts for other engines."""

# pyright: basic
# lm-eval's classes lose their types in its registry's decorators; here they are Any.

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simmerge.errors import EvaluationError
from simmerge.evaluate.judge import CompiledSplit
from simmerge.evaluate.lm_eval_tasks import quiet
from simmerge.evaluate.scorer import free_cached, out_of_memory

# After the tasks, which keep lm-eval off the network.
from lm_eval.models.huggingface import HFLM  # isort: skip
from lm_eval.models.utils import (  # isort: skip
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

_HFLM: Any = HFLM

# HFLM's own, where a task says nothing.
_MAX_GEN_TOKS = 256

# Settings of a draw; answers are greedy.
_OF_DRAWS = ("do_sample", "temperature", "top_k", "top_p", "min_p")


class _Partial:
    """What HFLM reports of every finished batch, through the hook of its cache, which is not used otherwise."""

    def __init__(self, instances: Sequence[Any], found: dict[int, str]) -> None:
        self._found = found
        self._positions: dict[str, list[int]] = {}
        for position, instance in enumerate(instances):
            self._positions.setdefault(repr(instance.args), []).append(position)

    def add_partial(self, _what: str, arguments: tuple[Any, ...], text: str) -> None:
        for position in self._positions.get(repr(tuple(arguments)), ()):
            self._found.setdefault(position, text)


def generated(
    model: Any,
    tokenizer: Any,
    compiled: CompiledSplit,
    instances: Sequence[Any],
    batch_size: int,
    found: dict[int, str],
) -> int | None:
    """lm-eval's own generation on a live model; what runs out of memory is tried again with half the prompts.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: left as it was.
        compiled: the split that the instances are of.
        instances: lm-eval's requests.
        batch_size: most prompts at once.
        found: takes in one text per instance, by its position; those that are there are not asked again, and those
            that came before an error stay.

    Returns:
        Prompts at once that fitted after memory had run out, or None where it never did.

    Raises:
        EvaluationError: the model's context has no room for the answer; or one prompt alone does not fit into memory.
    """
    size, fitted = batch_size, None
    with quiet():
        lm = _HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=size)
        lm.cache_hook = _Partial(instances, found)
        while rest := [position for position in range(len(instances)) if position not in found]:
            try:
                texts = lm.generate_until([instances[position] for position in rest], disable_tqdm=True)
            except AssertionError as error:
                raise EvaluationError(f"task '{compiled.task.name}' cannot be generated: {error}") from error
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                left = [instances[position] for position in rest if position not in found]
                size = fitted = _fewer(min(size, len(left)), tokenizer, compiled, left, error)
                lm.batch_size_per_gpu = size
            else:
                found.update(zip(rest, texts, strict=True))
    return fitted


def _fewer(size: int, tokenizer: Any, compiled: CompiledSplit, left: Sequence[Any], error: BaseException) -> int:
    """Prompts at once from now on, after `size` of them ran out of memory; the longest come first."""
    if size <= 1:
        longest = max(left, key=lambda instance: len(tokenizer.encode(instance.args[0])))
        tokens = len(tokenizer.encode(longest.args[0]))
        most = normalize_gen_kwargs(longest.args[1], _MAX_GEN_TOKS).get("max_gen_toks")
        raise EvaluationError(
            f"task '{compiled.task.name}', item '{compiled.names[longest.doc_id]}': the model runs out of memory on "
            f"one prompt of {tokens} tokens alone, with up to {most} of the answer; free memory, load the model in a "
            "smaller dtype, or shorten the task's items"
        ) from error
    free_cached()
    return size // 2


def lengths_of_text(instance: Any, text: str, tokenizer: Any, longest: int) -> dict[str, float]:
    """How long an answer is, whether its prompt was cut, and whether it is as long as the task allows.

    Most answers that are that long were not finished. Tokens are counted by encoding the text again, which may differ
    by one from what the model wrote. See `bundle.lengths` for the names.
    """
    context, kwargs = instance.args
    most = int(normalize_gen_kwargs(kwargs).get("max_gen_toks", 0))
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    return {
        "tokens": float(tokens),
        "truncated": float(len(tokenizer.encode(context)) > longest - most),
        "unfinished": float(0 < most <= tokens),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One text to continue greedily.

    Attributes:
        tokens: ids of the prompt, cut on the left to leave room for the answer.
        stop: strings that end the answer; the tokenizer's end of text is among them.
        most: most tokens of the answer.
        settings: what else the task asks for, of `allowed`.
    """

    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    most: int
    settings: Mapping[str, Any]


def prompt_of(compiled: CompiledSplit, instance: Any, tokenizer: Any, context: int, allowed: Sequence[str]) -> Prompt:
    """What HFLM would give to `generate` for one request of `generate_until`.

    Args:
        compiled: the split it is of.
        instance: lm-eval's request.
        tokenizer: left as it was.
        context: most tokens of prompt and answer together.
        allowed: settings of generation that the engine knows under transformers' names.

    Raises:
        EvaluationError: no room beside the answer, an empty prompt, or a setting that is not allowed.
    """
    text, given = instance.args
    label = f"task '{compiled.task.name}', item '{compiled.names[instance.doc_id]}'"
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given, _MAX_GEN_TOKS))
    end = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)
    stop = handle_stop_sequences(settings.pop("until", None), eos=end)
    most = int(settings.pop("max_gen_toks"))
    settings = {name: value for name, value in settings.items() if name not in _OF_DRAWS}
    unknown = [name for name in settings if name not in allowed]
    if unknown:
        raise EvaluationError(
            f"{label}: generation_kwargs has {', '.join(unknown)}, which this backend does not know "
            f"(it knows {', '.join(allowed)}); remove it, or use the backend 'transformers'"
        )
    if most >= context:
        raise EvaluationError(
            f"task '{compiled.task.name}' cannot be generated: max_gen_toks ({most}) must be less than the model's "
            f"context ({context})"
        )
    special = {"add_special_tokens": False} if has_bos_prefix(text, tokenizer.bos_token) else {}
    tokens = tuple(tokenizer(text, **special)["input_ids"])[-(context - most) :]
    if not tokens:
        raise EvaluationError(f"{label}: the prompt is empty; there is nothing to continue")
    return Prompt(tokens=tokens, stop=tuple(stop), most=most, settings=settings)


def text_of(tokens: Sequence[int], prompt: Prompt, tokenizer: Any) -> str:
    """The text that HFLM would make of an answer's tokens: special ones left out, cut at the first stop string."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return postprocess_generated_text(text, list(prompt.stop), None)
