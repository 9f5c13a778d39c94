import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from simmerge.errors import SurrogateError, UnknownNameError
from simmerge.surrogate.explain import contributions, importance, top_reasons
from simmerge.surrogate.fit import FittedSurrogate, fit_surrogate
from simmerge.surrogate.rows import TrainingRows
from simmerge.surrogate.stack import CandidateReport, choose
from simmerge.surrogate.store import load_surrogate, save_surrogate

Make = Callable[..., TrainingRows]


def half_bent(x: np.ndarray) -> float:
    """Half a line and half steps: a blend beats both of its parts."""
    return float(x[3] + 0.5 * x[0] + np.sign(x[4] * x[1]))


@pytest.fixture(scope="module")
def table(make: Make) -> TrainingRows:
    return make(checkpoints=10, law=half_bent, missing=0.02)


@pytest.fixture(scope="module")
def fitted(table: TrainingRows) -> FittedSurrogate:
    return fit_surrogate(table, seed=0, candidates=("blend",))


def test_blend_is_the_weighted_sum_of_its_parts(fitted: FittedSurrogate, table: TrainingRows) -> None:
    assert [name for name, _ in fitted.models] == ["ridge", "trees"]
    assert sum(fitted.weights) == pytest.approx(1.0)
    parts = [w * m.predict(table.features) for (_, m), w in zip(fitted.models, fitted.weights, strict=True)]
    np.testing.assert_array_equal(fitted.predict(table.features).mean, parts[0] + parts[1])


def test_the_better_model_is_taken(make: Make) -> None:
    bent = make(checkpoints=12, law=lambda x: float(np.sign(x[3]) * np.sign(x[0])))
    steep = fit_surrogate(make(checkpoints=8), seed=0, candidates=("ridge", "trees"))
    assert steep.chosen == "ridge"
    by_name = {r.name: r for r in fit_surrogate(bent, seed=0, candidates=("ridge", "trees")).reports}
    assert by_name["trees"].rmse < by_name["ridge"].rmse
    assert "took ridge" in steep.why
    assert [r.name for r in steep.reports] == ["ridge", "trees"]
    assert all(r.problems >= 28 for r in steep.reports)


def _report(name: str, regret: float, rmse: float) -> CandidateReport:
    return CandidateReport(
        name=name, rmse=rmse, spearman=0, spearman_within=0, regret=regret, regret_stderr=0, problems=4
    )


def test_regret_decides_and_rmse_breaks_ties() -> None:
    clear = {"a": np.array([0.1, 0.2, 0.1, 0.2]), "b": np.array([0.5, 0.7, 0.5, 0.6])}
    reports = [_report("a", 0.15, 0.9), _report("b", 0.575, 0.1)]
    assert choose(reports, clear)[0] == "a"
    tied = {"a": np.array([0.1, 0.2, 0.1, 0.2]), "b": np.array([0.5, 0.0, 0.0, 0.2])}
    name, why = choose([_report("a", 0.15, 0.9), _report("b", 0.175, 0.1)], tied)
    assert name == "b"
    assert "tie in regret" in why
    nothing = {"a": np.array([np.nan]), "b": np.array([np.nan])}
    assert choose([_report("a", np.nan, 0.9), _report("b", np.nan, 0.1)], nothing)[0] == "b"


def test_recipes_are_means_of_rows_in_any_grouping(fitted: FittedSurrogate, table: TrainingRows) -> None:
    features = table.features[:6]
    rows = fitted.predict(features).mean
    equal = fitted.predict_recipes(features, 2)
    np.testing.assert_allclose(equal.mean, rows.reshape(3, 2).mean(axis=1))
    assert (equal.low < equal.mean).all()
    assert (equal.mean < equal.high).all()
    ragged = fitted.predict_recipes(features, [1, 2, 3], np.array([5.0, 1, 3, 1, 1, 2]))
    np.testing.assert_allclose(
        ragged.mean, [rows[0], 0.25 * rows[1] + 0.75 * rows[2], (rows[3] + rows[4] + 2 * rows[5]) / 4]
    )
    weighted = fitted.predict_recipes(features, 2, np.array([3.0, 1.0]))
    np.testing.assert_allclose(weighted.mean, rows.reshape(3, 2) @ [0.75, 0.25])


def test_contributions_explain_the_prediction(fitted: FittedSurrogate, table: TrainingRows) -> None:
    parts = contributions(fitted, table.features)
    np.testing.assert_allclose(
        parts.values.sum(axis=1) + parts.expected, fitted.predict(table.features).mean, atol=1e-10
    )
    ranked = importance(fitted, table.features)
    assert ranked[0][0] == "f3"
    assert {name for name, _ in ranked[-2:]} == {"f2", "f5"}  # the two that the law does not use
    assert ranked[0][1] == pytest.approx(np.abs(parts.values).mean(axis=0).max())
    reasons = top_reasons(fitted, table.features[4], 2)
    order = np.argsort(-np.abs(parts.values[4]))[:2]
    assert [r.feature for r in reasons] == [table.names[i] for i in order]
    assert [r.contribution for r in reasons] == pytest.approx(parts.values[4, order].tolist())
    both = top_reasons(fitted, table.features[4:6], 1)[0]
    assert abs(both.contribution) == pytest.approx(np.abs(parts.values[4:6].mean(axis=0)).max())


