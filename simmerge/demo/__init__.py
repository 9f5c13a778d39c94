"""The demo: the whole story on the shipped catalogue, asked about checkpoints that no training row contains."""

HELD_OUT: tuple[str, ...] = ("italian", "code", "reverse", "numbers", "polish")
"""Checkpoints of the shipped catalogue that the demo asks about. They were named before any merge was
measured: two languages, source code, and two kinds of skill, long and short, fast and gentle."""

FOREIGN = "stranger"
"""The shipped checkpoint that descends from another base; the catalogue check has to refuse it."""
