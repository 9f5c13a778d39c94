"""`simmerge bench probes`: how the features of pairs settle with the number of probes.

The shipped catalogue's checkpoints answer the 256 shipped probes, and random subsets of them of growing size.
Every subset goes through the whole behaviour pass, positions and supports chosen anew. For each measure of a pair,
its values over all pairs on a subset are set against those on all probes: Spearman's correlation over pairs, and
the median of the relative errors.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simmerge.bench.result import Target, report
from simmerge.data import shipped
from simmerge.demo import FOREIGN
from simmerge.features import measures
from simmerge.features.behaviour import measure_behaviour
from simmerge.features.defaults import DEFAULT_COUNT, default_probes
from simmerge.features.fingerprint import Behaviour
from simmerge.features.outcomes import divergence
from simmerge.features.probes import ProbeSet, tokenize
from simmerge.pipeline.models import load_model
from simmerge.surrogate.metrics import spearman

WHOLE = 256
SIZES = (8, 16, 32, 64, 128)
DRAWS = 3
_LEAST_SPEARMAN = 0.95
_QUICK = ("french", "german", "code", "reverse", "sort")


def run(workspace: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Measure the pair features on subsets of the shipped probes.

    Args:
        workspace: not used; benches have one signature.
        seed: seed of the subsets.
        quick: five checkpoints, 32 probes in all, one draw: checks that the bench works, not its figures.
    """
    del workspace
    facts = json.loads(shipped("catalog", "catalog.json").read_text())
    names = [n for n in facts["checkpoints"] if n not in (facts["base"], FOREIGN)]
    names = [facts["base"], *(n for n in names if not quick or n in _QUICK)]
    models = {name: load_model(str(shipped("catalog", name))) for name in names}
    whole = default_probes(32 if quick else WHOLE)
    sizes = [n for n in SIZES if n < len(whole.texts)]
    reference = _pairs(_answers(models, whole), facts["base"])
    rows: list[dict[str, Any]] = []
    for size in sizes:
        drawn = [whole.subset(size, seed + draw) for draw in range(1 if quick else DRAWS)]
        found = [_pairs(_answers(models, probes), facts["base"]) for probes in drawn]
        for measure, expected in reference.items():
            values = [one[measure] for one in found]
            rows.append({"probes": size, "measure": measure, **_agreement(values, expected)})
    summary = [_summary(size, [row for row in rows if row["probes"] == size]) for size in sizes]
    chosen = next((s for s in summary if s["probes"] == DEFAULT_COUNT), summary[-1])
    targets = [
        Target(name=f"Spearman with all probes at {chosen['probes']} probes, {what}", value=chosen[key],
               target=f">= {_LEAST_SPEARMAN}", holds=chosen[key] >= _LEAST_SPEARMAN)
        for what, key in (("mean of measures", "spearman_mean"), ("losses by domain", "spearman_domains"))
    ]  # fmt: skip
    figures = {
        "probes": len(whole.texts), "default": DEFAULT_COUNT, "checkpoints": len(names), "draws": 1 if quick else DRAWS,
        "summary": summary, "rows": rows,
    }  # fmt: skip
    return report(figures, targets, f"simmerge bench probes --seed {seed}{' --quick' if quick else ''}")


def _summary(size: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means and extremes over measures at one number of probes."""
    ranks = {str(row["measure"]): float(row["spearman_mean"]) for row in rows}
    return {
        "probes": size,
        "spearman_mean": sum(ranks.values()) / len(ranks),
        "spearman_least": min(ranks.values()),
        "spearman_domains": ranks["domain_loss_gain"],
    }


def _answers(models: Mapping[str, tuple[Any, Any]], probes: ProbeSet) -> dict[str, Behaviour]:
    """Behaviour of every checkpoint by name; the first is the base."""
    found: dict[str, Behaviour] = {}
    base: Behaviour | None = None
    for name, (model, tokenizer) in models.items():
        found[name] = measure_behaviour(model, probes, tokenize(probes, tokenizer), base)
        base = base or found[name]
    return found


def _pairs(answers: Mapping[str, Behaviour], base: str) -> dict[str, npt.NDArray[np.float64]]:
    """Values of each measure over all unordered pairs of checkpoints, and over checkpoints for single measures."""
    experts = [name for name in answers if name != base]
    result: dict[str, list[float]] = {}
    for a, b in combinations(experts, 2):
        x, y = answers[a], answers[b]
        cka = np.clip(measures.row_cosines(x.gram, y.gram), 0.0, 1.0)
        hidden = measures.row_cosines(x.hidden, y.hidden)
        for name, value in (
            ("kl_mean", float(np.mean(divergence(x.outcomes, y.outcomes)))),
            ("js_mean", measures.known_mean(measures.js(x.log_probs, y.log_probs))),
            ("top1_agreement", int(np.count_nonzero(x.top1 == y.top1)) / len(x.top1)),
            ("cka_mean", measures.known_mean(cka)),
            ("cka_last", float(cka[-1])),
            ("hidden_cosine_mean", measures.known_mean(hidden)),
            ("attention_cosine_mean", measures.known_mean(measures.row_cosines(x.attention, y.attention))),
            ("loss_gap", y.loss - x.loss),
        ):
            result.setdefault(name, []).append(value)
    for name in experts:
        result.setdefault("probe_loss_gain", []).append(answers[base].loss - answers[name].loss)
        kl = divergence(answers[base].outcomes, answers[name].outcomes)
        result.setdefault("base_kl_mean", []).append(float(np.mean(kl)))
        gains = _domain_losses(answers[base]) - _domain_losses(answers[name])
        result.setdefault("domain_loss_gain", []).extend(gains.tolist())
    return {name: np.array(values) for name, values in result.items()}


def _domain_losses(held: Behaviour) -> npt.NDArray[np.float64]:
    """Loss by domain in alphabetical order; every subset has probes of every domain or is left out by its NaN."""
    nats = held.probe_loss.astype(np.float64) * held.probe_tokens
    named = np.array(held.domains)
    domains = np.unique(np.array(default_probes(WHOLE).domains)).tolist()
    found = [(nats[named == d].sum(), held.probe_tokens[named == d].sum()) for d in domains]
    return np.array([total / count if count else np.nan for total, count in found])


def _agreement(drawn: Sequence[npt.NDArray[np.float64]], expected: npt.NDArray[np.float64]) -> dict[str, float]:
    """Spearman over pairs and relative errors, over draws of a subset; what a subset lacks is left out."""
    known = [~np.isnan(values) & ~np.isnan(expected) for values in drawn]
    ranks = [spearman(values[k], expected[k]) for values, k in zip(drawn, known, strict=True)]
    errors = np.concatenate(
        [np.abs(v - expected)[k] / np.maximum(np.abs(expected[k]), 1e-12) for v, k in zip(drawn, known, strict=True)]
    )
    return {
        "spearman_mean": float(np.mean(ranks)),
        "spearman_least": float(np.min(ranks)),
        "relative_error_median": float(np.median(errors)),
        "relative_error_q90": float(np.quantile(errors, 0.9)),
    }
