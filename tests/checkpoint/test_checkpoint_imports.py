"""The command line opens checkpoints without torch, which takes seconds to import."""

import subprocess
import sys


def test_the_package_imports_no_torch() -> None:
    code = "import sys, simmerge.checkpoint; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
