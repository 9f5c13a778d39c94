"""Merges by mergekit: requests on standard input, seconds on standard output; run by its interpreter, not imported."""

import importlib
import json
import sys
import time


def main() -> None:
    """Read `{threads, jobs: [{config, out, seed}]}`, make every merge, print the seconds of each as JSON."""
    request = json.load(sys.stdin)
    yaml = importlib.import_module("yaml")
    torch = importlib.import_module("torch")
    config = importlib.import_module("mergekit.config")
    merge = importlib.import_module("mergekit.merge")
    options = importlib.import_module("mergekit.options")
    torch.set_num_threads(request["threads"])
    seconds: list[float] = []
    for job in request["jobs"]:
        parsed = config.MergeConfiguration.model_validate(yaml.safe_load(job["config"]))
        chosen = options.MergeOptions(random_seed=job["seed"], quiet=True)
        start = time.perf_counter()
        try:
            merge.run_merge(parsed, job["out"], options=chosen, config_source=job["config"])
        except Exception as error:
            raise SystemExit(f"{job['config']}\n{type(error).__name__}: {error}") from error
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
