"""Checkpoint folders scored by vLLM, where it is installed."""

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig

from simmerge.errors import CheckpointError, EvaluationError, RangeError, UsageError
from simmerge.evaluate.generation import Prompt, prompt_of, text_of
from simmerge.evaluate.judge import CompiledSplit
from simmerge.evaluate.lm_eval_tasks import VERSION, max_length
from simmerge.evaluate.runners import After
from simmerge.evaluate.scorer import Plan, Scored, hosts_of
from simmerge.evaluate.sizes import Place

DTYPES = ("float32", "bfloat16", "float16")
"""What weights and activations may be computed in."""

# Prompts that are handed over at once. vLLM fills its own batches from them; answers are kept between two calls.
_TOGETHER = 1024

# Settings of generation that mean the same to transformers and vLLM, and those of a folder's generation_config.json
# that change a greedy answer and that vLLM lacks.
_ALLOWED = ("repetition_penalty",)
_LACKING = ("no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "min_new_tokens", "sequence_bias")

# Only partly typed.
_CONFIGS: Any = AutoConfig
_GENERATION: Any = GenerationConfig


def _vllm() -> Any:
    # vLLM tells its makers how it is used, unless it is told not to; nothing here asks the network.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise EvaluationError(
            f"the backend 'vllm' needs vLLM, which cannot be imported ({error}); "
            "install it with: pip install 'simmerge[vllm]', or use the backend 'transformers'"
        ) from error


def vllm_settings(dtype: str = "float32", max_model_len: int | None = None) -> str:
    """What scores of a `VllmModel` with these options are recorded under; no model is loaded.

    Raises:
        EvaluationError: vLLM is not installed.
    """
    length = "" if max_model_len is None else f", {max_model_len} tokens"
    return f"lm-eval {VERSION}, vllm {_vllm().__version__}, {dtype}{length}"


