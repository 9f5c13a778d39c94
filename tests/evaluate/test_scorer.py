import copy
from typing import Any

import numpy as np
import pytest
import torch

from simmerge.errors import EvaluationError
from simmerge.evaluate.scorer import Plan, TokenRequest, evaluating, plan, run
from simmerge.rng import rng_for


def request_of(seed: int, context: int, continuation: int) -> TokenRequest:
    tokens = rng_for(seed, "tokens").integers(3, 280, size=context + continuation).tolist()
    return TokenRequest(context=tuple(tokens[:context]), continuation=tuple(tokens[context:]), label=f"item {seed}")


REQUESTS = [request_of(n, 1 + 7 * n % 23, 1 + n % 5) for n in range(17)]


def by_hand(model: Any, request: TokenRequest) -> tuple[float, bool]:
    """One request, one pass, float64."""
    whole = request.context + request.continuation
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].double()
    normal = torch.log_softmax(logits, dim=-1)[len(request.context) - 1 :]
    wanted = torch.tensor(request.continuation)
    return (
        float(normal.gather(1, wanted[:, None]).sum()),
        bool((normal.argmax(dim=-1) == wanted).all()),
    )


def tokens(planned: Plan) -> int:
    return sum(batch.tokens.numel() for batch in planned.batches)


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_answers_equal_one_pass_each(tiny: tuple[Any, Any], batch_tokens: int) -> None:
    model, _ = tiny
    greedy = greedy_request(model)
    requests = [*REQUESTS, greedy]
    planned = plan(requests, max_length=64, batch_tokens=batch_tokens)
    got = run(model, planned)
    expected = [by_hand(model, r) for r in requests]
    np.testing.assert_allclose(got.loglikelihood, [e[0] for e in expected], atol=1e-4)
    assert got.greedy.tolist() == [e[1] for e in expected]
    assert got.greedy[-1]
    assert all(len(b.tokens) == 1 or b.tokens.numel() <= batch_tokens for b in planned.batches)


def greedy_request(model: Any) -> TokenRequest:
    context, continuation = (5, 9, 20), []
    for _ in range(3):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits
        continuation.append(int(logits[0, -1].argmax()))
    return TokenRequest(context=context, continuation=tuple(continuation))


def test_requests_that_begin_one_another_share_a_pass(tiny: tuple[Any, Any]) -> None:
    context = tuple(range(10, 30))
    choices = [TokenRequest(context=context, continuation=(c,)) for c in (40, 41, 42)]
    longer = TokenRequest(context=context, continuation=(43, 44, 45))
    requests = [choices[0], longer, *choices[1:], choices[0]]
    planned = plan(requests, max_length=64, batch_tokens=8192)
    assert tokens(planned) == 22  # one row of 20 + 3 - 1 tokens
    assert planned.tokens.tolist() == [20, 22, 20, 20, 20]
    got = run(tiny[0], planned)
    np.testing.assert_allclose(got.loglikelihood, [by_hand(tiny[0], r)[0] for r in requests], atol=1e-4)


def test_batches_waste_little_on_padding() -> None:
    requests = [request_of(n, 5 + n % 120, 3) for n in range(400)]
    planned = plan(requests, max_length=256, batch_tokens=8192)
    used = sum(int(batch.lengths.sum()) for batch in planned.batches)
    assert used == sum(len(r.context) + len(r.continuation) - 1 for r in requests)
    assert tokens(planned) < 1.1 * used
    assert len(planned.batches) < 30


