"""Log-likelihoods of token sequences under a causal model, in few and full batches.

A plan is made once for a list of requests and is used for every candidate, so that a candidate costs its
forward passes and little else.
"""

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from simmerge.errors import EvaluationError

# Logits that are normalised at once: 2**22 floats (16 MiB) stay near the processor's cache. An accelerator waits for
# the processor once per block, so that its blocks are larger (256 MiB).
_BLOCK, _BLOCK_ON_ACCELERATOR = 2**22, 2**26

# What an allocator says where it raises a plain RuntimeError: torch's for the processor, MPS, cuBLAS.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")

# A batch ends early, where a shorter row would be padded by more than a tenth, once it has 1024 tokens: by
# then a pass costs far more than its start (measured on 1M parameters: 2 ms against 40 ms).
_FILL = 0.9
_ENOUGH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """Ask for the log-likelihood of `continuation` after `context`; both are token ids, neither is empty.

    `label` says in messages whose request it is.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass, and the places of its output that are needed.

    Attributes:
        tokens: ids, shape `(rows, width)`, padded with 0 on the right.
        row: row of every needed place, shape `(places,)`.
        column: its column; the logits there predict the next token.
        target: token whose log-likelihood is asked for there.
        starts: first place of each request's run of places, shape `(requests,)`.
        owners: index of each of these requests.
        lengths: number of tokens of each row that are not padding, shape `(rows,)`.
    """

    tokens: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    starts: NDArray[np.int64]
    owners: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Batches for a list of requests.

    Attributes:
        batches: longest first.
        requests: number of requests.
        truncated: whether a request's context was cut to fit, shape `(requests,)`.
        tokens: tokens that each request costs, shape `(requests,)`; shared ones are counted for each.
        labels: whose request each is, for messages; `requests` of them.
    """

    batches: tuple[Batch, ...]
    requests: int
    truncated: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Answers by request.

    Attributes:
        loglikelihood: sum over the continuation, nats, float64, shape `(requests,)`.
        greedy: whether every token of the continuation is the model's first choice, same shape.
        fitted: tokens of the largest pass that fitted after memory had run out, or None where it never did.
    """

    loglikelihood: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    fitted: int | None = None


