"""A realistic report with invented numbers: six checkpoints, thirteen tasks, three hundred candidates."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from simmerge.recipe import Recipe, step
from simmerge.report.data import (
    Answer,
    Baseline,
    BudgetCurve,
    Candidate,
    CheckpointFacts,
    Exhaustive,
    Measured,
    ParentComparison,
    Predicted,
    Question,
    ReportData,
    Run,
    Sample,
    Similarity,
    SimilarityMatrix,
    Spend,
    SpendRow,
)
from simmerge.report.text import step_phrase
from simmerge.rng import rng_for

NAMES = (
    "arithmetic-expert",
    "python-code",
    "german-news",
    "chat-instruct",
    "medical-abstracts",
    "legal-contracts",
)
TASKS = (
    "addition",
    "word-problems",
    "python-bpb",
    "bracket-match",
    "german-bpb",
    "translation",
    "dialogue",
    "instructions",
    "medical-qa",
    "pubmed-bpb",
    "contracts-bpb",
    "clause-type",
    "general-bpb",
)
OPERATORS = {
    "linear": ({"weights": (0.6, 0.4)}, None),
    "slerp": ({"t": 0.5}, None),
    "ties": ({"density": 0.35, "lambda": 1.1, "weights": (0.6, 0.4)}, "base-5m"),
    "dare_ties": ({"density": 0.5, "lambda": 1.0}, "base-5m"),
    "task_arithmetic": ({"lambda": 0.8}, "base-5m"),
    "breadcrumbs": ({"density": 0.9, "gamma": 0.01}, "base-5m"),
}
YAML = """\
merge_method: slerp
models:
  - merge:
      merge_method: ties
      base_model: base-5m
      models:
        - model: python-code
        - model: arithmetic-expert
      parameters: {density: 0.35, lambda: 1.1}
  - model: chat-instruct