def test_the_plan_does_not_depend_on_the_order_of_the_requests() -> None:
    forward = plan(REQUESTS, max_length=64, batch_tokens=100)
    backward = plan(REQUESTS[::-1], max_length=64, batch_tokens=100)
    for one, other in zip(forward.batches, backward.batches, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.owners.tolist() == [len(REQUESTS) - 1 - i for i in other.owners]


def test_long_contexts_are_cut_on_the_left(tiny: tuple[Any, Any]) -> None:
    long, short = request_of(1, 40, 4), request_of(2, 9, 4)
    exact = request_of(3, 12, 5)  # 17 tokens: the last is only predicted, so all of it fits in 16
    planned = plan([long, short, exact], max_length=16, batch_tokens=8192)
    assert planned.truncated.tolist() == [True, False, False]
    kept = TokenRequest(context=long.context[-13:], continuation=long.continuation)
    expected = [by_hand(tiny[0], r)[0] for r in (kept, short, exact)]
    np.testing.assert_allclose(run(tiny[0], planned).loglikelihood, expected, atol=1e-4)


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(EvaluationError, match="item 4: the answer has 20 tokens, the model takes 16"):
        plan([request_of(4, 3, 20)], max_length=16, batch_tokens=100)
    for context, continuation in ((0, 2), (2, 0)):
        with pytest.raises(EvaluationError, match=f"item 5: must have .* got {context} and {continuation}"):
            plan([request_of(5, context, continuation)], max_length=16, batch_tokens=100)


def test_nothing_asked_is_nothing_run(tiny: tuple[Any, Any]) -> None:
    got = run(tiny[0], plan([], max_length=16, batch_tokens=100))
    assert got.loglikelihood.shape == (0,)


def test_the_model_is_left_as_it_was(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    run(model, plan(REQUESTS, max_length=64, batch_tokens=100))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_the_mode_is_put_back_after_an_error(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    model.train()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training


def test_a_model_whose_head_cannot_be_found_gives_the_same(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(REQUESTS, max_length=64, batch_tokens=200)
    expected = run(tiny[0], planned)
    monkeypatch.setattr(type(tiny[0]), "get_output_embeddings", lambda _self: None)
    got = run(tiny[0], planned)
    np.testing.assert_allclose(got.loglikelihood, expected.loglikelihood, atol=1e-4)
    assert got.greedy.tolist() == expected.greedy.tolist()


def test_half_precision_is_normalised_in_single(tiny: tuple[Any, Any]) -> None:
    """bfloat16 has 8 bits: its own log-softmax would be off by up to 2^-6 at -5 for every token."""
    model = tiny[0].to(torch.bfloat16)
    planned = plan(REQUESTS, max_length=64, batch_tokens=1)
    np.testing.assert_allclose(run(model, planned).loglikelihood, [by_hand(model, r)[0] for r in REQUESTS], atol=1e-3)


class Small:
    """A model on a machine where a pass of more than `most` tokens does not fit."""

    def __init__(self, model: Any, most: int, error: BaseException) -> None:
        self.model, self.most, self.error = model, most, error
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.passes.append(input_ids.numel())
        if input_ids.numel() > self.most:
            raise self.error
        return self.model(input_ids=input_ids, **given)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB, max allowed: 18.13 GB)."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [30, 64, 150])
def test_batches_that_do_not_fit_are_halved(tiny: tuple[Any, Any], error: BaseException, most: int) -> None:
    model, _ = tiny
    requests = [*REQUESTS, greedy_request(model)]
    planned = plan(requests, max_length=64, batch_tokens=8192)
    small = Small(model, most, error)
    got, expected = run(small, planned), run(model, planned)
    np.testing.assert_allclose(got.loglikelihood, expected.loglikelihood, atol=1e-4)
    assert got.greedy.tolist() == expected.greedy.tolist()
    # What was learned once is not tried again.
    failed = [size for size in small.passes if size > most]
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == len(set(failed))


def test_a_row_that_does_not_fit_alone_is_said(tiny: tuple[Any, Any]) -> None:
    planned = plan(REQUESTS, max_length=64, batch_tokens=8192)
    with pytest.raises(EvaluationError, match=r"out of memory on one text of \d+ tokens alone"):
        run(Small(tiny[0], 3, ERRORS[0]), planned)


def test_other_errors_are_not_taken_for_memory(tiny: tuple[Any, Any]) -> None:
    planned = plan(REQUESTS, max_length=64, batch_tokens=8192)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Small(tiny[0], 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), planned)