class VllmModel:
    """A checkpoint folder in a `vllm.LLM`, as a `PlanRunner` for `LmEvalEvaluator.score`.

    Log-likelihoods are vLLM's `prompt_logprobs`, one prompt for each different continuation, whole texts sharing one
    where one begins another; a token is the model's first choice where its `rank` is 1. Its scores are not mixed with
    those of transformers (`settings`). vLLM writes at least one token after a prompt, so that an input has two tokens
    less than the context: longer ones are cut there, and long texts have windows of that length.

    vLLM computes in batches of its own making; they change a log-likelihood by the rounding of the forward pass.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        max_model_len: int | None = None,
    ) -> None:
        """See the class. The weights are loaded at once, in safetensors only and without remote code.

        Args:
            folder: a checkpoint of transformers.
            dtype: one of `DTYPES`. The default is what the other backend computes in: candidates differ by little, and
                bfloat16's eight bits would round that off. Attention in float32 has slower kernels in vLLM.
            tensor_parallel_size: accelerators that share the model.
            gpu_memory_utilization: share of each one's memory that vLLM takes, in (0, 1].
            seed: vLLM's; answers are greedy and do not depend on it.
            max_model_len: most tokens of prompt and answer, or None for the checkpoint's context.

        Raises:
            UsageError: an unknown dtype.
            RangeError: a number outside its range.
            CheckpointError: the folder has no configuration that transformers can read.
            EvaluationError: vLLM is not installed or cannot load the folder; or generation_config.json asks for what
                vLLM does not know.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise RangeError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        for what, number in (("tensor_parallel_size", tensor_parallel_size), ("max_model_len", max_model_len)):
            if number is not None and number < 1:
                raise RangeError(f"{what} must be at least 1, got {number}")
        self._folder = folder
        self._config, self._generation = _configs(folder)
        self._vllm = _vllm()
        self.settings = vllm_settings(dtype, max_model_len)
        self._context = max_length(self, None) if max_model_len is None else max_model_len
        try:
            self._llm: Any = self._vllm.LLM(
                model=str(folder),
                tokenizer=str(folder),
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                seed=seed,
                max_model_len=self._context,
                load_format="safetensors",
                trust_remote_code=False,
                # A request with prompt_logprobs reads no cached prefix (vLLM's V1 guide), and there is a report of
                # stale values with it (vllm-project/vllm#42019).
                enable_prefix_caching=False,
            )
        except Exception as error:  # its errors share no root
            raise EvaluationError(
                f"vLLM cannot load '{folder}': {type(error).__name__}: {error}; give it less memory "
                "(max_model_len, gpu_memory_utilization), or use the backend 'transformers'"
            ) from error

    @property
    def config(self) -> Any:
        """As `PlanRunner`."""
        return self._config

    @property
    def embeddings(self) -> int:
        """As `PlanRunner`: the configuration's vocabulary."""
        return int((getattr(self._config, "text_config", None) or self._config).vocab_size)

    @property
    def place(self) -> Place:
        """As `PlanRunner`; nothing is learned of it, since vLLM chooses the sizes of its passes itself."""
        return Place(accelerated=True, key=f"vllm {self._folder}")

    def context(self, tokenizer: Any) -> int:
        """As `PlanRunner`: what the folder's configuration says, or 2,048 where it says nothing."""
        del tokenizer
        return self._context

    def longest(self, tokenizer: Any) -> int:
        """As `PlanRunner`: two less than the context, for the token that is predicted and the one that vLLM writes."""
        return max(1, self.context(tokenizer) - 2)

    def run(self, planned: Plan, *, greedy: bool = True, after: After | None = None) -> Scored:
        """Answer a plan's requests; logprobs are vLLM's float32, summed in float64.

        Args:
            planned: from `plan`, with `longest` as its `max_length`.
            greedy: whether `Scored.greedy` is wanted; otherwise it is all False.
            after: called after every 1,024 prompts.

        Raises:
            EvaluationError: vLLM fails, or a place has no log-probability of its token.
        """
        total = np.zeros(planned.requests, dtype=np.float64)
        first = np.zeros(planned.requests, dtype=np.bool_)
        there = np.zeros(planned.requests, dtype=np.bool_)
        asked = list(_asked(planned))
        hosts = hosts_of([tokens for _, tokens, _ in asked])
        guests: dict[int, list[int]] = {}
        for position, host in enumerate(hosts):
            guests.setdefault(host, []).append(position)
        # One entry more than the token asked for: where two are equally likely, the chosen one has rank 1 then.
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        order = list(guests)
        for begin in range(0, len(order), _TOGETHER):
            part = order[begin : begin + _TOGETHER]
            for host, output in zip(part, self._outputs([asked[i][1] for i in part], params), strict=True):
                for index, tokens, count in (asked[i] for i in guests[host]):
                    values, ranks = _read(output.prompt_logprobs, tokens, count, planned.labels[index])
                    total[index] = np.sum(values)
                    first[index] = greedy and all(rank == 1 for rank in ranks)
                    there[index] = True
            if after is not None:
                after(Scored(loglikelihood=total, greedy=first), there)
        return Scored(loglikelihood=total, greedy=first)

    def write(
        self, tokenizer: Any, compiled: CompiledSplit, instances: Sequence[Any], batch: int, found: dict[int, str]
    ) -> int | None:
        """As `PlanRunner`; vLLM chooses itself how many prompts it continues together, `batch` is not used.

        The text is made of the answer's tokens as HFLM makes it, and not vLLM's own.
        """
        del batch
        context = self.context(tokenizer)
        prompts = [prompt_of(compiled, instance, tokenizer, context, _ALLOWED) for instance in instances]
        params = [self._params(prompt) for prompt in prompts]
        for position, output in enumerate(self._outputs([prompt.tokens for prompt in prompts], params)):
            found[position] = text_of(output.outputs[0].token_ids, prompts[position], tokenizer)
        return None

    def _params(self, prompt: Prompt) -> Any:
        """Greedy, with what HFLM would get from the task and from the folder's generation_config.json."""
        ends = self._generation.eos_token_id
        penalty = prompt.settings.get("repetition_penalty", self._generation.repetition_penalty)
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=prompt.most,
            stop=list(prompt.stop),
            stop_token_ids=[ends] if isinstance(ends, int) else list(ends or ()),
            repetition_penalty=1.0 if penalty is None else float(penalty),
            # Stop strings are looked for in the text, and the end of text is one of them.
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )

    def _outputs(self, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        asked = [self._vllm.TokensPrompt(prompt_token_ids=list(tokens)) for tokens in prompts]
        try:
            outputs = list(self._llm.generate(asked, sampling_params=params, use_tqdm=False))
        except Exception as error:  # its errors share no root
            raise EvaluationError(
                f"vLLM failed on {len(prompts)} prompts of up to {max(map(len, prompts), default=0)} tokens of "
                f"'{self._folder}': {type(error).__name__}: {error}"
            ) from error
        if len(outputs) != len(prompts):
            raise EvaluationError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts of '{self._folder}'")
        return outputs


def _configs(folder: Path) -> tuple[Any, Any]:
    """The folder's configuration, and that of its generation; what vLLM does not know of the latter is refused."""
    try:
        config = _CONFIGS.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the configuration of '{folder}': {error}") from error
    try:
        generation = _GENERATION.from_pretrained(str(folder), local_files_only=True)
    except OSError:
        generation = _GENERATION.from_model_config(config)
    lacking = [name for name in _LACKING if getattr(generation, name, None)]
    if (generation.num_beams or 1) > 1:
        lacking.append("num_beams")
    if lacking:
        raise EvaluationError(
            f"'{folder}/generation_config.json' has {', '.join(lacking)}, which vLLM does not know; "
            "use the backend 'transformers'"
        )
    return config, generation


def _asked(planned: Plan) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Of each request its index, its prompt (input and last token) and how many of the last tokens are asked for."""
    for batch in planned.batches:
        rows, target = _numbers(batch.tokens), _numbers(batch.target)
        row, column = _numbers(batch.row), _numbers(batch.column)
        starts: list[int] = batch.starts.tolist()
        for index, start, end in zip(batch.owners.tolist(), starts, [*starts[1:], len(target)], strict=True):
            yield index, (*rows[row[start]][: column[end - 1] + 1], target[end - 1]), end - start


def _numbers(tensor: Any) -> list[Any]:
    return tensor.tolist()


def _read(
    logprobs: Sequence[Any] | None, tokens: Sequence[int], count: int, label: str
) -> tuple[NDArray[np.float64], list[int | None]]:
    """Log-probability and rank of the last `count` of `tokens`, from one prompt's answer, which may be longer.

    The first token of a prompt has none; a list of another length, or a place without its token, is an error.
    """
    start = len(tokens) - count
    found: Sequence[Any] = [] if logprobs is None else logprobs[start : len(tokens)]
    wanted = tokens[start:]
    places = [None if place is None else place.get(token) for place, token in zip(found, wanted, strict=False)]
    missing = next((i for i in range(count) if i >= len(places) or places[i] is None), None)
    if missing is not None:
        raise EvaluationError(
            f"{label}: vLLM gave no log-probability for token {wanted[missing]} at place {start + missing} of "
            f"{len(tokens)}; its answer does not have the documented shape, use vllm>=0.18 or 'transformers'"
        )
    given: list[Any] = [place for place in places if place is not None]
    return np.array([float(place.logprob) for place in given]), [place.rank for place in given]
