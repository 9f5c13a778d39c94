import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simmerge.bench.estimators import Curve, read_banks, run, saving
from simmerge.bench.races import regrets
from simmerge.cli import main
from simmerge.errors import EvaluationError


def _answers(path: Path, *, merges: int = 20, items: int = 40) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for task, scale in (("skill", 1.0), ("text", -3.0)):
        level = rng.random(items)
        known = {f"p{k}": (rng.random(items) < level).astype(float) for k in range(5)}
        parents: dict[str, list[str]] = {name: [] for name in known}
        for k in range(merges):
            i, j = rng.choice(5, 2, replace=False)
            known[f"m{k}"] = (rng.random(items) < 0.1 + 0.4 * (known[f"p{i}"] + known[f"p{j}"])).astype(float)
            parents[f"m{k}"] = [f"p{i}", f"p{j}"]
        for name, values in known.items():
            rows.append({"model": name, "parents": parents[name], "task": task, "task_digest": "", "split": "select",
                         "item": [str(k) for k in range(items)], "value": (values * scale).tolist(),
                         "weight": [1.0] * items})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_same_curve_needs_the_same_items() -> None:
    plain = Curve(name="a", errors={4: 0.2, 8: 0.14, 16: 0.1})
    assert saving(plain, plain) == pytest.approx(1)


def test_a_curve_of_half_the_items_needs_half() -> None:
    counts = [2**k for k in range(1, 7)]
    plain = Curve(name="a", errors={c: c**-0.5 for c in counts[1:]})
    halved = Curve(name="b", errors={c: (2 * c) ** -0.5 for c in counts})
    assert saving(halved, plain) == pytest.approx(0.5)


def test_the_bench_measures_every_estimator_it_can(tmp_path: Path) -> None:
    result = run(tmp_path, answers=_answers(tmp_path / "a.parquet"), quick=True)
    errors = result["figures"]["errors"]
    assert {*errors} == {"right or wrong", "bits per byte"}
    assert "mp-IRT" in errors["right or wrong"]
    assert "mp-IRT" not in errors["bits per byte"]
    for own in errors.values():
        curve = list(own["mean of a random subset"].values())
        assert curve[0] > curve[-1] > 0
    # the same answers in another unit
    for name in ("mean of a random subset",):
        a, b = (list(errors[kind][name].values()) for kind in errors)
        assert np.all(np.array(b) > np.array(a))
    assert json.loads((tmp_path / "estimators.json").read_text())["data"]


def test_races_lose_less_with_more_answers(tmp_path: Path) -> None:
    found = regrets(read_banks(_answers(tmp_path / "a.parquet", merges=60, items=200)), seed=0, races=12)
    assert {*found} > {"the same items for all", "successive halving", "confidence race"}
    for own in found.values():
        shares, values = list(own), list(own.values())
        assert shares == sorted(shares)
        assert 0 <= values[-1] < values[0] < 1
    same, halving = found["the same items for all"], found["successive halving"]
    assert sum(halving.values()) < sum(same.values())


def test_a_table_without_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no merge"):
        read_banks(_answers(tmp_path / "a.parquet", merges=0))


def test_the_command_line_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = _answers(tmp_path / "a.parquet")
    assert main(["bench", "estimators", "--quick", "--answers", str(answers), "-w", str(tmp_path / "w")]) == 0
    assert "gmp-IRT" in capsys.readouterr().out
