"""What the peers compute for a pair of checkpoints: both models are read whole, pair after pair.

Our own plain code from the published definitions, to time and to test against. Nothing is kept between pairs, as
in their tools: a catalogue of m checkpoints is read m·(m - 1)/2 times. Weights are held in float32.

References:
    Model Kinship: Hu et al. 2024, https://arxiv.org/abs/2410.12613. Mergeability: Zhou et al. 2026,
    https://arxiv.org/abs/2601.22285, whose five categories are task vectors, effective rank, subspaces,
    activations and gradients; where a definition leaves a choice, ours is stated at its function.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simmerge.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import EvaluationError, IncompatibleError, RangeError
from simmerge.pipeline.models import load_model

Weights = Mapping[str, torch.Tensor]

# Only partly typed.
_LINALG: Any = torch.linalg

KINSHIP = ("pearson", "cosine", "euclidean")
TASK_VECTOR = ("task_dot", "task_cosine", "task_distance", "task_angle", "magnitude_ratio", "sign_agreement")
SPECTRAL = (
    "effective_rank_a",
    "effective_rank_b",
    "stable_rank_a",
    "stable_rank_b",
    "singular_value_overlap",
    "left_subspace_overlap",
    "right_subspace_overlap",
)
ACTIVATION = ("activation_dot", "activation_cosine", "activation_distance", "activation_magnitude_ratio")
GRADIENT = ("gradient_cosine", "gradient_distance", "input_gradient_cosine", "input_gradient_distance")
RANK = 8
"""Singular vectors of each side whose spans are compared."""


def kinship(a: Path | str, b: Path | str, base: Path | str) -> dict[str, float]:
    """Model Kinship of two checkpoints on disk: three models read whole, one number per definition.

    Args:
        a: folder of the first checkpoint.
        b: folder of the second.
        base: folder of what both were fine-tuned from.

    Returns:
        By the names in `KINSHIP`, as `kinship_of`.

    Raises:
        CheckpointError: a folder cannot be read, or the three do not have the same tensors.
    """
    origin = read_whole(base)
    return kinship_of(flat(task_vector(read_whole(a), origin)), flat(task_vector(read_whole(b), origin)))


def mergeability(
    a: Path | str, b: Path | str, base: Path | str, *, texts: Sequence[str] = (), rank: int = RANK
) -> dict[str, float]:
    """Mergeability-style metrics of two checkpoints on disk: models read whole, every matrix decomposed.

    Args:
        a: folder of the first checkpoint.
        b: folder of the second.
        base: folder of what both were fine-tuned from.
        texts: unlabelled texts for the metrics of activations and gradients; none leaves them out.
        rank: singular vectors whose spans are compared, at least 1.

    Returns:
        By name: `TASK_VECTOR`, `SPECTRAL`; with texts also `ACTIVATION` and `GRADIENT`.

    Raises:
        CheckpointError: a folder cannot be read, or the three do not have the same tensors.
        RangeError: `rank` below 1.
    """
    origin = read_whole(base)
    first, second = (task_vector(read_whole(folder), origin) for folder in (a, b))
    found = task_vector_metrics(flat(first), flat(second)) | spectral_metrics(first, second, rank)
    if texts:
        (model_a, tokenizer), (model_b, _) = (load_model(str(folder)) for folder in (a, b))
        ids = [[int(i) for i in tokenizer(text)["input_ids"]] for text in texts]
        found |= activation_metrics(model_a, model_b, ids) | gradient_metrics(model_a, model_b, ids)
    return found


def read_whole(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float32, in memory, by name in sorted order.

    Raises:
        CheckpointError: the folder is no checkpoint.
    """
    with TensorReader(open_checkpoint(folder)) as reader:
        # A float32 file gives its mapping; a copy is what loading a model costs.
        return {name: reader.read(name).to(torch.float32, copy=True) for name in reader.names()}


