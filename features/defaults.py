"""The shipped probe set, for workspaces without probes of their own."""

from simmerge.data import shipped
from simmerge.errors import UsageError
from simmerge.features.probes import ProbeSet, load_probes

DEFAULT_COUNT = 128
"""By `simmerge bench probes`: losses by domain rank as those on all 256 probes do with Spearman 0.94 on 32 probes, 0.97
on 64, 0.99 on 128. The other measures hang on the number of kept positions, and change little from 16 probes on."""


def default_probes(count: int = DEFAULT_COUNT) -> ProbeSet:
    """The first `count` shipped probes, of 17 domains in turn: English text of seven kinds, code, nine languages.

    Made by `data/build/probes.py` from sentences of our own; licensed as the project is (Apache-2.0).

    Raises:
        UsageError: `count` is below 1 or above the 256 that are shipped.
    """
    whole = load_probes(shipped("probes", "default.jsonl"))
    if not 1 <= count <= len(whole.texts):
        raise UsageError(f"the shipped probe set has 1 to {len(whole.texts)} probes, got {count}")
    return ProbeSet(name=f"default-{count}", texts=whole.texts[:count], domains=whole.domains[:count])
