import json
from pathlib import Path

import pytest

from simmerge.cli import main


def test_the_bench_times_three_ways_and_scores_as_lm_eval_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "evaluate", "--quick", "--json", "-w", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["figures"]
    assert figures["items"] == 60
    assert figures["differing"] == 0
    assert min(figures[f"{who}_seconds"] for who in ("ours", "first", "bare", "lm_eval")) > 0
    assert 0.25 < figures["accuracy"] <= 1
    assert next(target["name"] for target in result["targets"]).startswith("speed")