def task_vector(own: Weights, base: Weights) -> dict[str, torch.Tensor]:
    """Checkpoint less base, tensor by tensor.

    Raises:
        IncompatibleError: the two do not have the same tensors of the same shapes.
    """
    for name in (*own, *base):
        shapes = [tuple(side[name].shape) if name in side else None for side in (own, base)]
        if shapes[0] != shapes[1]:
            raise IncompatibleError(
                f"tensor '{name}' has shape {shapes[0]} in the checkpoint and {shapes[1]} in the base; "
                "task vectors need the same tensors in both: choose checkpoints of one architecture"
            )
    return {name: tensor - base[name] for name, tensor in own.items()}


def flat(tensors: Weights) -> torch.Tensor:
    """All entries as one vector, in the order of the names, shape `(parameters,)`."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def kinship_of(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Pearson's correlation, cosine and Euclidean distance of two flattened task vectors.

    The cosine keeps its sign. Pearson and cosine are in [-1, 1], NaN where a side is constant or zero; the
    distance is at least 0, in units of the weights.

    References:
        Hu et al. 2024, https://arxiv.org/abs/2410.12613, section on Model Kinship.
    """
    centred = _cosine(x - x.mean(), y - y.mean())
    return {"pearson": centred, "cosine": _cosine(x, y), "euclidean": _norm(x - y)}


