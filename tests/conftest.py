import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: two threads are what the project's machines have, and results must not
# depend on the number; the hub is never asked.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, five checkpoints of it, a stranger, tasks and a surrogate; see `simmerge.testing.family`."""
    from simmerge.testing.family import make_family

    return make_family(tmp_path_factory.mktemp("family"))
