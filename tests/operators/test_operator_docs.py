from pathlib import Path

import pytest

from simmerge.operators import OPERATORS

DOCS = (Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_docs_have_every_operator_with_its_values(name: str) -> None:
    spec = OPERATORS[name]
    rows = [line for line in DOCS.splitlines() if line.startswith(f"| [`{name}`]")]
    assert len(rows) == 1
    for coefficient in spec.coefficients:
        assert f"{coefficient.name} ({coefficient.default:g}" in rows[0]
    for option in spec.options:
        assert f"{option.name}: {' / '.join(option.choices)}" in rows[0]
    for key, value in spec.peer_defaults.items():
        assert f"{key} {value if isinstance(value, str) else format(value, 'g')}" in rows[0]
    assert spec.summary in rows[0]