def task_vector_metrics(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Geometry of two flattened task vectors, by the names in `TASK_VECTOR`.

    The angle is in degrees, [0, 180]; the magnitude ratio is the smaller norm over the larger, in [0, 1]; sign
    agreement is over the coordinates that are non-zero in both, in [0, 1]. NaN where a side is zero.

    References:
        Zhou et al. 2026, https://arxiv.org/abs/2601.22285 (task-vector category); Yadav et al. 2023,
        https://arxiv.org/abs/2306.01708 (signs).
    """
    cosine = _cosine(x, y)
    product = torch.sign(x) * torch.sign(y)
    both = int(torch.count_nonzero(product))
    return {
        "task_dot": _dot(x, y),
        "task_cosine": cosine,
        "task_distance": _norm(x - y),
        "task_angle": math.degrees(math.acos(cosine)) if not math.isnan(cosine) else math.nan,
        "magnitude_ratio": _ratio(_norm(x), _norm(y)),
        "sign_agreement": int(torch.count_nonzero(product > 0)) / both if both else math.nan,
    }


def spectral_metrics(first: Weights, second: Weights, rank: int = RANK) -> dict[str, float]:
    """Ranks and subspaces of two task vectors' matrices, means over matrices, by the names in `SPECTRAL`.

    With singular values s: effective rank exp(-Σ p ln p), p = s / Σ s; stable rank Σ s² / max s². The overlap of
    singular values is the cosine of the two sorted lists. The overlap of subspaces is ‖U_aᵀ U_b‖_F² / k for the
    first k singular vectors, in [0, 1]; k is `rank`, or less where a matrix has less. NaN where every matrix of a
    side is zero.

    Args:
        first: tensors of one task vector; those that are not matrices have no part in it.
        second: tensors of the other.
        rank: singular vectors whose spans are compared, at least 1.

    Raises:
        RangeError: `rank` below 1.

    References:
        Roy and Vetterli 2007, EUSIPCO (effective rank); Rudelson and Vershynin 2007,
        https://arxiv.org/abs/math/0503442 (stable rank); Zhou et al. 2026, https://arxiv.org/abs/2601.22285.
    """
    if rank < 1:
        raise RangeError(f"subspaces need a rank of at least 1, got {rank}")
    rows: list[tuple[float, ...]] = []
    for name, matrix in first.items():
        if matrix.ndim != 2 or not (bool(matrix.any()) and bool(second[name].any())):
            continue
        (u, s, v), (w, t, z) = (_decomposed(side) for side in (matrix, second[name]))
        k = min(rank, len(s))
        left, right = u[:, :k].T @ w[:, :k], v[:k] @ z[:k].T
        overlaps = (float(part.square().sum()) / k for part in (left, right))
        rows.append((effective_rank(s), effective_rank(t), _stable(s), _stable(t), _cosine(s, t), *overlaps))
    if not rows:
        return dict.fromkeys(SPECTRAL, math.nan)
    return {name: math.fsum(row[i] for row in rows) / len(rows) for i, name in enumerate(SPECTRAL)}


def effective_rank(singular: torch.Tensor) -> float:
    """Exponential of the entropy of singular values that sum to one, in [1, their number].

    Args:
        singular: singular values, at least 0, not all 0.

    References:
        Roy and Vetterli 2007, EUSIPCO, "The effective rank: a measure of effective dimensionality".
    """
    share = singular / singular.sum()
    return math.exp(-float(torch.xlogy(share, share).sum()))


def activation_metrics(a: Any, b: Any, ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Hidden states of two models on the same tokens, means over tokens and layers, by the names in `ACTIVATION`.

    Args:
        a: a causal language model of transformers.
        b: another of the same width and depth.
        ids: token ids of each text.

    References:
        Zhou et al. 2026, https://arxiv.org/abs/2601.22285 (activation category).
    """
    sums, count = [0.0] * len(ACTIVATION), 0
    with torch.inference_mode():
        for text in ids:
            x, y = (torch.cat([h[0] for h in _forward(m, text).hidden_states]) for m in (a, b))
            u, v, gap = (side.square().sum(dim=1).sqrt() for side in (x, y, x - y))
            dots = (x * y).sum(dim=1)
            parts = (dots, dots / (u * v), gap, torch.minimum(u, v) / torch.maximum(u, v))
            sums = [total + float(part.sum()) for total, part in zip(sums, parts, strict=True)]
            count += len(x)
    return {name: total / count for name, total in zip(ACTIVATION, sums, strict=True)}


def gradient_metrics(a: Any, b: Any, ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Gradients of two models' next-token loss on the same tokens, by the names in `GRADIENT`.

    The gradient of the loss summed over the texts by all weights, and by the embedded inputs. Cosines are in
    [-1, 1], distances Euclidean.

    Args:
        a: a causal language model of transformers.
        b: another of the same shapes.
        ids: token ids of each text, at least two each.

    Raises:
        EvaluationError: a text has fewer than two tokens.

    References:
        Zhou et al. 2026, https://arxiv.org/abs/2601.22285 (gradient category).
    """
    (x, p), (y, q) = (_gradients(model, ids) for model in (a, b))
    return {
        "gradient_cosine": _cosine(x, y),
        "gradient_distance": _norm(x - y),
        "input_gradient_cosine": _cosine(p, q),
        "input_gradient_distance": _norm(p - q),
    }


def _gradients(model: Any, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient by all weights and by the embedded inputs, each as one vector; the model's own are left empty."""
    model.zero_grad(set_to_none=True)
    inputs: list[torch.Tensor] = []
    for text in ids:
        if len(text) < 2:
            raise EvaluationError(f"a next-token loss needs at least 2 tokens, got {len(text)}; lengthen the text")
        rows = torch.tensor([list(text)])
        embedded = model.get_input_embeddings()(rows)
        embedded.retain_grad()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        loss: Any = torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="sum")
        loss.backward()
        inputs.append(embedded.grad.reshape(-1))
    whole = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return whole, torch.cat(inputs)


def _forward(model: Any, text: Sequence[int]) -> Any:
    return model(input_ids=torch.tensor([list(text)]), output_hidden_states=True, use_cache=False)


def _decomposed(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left singular vectors in columns, singular values from the largest down, right vectors in rows."""
    return _LINALG.svd(matrix, full_matrices=False)


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    # Not torch.dot: its float32 sums lose four digits over a million entries, those of sum() do not.
    return float((x * y).sum())


def _norm(x: torch.Tensor) -> float:
    return math.sqrt(_dot(x, x))


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    norms = _norm(x) * _norm(y)
    return min(max(_dot(x, y) / norms, -1.0), 1.0) if norms > 0 else math.nan


def _ratio(x: float, y: float) -> float:
    return min(x, y) / max(x, y) if max(x, y) > 0 else math.nan


def _stable(singular: torch.Tensor) -> float:
    return float(singular.square().sum() / singular[0].square())
