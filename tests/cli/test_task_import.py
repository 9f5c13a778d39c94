import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmerge.cli import main


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIMMERGE_WORKSPACE", str(tmp_path / "work"))
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"question": f"what is {i} + 1?", "answer": f" {i + 1}"} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, changes in (
        ("sums", {}),
        ("drawn", {"repeats": 2}),
        ("coded", {"description": "!function x.y"}),
    ):
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "sums.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "Q: {{question}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
            **changes,
        }
        text = yaml.safe_dump(config).replace("'!function x.y'", "!function x.y")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_tasks_are_imported_and_added(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main(["task", "import", *map(str, arguments), "--out", str(tmp_path / "tasks")])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, err = run("sums", "drawn", "coded", "--include", own, "--json", "--domain", "sums")
    assert code == 1
    said = json.loads(out)
    assert [(row["name"], row["items"], row["changed"]) for row in said["imported"]] == [("sums", 20, True)]
    assert [row["name"] for row in said["failed"]] == ["drawn", "coded"]
    assert "2 of 3 tasks were not imported" in err
    assert "repeats must be 1" in err
    assert "names the function 'x.y'" in err

    assert main(["task", "list", "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["domain"]) == ("sums", "sums")
    assert listed["digest"] == said["imported"][0]["digest"]

    code, out, err = run(own / "sums.yaml", "--domain", "sums", "--no-add")
    assert (code, "unchanged" in out, "reading sums" in err) == (0, True, True)
    assert run(own / "drawn.yaml")[0] == 1
    assert run("sums", "--include", tmp_path / "nowhere")[0] == 2
