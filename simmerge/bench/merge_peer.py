"""One merge by mergekit, timed, in mergekit's own interpreter; and the meter that both sides use.

Run as `python -I merge_peer.py JOB`, where JOB is JSON with the keys `config` (mergekit's configuration), `out`
(folder to write), `shard_bytes` and `threads`. Prints one line of JSON. Imports nothing of simmerge, which that
interpreter does not have, and nothing heavy before it is a program.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

STATUS = "/proc/self/status"
PERIOD = 0.002
"""Seconds between two looks at the memory in use."""


def anonymous_bytes(descriptor: int) -> int:
    """Anonymous memory of this process: what is neither a mapped file nor shared.

    Args:
        descriptor: the opened /proc/self/status.

    Raises:
        RuntimeError: the kernel does not say.
    """
    text = os.pread(descriptor, 8192, 0)
    found = text.find(b"RssAnon:")
    if found < 0:
        raise RuntimeError(f"{STATUS} has no line 'RssAnon'; this bench needs Linux 4.5 or later")
    return 1024 * int(text[found + 8 : text.index(b"kB", found)])


def measured(action: Callable[[], object]) -> dict[str, Any]:
    """What one call costs.

    Args:
        action: what to call, once.

    Returns:
        `seconds` of wall clock, `cpu_seconds` of all threads of this process, `anon_before_bytes`: anonymous
        memory before the call, mostly imports, and `anon_peak_bytes`: the most that was seen during the call,
        imports included.
    """
    descriptor = os.open(STATUS, os.O_RDONLY)
    done = threading.Event()
    before = anonymous_bytes(descriptor)
    peak = [before]

    def watch() -> None:
        while not done.wait(PERIOD):
            peak[0] = max(peak[0], anonymous_bytes(descriptor))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        cpu, start = time.process_time(), time.perf_counter()
        action()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    finally:
        done.set()
        watcher.join()
    peak[0] = max(peak[0], anonymous_bytes(descriptor))
    os.close(descriptor)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "anon_before_bytes": before,
        "anon_peak_bytes": peak[0],
    }


def _main(job: dict[str, Any]) -> None:
    torch: Any = import_module("torch")
    torch.set_num_threads(job["threads"])
    configuration: Any = import_module("mergekit.config").MergeConfiguration
    run_merge: Any = import_module("mergekit.merge").run_merge
    options: Any = import_module("mergekit.options").MergeOptions(
        out_shard_size=job["shard_bytes"], random_seed=0, quiet=True
    )
    config = configuration.model_validate(job["config"])
    result = measured(lambda: run_merge(config, job["out"], options))
    names = ("mergekit", "transformers", "safetensors")
    result["versions"] = {name: version(name) for name in names} | {"torch": str(torch.__version__)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
