"""One small base for all tests of this folder, written once."""

from pathlib import Path

import pytest

from simmerge.checkpoint import Checkpoint, open_checkpoint
from simmerge.testing.checkpoints import tiny_llama


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("checkpoint") / "base", hidden=16, vocab=264)


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Checkpoint:
    return open_checkpoint(base_folder)
