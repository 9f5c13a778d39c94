"""A `vllm` of the documented API (0.18 and later) over a live model of transformers; it needs no accelerator.

What it takes from vLLM: the arguments' names, the shapes of the outputs (`prompt_logprobs` begins with None, entries by
token with `logprob` and `rank`, ties counted against a token unless it is the one that topk gave), the least length of
an answer, where generation stops, and that tokens of an answer have the stop in them and its text does not.
"""

# pyright: basic
# Tensors lose their types in tolist() and unique().

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from simmerge.pipeline.models import load_model

VERSION = "0.33.0"


@dataclass
class Logprob:
    """One token's log-probability at one place, nats."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """What came of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass(kw_only=True)
class SamplingParams:
    """Those of vLLM's that are used here; another one is a TypeError."""

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    stop: list[str] = field(default_factory=list[str])
    stop_token_ids: list[int] = field(default_factory=list[int])
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class TokensPrompt(dict[str, Any]):
    """A prompt by its token ids."""

    def __init__(self, *, prompt_token_ids: list[int]) -> None:
        super().__init__(prompt_token_ids=prompt_token_ids)


class LLM:
    """Keeps what it was opened with in `opened`, and how many prompts each call had in `calls`."""

    opened: list[dict[str, Any]]
    calls: list[int]

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str,
        dtype: str,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        seed: int,
        max_model_len: int,
        load_format: str,
        trust_remote_code: bool,
        enable_prefix_caching: bool,
    ) -> None:
        self.opened.append({k: v for k, v in locals().items() if k != "self"})
        self.most = max_model_len
        self.model, self.tokenizer = load_model(model)
        if max_model_len > self.model.config.max_position_embeddings:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived one")

    def generate(
        self, prompts: list[TokensPrompt], sampling_params: Any = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts."""
        assert not use_tqdm
        self.calls.append(len(prompts))
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        with torch.no_grad():
            return [self._one(i, p["prompt_token_ids"], s) for i, (p, s) in enumerate(zip(prompts, each, strict=True))]

    def _one(self, number: int, tokens: list[int], params: SamplingParams) -> RequestOutput:
        assert params.temperature == 0.0
        if not tokens:
            raise ValueError("The decoder prompt cannot be empty")
        if len(tokens) >= self.most:
            raise ValueError(
                f"The decoder prompt (length {len(tokens)}) plus the number of requested output tokens (at least 1) is "
                f"longer than the maximum model length of {self.most}."
            )
        known = None if params.prompt_logprobs is None else self._logprobs(tokens, params.prompt_logprobs)
        return RequestOutput(str(number), None, tokens, known, [self._written(tokens, params)])

    def _logprobs(self, tokens: list[int], count: int) -> list[dict[int, Logprob] | None]:
        logits = self.model(input_ids=torch.tensor([tokens])).logits[0]
        normal = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        result: list[dict[int, Logprob] | None] = [None]
        for place, token in zip(normal, tokens[1:], strict=False):
            ids = [token, *place.topk(count).indices.tolist()]
            ranks = [int((place >= place[token]).sum()), *range(1, count + 1)]
            result.append({i: Logprob(float(place[i]), rank) for i, rank in zip(ids, ranks, strict=True)})
        return result

    def _written(self, tokens: list[int], params: SamplingParams) -> CompletionOutput:
        most = min(params.max_tokens or self.most, self.most - len(tokens))
        ends = {*params.stop_token_ids, self.tokenizer.eos_token_id}
        written: list[int] = []
        for _ in range(most):
            whole = torch.tensor([tokens + written])
            logits = self.model(input_ids=whole).logits[0, -1].clone()
            seen = torch.unique(whole)
            penalty = params.repetition_penalty
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            written.append(int(logits.argmax()))
            if not params.detokenize:
                continue
            if written[-1] in ends:
                break
            text = self.tokenizer.decode(written, skip_special_tokens=params.skip_special_tokens)
            if any(stop in text for stop in params.stop):
                break
        return CompletionOutput(0, "vLLM's own text, which is not used", written, None, None, "stop")


def module() -> ModuleType:
    """A fresh module to stand in `sys.modules`."""
    made = ModuleType("vllm")
    llm = type("LLM", (LLM,), {"opened": [], "calls": []})
    made.__dict__.update(
        LLM=llm, SamplingParams=SamplingParams, TokensPrompt=TokensPrompt, __version__=VERSION, Logprob=Logprob
    )
    return made