parameters: {t: 0.3}
seed: 7
"""
REASONS = (
    "task vectors nearly orthogonal (cosine 0.041), so little is lost",
    "both parents are strong on the tasks outside their own domain",
    "the probes' outputs stay near both parents (divergence 0.012)",
    "interval is wide: no merge with german-news was measured yet",
    "sign election keeps 81% of the larger task vector",
)


def candidates() -> tuple[Candidate, ...]:
    rng = rng_for(7, "report", "candidates")
    pool = [(pair, name) for pair in permutations(NAMES, 2) for name in OPERATORS]
    pool += [(three, "ties") for three in permutations(NAMES, 3)]
    rows: list[Candidate] = []
    for index, (inputs, operator) in enumerate(pool[:300]):
        values, base = OPERATORS[operator]
        root = step(operator, inputs, base, values if len(inputs) == 2 else {"density": 0.35})
        mean = float(rng.normal(-0.05, 0.09))
        half = float(rng.uniform(0.03, 0.08))
        rows.append(
            Candidate(
                recipe_id=f"{index:016x}",
                label=step_phrase(root),
                operator=operator,
                inputs=inputs,
                coefficients=root.coefficients,
                predicted=Predicted(mean=mean, low=mean - half, high=mean + 0.8 * half),
                reasons=tuple(REASONS[i] for i in rng.permutation(len(REASONS))[:2]),
            )
        )
    order = sorted(range(len(rows)), key=lambda i: -rows[i].predicted.mean)
    looked_at = order[:14] + [order[i] for i in (22, 41, 87, 160, 290)]
    for place, i in enumerate(looked_at):
        row = rows[i]
        rows[i] = replace(
            row,
            measured=row.predicted.mean * 0.9 + float(rng.normal(-0.004, 0.028)),
            stderr=0.0071,
            rung=3 if place < 6 else 2,
            chosen=place in (0, 1, 2, 4, 5),
        )
    return tuple(rows)


def similarity() -> Similarity:
    rng = rng_for(7, "report", "similarity")
    size = len(NAMES)
    matrices: list[SimilarityMatrix] = []
    for measure, meaning, centre, spread in (
        ("Task-vector cosine", "High: the two were moved in the same direction.", 0.08, 0.09),
        ("CKA of probe activations", "High: the two see the probes alike.", 0.93, 0.03),
        ("Symmetric KL of next tokens", "High: the two predict different tokens (nats).", 0.4, 0.2),
    ):
        half = np.triu(rng.normal(centre, spread, (size, size)), 1)
        values = half + half.T + np.eye(size) * (0.0 if "KL" in measure else 1.0)
        rows = tuple(tuple(float(v) for v in row) for row in values)
        matrices.append(SimilarityMatrix(measure=measure, meaning=meaning, values=rows))
    return Similarity(names=NAMES, matrices=tuple(matrices))


def checkpoints() -> tuple[CheckpointFacts, ...]:
    rng = rng_for(7, "report", "checkpoints")
    rows: list[CheckpointFacts] = []
    for index, name in enumerate(("base-5m", *NAMES)):
        scores = [(t, float(-rng.uniform(1.1, 2.4) if t.endswith("bpb") else rng.uniform(0.2, 0.9))) for t in TASKS]
        rows.append(
            CheckpointFacts(
                name=name,
                digest=f"{index + 1:02x}9f3c" * 10,
                domain="" if index == 0 else name.split("-")[0],
                relative_norm=None if index == 0 else float(rng.uniform(0.05, 0.4)),
                # One checkpoint lacks its last score: a dash has to stand there.
                scores=tuple(scores[: -1 if index == 3 else None]),
                is_base=index == 0,
            )
        )
    return tuple(rows)


def baselines() -> tuple[Baseline, ...]:
    def row(name: str, recipe: str, evaluations: int, score: float, **more: object) -> Baseline:
        gap = 0.1583 - score
        filled = {"gap": gap, "gap_low": gap - 0.0124, "gap_high": gap + 0.0131, "p_value": 0.031}
        fields = {
            **filled,
            "regret": (0.1702 - score) / (0.1702 + 0.0493),
            "recipe": recipe,
            "score": score,
            **more,
        }
        return Baseline(name=name, evaluations=evaluations, **fields)  # pyright: ignore[reportArgumentType]

    none = {"gap": None, "gap_low": None, "gap_high": None, "p_value": None}
    return (
        row(
            "SimMerge",
            "slerp(ties(python-code, arithmetic-expert), chat-instruct)",
            17,
            0.1583,
            role="ours",
            **none,
        ),
        row("random candidate", "", 0, -0.0493, role="random", p_value=0.00002),
        row("best fixed operator", "ties(python-code, chat-instruct)", 30, 0.1391),
        row("always slerp", "slerp(python-code, chat-instruct)", 0, 0.1012),
        row("always tuned linear", "linear(arithmetic-expert, chat-instruct)", 30, 0.1120),
        row("task-vector norm alone", "ties(german-news, legal-contracts)", 0, 0.0211, p_value=0.0004),
        row("linear model, same features", "ties(python-code, arithmetic-expert)", 17, 0.1498, p_value=0.2),
        Baseline(name="kinship only", recipe="linear(medical-abstracts, legal-contracts)", evaluations=0),
        row("oracle", "ties(arithmetic-expert, python-code, chat-instruct)", 300, 0.1702, role="oracle"),
    )


def curves() -> tuple[BudgetCurve, ...]:
    rng = rng_for(7, "report", "curves")
    rows: list[BudgetCurve] = []
    for name, speed in (
        ("SimMerge", 2.5),
        ("random search", 18.0),
        ("successive halving", 9.0),
        ("greedy soup", 12.0),
    ):
        steps = (1, 2, 3, 5, 8, 12, 17, 24, 32, 40)
        best = np.maximum.accumulate([0.165 * (1 - np.exp(-s / speed)) + rng.normal(0, 0.006) for s in steps])
        points = tuple((float(s), float(v)) for s, v in zip(steps, best, strict=True))
        rows.append(BudgetCurve(method=name, points=points[: 7 if speed < 5 else None], ours=speed < 5))
    return tuple(rows)


def spent() -> Spend:
    return Spend(
        rows=(
            SpendRow(stage="fingerprint", what="checkpoints read once", count=6, seconds=21.4),
            SpendRow(stage="parents", what="checkpoints evaluated", count=6, seconds=92.0, items=15600),
            SpendRow(stage="0 predict", what="candidates ranked", count=300, seconds=0.9),
            SpendRow(stage="1 probe", what="merges made and probed", count=60, seconds=74.2),
            SpendRow(stage="2 race", what="merges on some items", count=19, seconds=130.8, items=20900),
            SpendRow(stage="3 full", what="merges evaluated in full", count=17, seconds=244.6, items=44200),
        ),
        full_evaluations=17,
        exhaustive=Exhaustive(
            full_evaluations=300,
            seconds=4316.0,
            items=780000,
            basis="The exhaustive line is 300 times the mean cost of the 17 full evaluations.",
        ),
    )


def sample_report() -> ReportData:
    inner = step("ties", ("python-code", "arithmetic-expert"), "base-5m", {"density": 0.35, "lambda": 1.1})
    return ReportData(
        title="Which of six 5M-parameter experts to merge",
        run=Run(
            command="simmerge search --catalog demo --budget 17evals --seed 7 --workspace .simmerge",
            seed=7,
            version="0.1.0",
            commit="4f2c9d81a7",
            machine="2 cores, 8 GiB, no accelerator",
            created="2025-01-31T12:00:00+00:00",
        ),
        question=Question(
            checkpoints=NAMES,
            tasks=TASKS,
            objective="Mean over the 13 tasks of the gain over the base, in standard deviations of the task",
            budget="17 full evaluations",
        ),
        answer=Answer(
            recipe_id="00000000000000a7",
            recipe=Recipe(root=step("slerp", (inner, "chat-instruct"), None, {"t": 0.3}), seed=7),
            text=YAML,
            predicted=Predicted(mean=0.1622, low=0.1177, high=0.1961),
            select=Measured(value=0.1650, stderr=0.0069, items=2600),
            report=Measured(value=0.1583, stderr=0.0070, items=2600),
            parent=ParentComparison(
                name="python-code",
                score=Measured(value=0.1210, stderr=0.0074, items=2600),
                difference=0.0373,
                low=0.0214,
                high=0.0529,
                p_value=0.00003,
            ),
        ),
        candidates=candidates(),
        similarity=similarity(),
        spent=spent(),
        baselines=baselines(),
        ladder=curves(),
        checkpoints=checkpoints(),
        sample=Sample(
            prompt="def add(a, b):\n    ",
            text="return a + b\n\nprint(add(2, 3))  # 5",
            settings="Greedy, 24 tokens.",
        ),
        notes=(
            "All checkpoints have 5 million parameters; nothing here was shown for larger ones.",
            "The surrogate was fitted on 180 merges of the same family, other checkpoints.",
            "The report split has 200 items per task: differences below 0.0140 are within its noise.",
        ),
    )


def bare_report() -> ReportData:
    """A report of a search that has not found anything yet."""
    return ReportData(
        title="Nothing yet",
        run=Run(command="simmerge search", seed=0, version="0.1.0"),
        question=Question(checkpoints=("a", "b"), tasks=("t",), objective="Accuracy", budget="1 evaluation"),
        absent=(("similarity", "Fingerprints are still being made."),),
    )


@pytest.fixture(scope="session")
def full() -> ReportData:
    return sample_report()


@pytest.fixture(scope="session")
def bare() -> ReportData:
    return bare_report()
