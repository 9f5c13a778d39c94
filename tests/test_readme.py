import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]


def test_the_readmes_script_is_short() -> None:
    lines = [line for line in script().splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 10


@pytest.mark.slow
def test_the_readmes_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simmerge.data import shipped
    from simmerge.demo.materialize import materialize_tasks

    (tmp_path / "models").mkdir()
    for name in ("base", "german", "code", "reverse"):
        shutil.copytree(shipped("catalog", name), tmp_path / "models" / name)
    materialize_tasks(shipped("tasks"), tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    exec(compile(script(), "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "merge_method:" in out
    merged = next((tmp_path / "work" / "merges").iterdir())
    facts = json.loads((merged / "simmerge.json").read_text())
    assert set(facts["inputs"]) <= {"base", "german", "code", "reverse"}
    assert next((tmp_path / "work" / "reports").glob("*.html")).stat().st_size > 100_000


def test_both_of_the_readmes_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        assert f"\n{name}: " in makefile
