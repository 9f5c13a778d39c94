from collections.abc import Iterator
from pathlib import Path

import pytest

from simmerge.pipeline.project import Project
from simmerge.testing.family import fill


@pytest.fixture
def project(family: Path, tmp_path: Path) -> Iterator[Project]:
    with Project(tmp_path / "work") as opened:
        fill(opened, family)
        yield opened