def plan(requests: Sequence[TokenRequest], *, max_length: int, batch_tokens: int) -> Plan:
    """Arrange requests into batches sorted by length.

    The model's input is context and continuation without the last token, cut on the left to
    `max_length`. A request whose input begins another's is answered by that one's pass, since a causal
    model cannot see what follows: choices of one token after the same context cost one pass together.

    Args:
        requests: in any order.
        max_length: most tokens that the model takes.
        batch_tokens: most tokens, padding included, of a batch of more than one row.

    Raises:
        EvaluationError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    inputs: list[tuple[int, ...]] = []
    for request in requests:
        _check(request, max_length)
        inputs.append((request.context + request.continuation)[-(max_length + 1) :][:-1])
    truncated = [len(r.context) + len(r.continuation) > max_length + 1 for r in requests]
    hosts = hosts_of(inputs)
    order = sorted(dict.fromkeys(hosts), key=lambda i: (-len(inputs[i]), inputs[i], i))
    guests: dict[int, list[int]] = {host: [] for host in order}
    for index, host in enumerate(hosts):
        guests[host].append(index)
    groups = _groups([len(inputs[i]) for i in order], batch_tokens)
    return Plan(
        batches=tuple(_batch([order[i] for i in group], inputs, guests, requests) for group in groups),
        requests=len(requests),
        truncated=np.array(truncated, dtype=np.bool_),
        tokens=np.array([len(tokens) for tokens in inputs], dtype=np.int64),
        labels=tuple(request.label for request in requests),
    )


def run(
    model: Any, planned: Plan, *, greedy: bool = True, after: Callable[[Scored, NDArray[np.bool_]], None] | None = None
) -> Scored:
    """Answer a plan's requests with a live model; its mode and its gradients are left as they were.

    Logits are normalised in float32 and summed in float64, request by request in the order of its
    tokens; what else is asked changes an answer only by the rounding of the forward pass.

    A batch that does not fit into memory is halved until it does, and so are all later ones as large; `Scored.fitted`
    is what a later plan for this model should have as its `batch_tokens`.

    Args:
        model: a causal language model of transformers on any device.
        planned: from `plan`, with a `max_length` that the model takes.
        greedy: whether `Scored.greedy` is wanted; otherwise it is all False.
        after: called after every pass with the answers so far and which of them are there, shape `(requests,)`.

    Raises:
        EvaluationError: one row alone does not fit into memory.
    """
    total = np.zeros(planned.requests, dtype=np.float64)
    first = np.zeros(planned.requests, dtype=np.bool_)
    there = np.zeros(planned.requests, dtype=np.bool_)
    fitted: int | None = None
    waiting = list(reversed(planned.batches))
    most = max((batch.tokens.numel() for batch in waiting), default=0)
    with evaluating(model):
        while waiting:
            batch = waiting.pop()
            if len(batch.tokens) > 1 and batch.tokens.numel() > most:
                waiting.extend(reversed(halves(batch)))
                continue
            try:
                logits = _needed_logits(model, batch)
                values, best = _gathered(logits, batch.target.to(logits.device), greedy)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                most, fitted = _smaller(batch, error, planned.labels), 0
                waiting.append(batch)
            else:
                fitted = None if fitted is None else max(fitted, batch.tokens.numel())
                total[batch.owners] = np.add.reduceat(values, batch.starts)
                if greedy:
                    first[batch.owners] = np.logical_and.reduceat(best, batch.starts)
                there[batch.owners] = True
                if after is not None:
                    after(Scored(loglikelihood=total, greedy=first), there)
    return Scored(loglikelihood=total, greedy=first, fitted=fitted)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the processor."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in _NO_MEMORY)


def free_cached() -> None:
    """Give back what the accelerator's allocator keeps: in pieces of the wrong size it is in the way."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The upper and the lower rows of a batch of at least two; requests of one row stay together."""
    rows = len(batch.tokens) // 2
    place = int(torch.searchsorted(batch.row, rows))
    request = int(np.searchsorted(batch.starts, place))
    upper = Batch(
        tokens=batch.tokens[:rows],
        row=batch.row[:place],
        column=batch.column[:place],
        target=batch.target[:place],
        starts=batch.starts[:request],
        owners=batch.owners[:request],
        lengths=batch.lengths[:rows],
    )
    lower = Batch(
        tokens=batch.tokens[rows:],
        row=batch.row[place:] - rows,
        column=batch.column[place:],
        target=batch.target[place:],
        starts=batch.starts[request:] - place,
        owners=batch.owners[request:],
        lengths=batch.lengths[rows:],
    )
    return upper, lower


def _smaller(batch: Batch, error: BaseException, labels: Sequence[str]) -> int:
    """Most tokens of a batch from now on."""
    rows, width = batch.tokens.shape
    if rows == 1:
        raise EvaluationError(
            f"{labels[batch.owners[0]]}: the model runs out of memory on one text of {width} tokens alone; "
            "free memory, load the model in a smaller dtype, or shorten the task's items"
        ) from error
    free_cached()
    return rows * width // 2