def test_saved_and_loaded_predict_the_same_bits(fitted: FittedSurrogate, table: TrainingRows, tmp_path: Path) -> None:
    folder = save_surrogate(fitted, tmp_path / "s")
    assert sorted(p.name for p in folder.iterdir()) == ["model.txt", "spread.txt", "surrogate.json"]
    back = load_surrogate(folder, table.names)
    for ours, theirs in (
        (fitted.predict(table.features), back.predict(table.features)),
        (fitted.predict_recipes(table.features, 2), back.predict_recipes(table.features, 2)),
    ):
        for name in ("mean", "low", "high"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(fitted.outside(table.features), back.outside(table.features))
    assert (back.why, back.reports, back.chosen, back.names) == (
        fitted.why,
        fitted.reports,
        fitted.chosen,
        fitted.names,
    )
    before = (folder / "surrogate.json").read_bytes()
    save_surrogate(back, folder)
    assert (folder / "surrogate.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_other_features_are_named(fitted: FittedSurrogate, tmp_path: Path) -> None:
    folder = save_surrogate(fitted, tmp_path / "s")
    with pytest.raises(SurrogateError, match="column 1 is 'f1' there and 'g' here"):
        load_surrogate(folder, ("f0", "g", "f2", "f3", "f4", "f5"))
    with pytest.raises(SurrogateError, match="column 5, 'f5', is only there"):
        load_surrogate(folder, fitted.names[:5])
    with pytest.raises(SurrogateError, match="column 6, 'new', is only here"):
        load_surrogate(folder, (*fitted.names, "new"))


@pytest.mark.parametrize("name", ["surrogate.json", "model.txt", "spread.txt"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_damage_is_found(fitted: FittedSurrogate, tmp_path: Path, name: str, how: str) -> None:
    file = save_surrogate(fitted, tmp_path / "s") / name
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        middle = content.rindex(b"1")
        file.write_bytes(content[:middle] + b"2" + content[middle + 1 :])
    else:
        file.unlink()
    with pytest.raises(SurrogateError, match="there is no" if how == "gone" else "is damaged"):
        load_surrogate(tmp_path / "s")


def test_a_newer_format_is_refused(fitted: FittedSurrogate, tmp_path: Path) -> None:
    file = save_surrogate(fitted, tmp_path / "s") / "surrogate.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(SurrogateError, match="has format 99"):
        load_surrogate(tmp_path / "s")


def test_a_foreign_folder_is_left_alone(fitted: FittedSurrogate, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SurrogateError, match="is not a saved surrogate"):
        save_surrogate(fitted, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_bad_requests(fitted: FittedSurrogate, table: TrainingRows, make: Make) -> None:
    with pytest.raises(SurrogateError, match="6 columns of the fit, got 5"):
        fitted.predict(table.features[:, :5])
    with pytest.raises(SurrogateError, match="infinite"):
        fitted.outside(np.full((1, 6), np.inf))
    with pytest.raises(SurrogateError, match="5 rows cannot hold whole recipes of 2"):
        fitted.predict_recipes(table.features[:5], 2)
    with pytest.raises(SurrogateError, match="sum to the 5 rows"):
        fitted.predict_recipes(table.features[:5], [2, 2])
    with pytest.raises(SurrogateError, match="weights must be 4"):
        fitted.predict_recipes(table.features[:4], 2, np.ones(3))
    with pytest.raises(SurrogateError, match="weights of recipe 1 sum to 0"):
        fitted.predict_recipes(table.features[:4], 2, np.array([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(UnknownNameError, match="Did you mean 'trees'"):
        fit_surrogate(table, seed=0, candidates=("tree",))
    with pytest.raises(SurrogateError, match="candidates are empty"):
        fit_surrogate(table, seed=0, candidates=())
    with pytest.raises(SurrogateError, match=r"level must be in \(0, 1\), got 90"):
        fit_surrogate(table, seed=0, level=90)
    with pytest.raises(SurrogateError, match="no training rows"):
        fit_surrogate(make(checkpoints=2), seed=0)
    with pytest.raises(SurrogateError, match="k must be at least 1"):
        top_reasons(fitted, table.features[0], 0)


_SCRIPT = """
import hashlib, importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("tables", sys.argv[1])
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
from simmerge.surrogate.baselines import RandomChoice, BestFixed
from simmerge.surrogate.fit import fit_surrogate
from simmerge.surrogate.store import save_surrogate
rows = tables.make_rows(checkpoints=7, missing=0.02)
folder = save_surrogate(fit_surrogate(rows, seed=3, folds=3, candidates=("blend",)), sys.argv[2])
digest = hashlib.sha256()
for file in sorted(folder.iterdir()):
    digest.update(file.read_bytes())
for method in (RandomChoice(), BestFixed()):
    digest.update(method.fit(rows, 3)(rows).tobytes())
print(digest.hexdigest())
"""


def test_bytes_do_not_depend_on_the_hash_seed_or_on_threads(tmp_path: Path) -> None:
    digests: list[str] = []
    for hash_seed, threads in (("0", "1"), ("4242", "2")):
        settings = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                _SCRIPT,
                str(Path(__file__).with_name("conftest.py")),
                str(tmp_path / hash_seed),
            ],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.append(done.stdout.strip())
        assert done.stderr == ""
    assert digests[0] == digests[1]
