"""Keeping the hub's libraries off the network, without forgetting what the user had said about it."""

import os

VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What huggingface_hub, datasets and transformers read, each when it is imported."""

# In the environment and not in this module, so that a process that we start knows it too.
_OURS = "SIMMERGE_WENT_OFFLINE"


def go_offline() -> None:
    """Set those of `VARIABLES` that the user has not set, for this process and all that it starts.

    Call it before the libraries are imported: later it changes nothing in this process.
    """
    ours = [name for name in VARIABLES if name not in os.environ]
    for name in ours:
        os.environ[name] = "1"
    if ours:
        os.environ[_OURS] = ",".join([*filter(None, os.environ.get(_OURS, "").split(",")), *ours])


def users_environment() -> dict[str, str]:
    """The environment without what `go_offline` set, for a process that may ask the hub if the user lets it."""
    ours = [_OURS, *os.environ.get(_OURS, "").split(",")]
    return {name: value for name, value in os.environ.items() if name not in ours}