@contextlib.contextmanager
def evaluating(model: Any) -> Generator[None]:
    """No gradients and no dropout; each module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True  # train() would switch its children too


def _check(request: TokenRequest, max_length: int) -> None:
    if not request.context or not request.continuation:
        raise EvaluationError(
            f"{request.label}: must have a context and a continuation of at least one token each, "
            f"got {len(request.context)} and {len(request.continuation)}"
        )
    if len(request.continuation) > max_length:
        raise EvaluationError(
            f"{request.label}: the answer has {len(request.continuation)} tokens, the model takes "
            f"{max_length}; shorten the item or use a model with a longer context"
        )


def hosts_of(inputs: Sequence[tuple[int, ...]]) -> list[int]:
    """For each input the index of one that begins with it: itself, unless it begins another."""
    hosts = list(range(len(inputs)))
    # In the order of tuples everything that begins with x follows x at once, so the next one tells.
    order = sorted(range(len(inputs)), key=lambda i: (inputs[i], -i))
    for position in range(len(order) - 2, -1, -1):
        here, following = order[position], order[position + 1]
        if inputs[following][: len(inputs[here])] == inputs[here]:
            hosts[here] = hosts[following]
    return hosts


def _groups(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Positions of each batch, for lengths in descending order."""
    groups: list[list[int]] = []
    width = 0
    for position, length in enumerate(lengths):
        room = (len(groups[-1]) + 1) * width <= batch_tokens if groups else False
        wasteful = length < _FILL * width and len(groups[-1]) * width >= _ENOUGH if groups else False
        if not room or wasteful:
            groups.append([])
            width = length
        groups[-1].append(position)
    return groups


def _batch(
    rows: Sequence[int],
    inputs: Sequence[tuple[int, ...]],
    guests: dict[int, list[int]],
    requests: Sequence[TokenRequest],
) -> Batch:
    width = max(len(inputs[i]) for i in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    row: list[int] = []
    column: list[int] = []
    target: list[int] = []
    starts: list[int] = []
    owners: list[int] = []
    for r, host in enumerate(rows):
        tokens[r, : len(inputs[host])] = inputs[host]
        for index in guests[host]:
            continuation = requests[index].continuation
            end = len(inputs[index])
            starts.append(len(row))
            owners.append(index)
            row += [r] * len(continuation)
            column += range(end - len(continuation), end)
            target += continuation
    return Batch(
        tokens=torch.as_tensor(tokens),
        row=torch.tensor(row),
        column=torch.tensor(column),
        target=torch.tensor(target),
        starts=np.array(starts, dtype=np.int64),
        owners=np.array(owners, dtype=np.int64),
        lengths=np.array([len(inputs[i]) for i in rows], dtype=np.int64),
    )


def _needed_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits at the needed places, shape `(places, vocabulary)`.

    The model's head is asked for these places only: with short answers after long contexts the head is
    most of a small model's work.
    """
    tokens = batch.tokens.to(model.device)

    def needed(values: torch.Tensor) -> torch.Tensor:
        # On the values' own device: the layers of one model may stand on several.
        return values[batch.row.to(values.device), batch.column.to(values.device)]

    def keep(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0] if arguments else None
        if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 and hidden.shape[:2] == tokens.shape:
            return (needed(hidden), *arguments[1:])
        return None

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(keep) if isinstance(head, torch.nn.Module) else None
    try:
        # Padding stands on the right and nothing before it can see it, so that no mask is needed.
        logits = cast(torch.Tensor, model(input_ids=tokens, **_without_cache(model)).logits)
    finally:
        if hook is not None:
            hook.remove()
    return logits if logits.dim() == 2 else needed(logits)


def _without_cache(model: Any) -> dict[str, bool]:
    accepted = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


def _gathered(
    logits: torch.Tensor, target: torch.Tensor, greedy: bool
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability of each target, and whether it is the first choice; both of shape `(places,)`."""
    values: list[NDArray[np.float64]] = []
    best: list[NDArray[np.bool_]] = []
    whole = _BLOCK if logits.device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    block = max(1, whole // logits.shape[1])
    for start in range(0, len(target), block):
        part, wanted = logits[start : start + block], target[start : start + block]
        normal = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        # To the processor first: not every accelerator has float64.
        values.append(normal.gather(1, wanted.unsqueeze(1)).squeeze(1).cpu().double().numpy())
        if greedy:
            best.append((normal.argmax(dim=-1) == wanted).cpu().numpy())
    return np.concatenate(values), np.concatenate(best) if greedy else np.zeros(0, dtype=np.bool_)
