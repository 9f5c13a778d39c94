"""A bench measures one claim of this project against its baselines and prints figures and targets."""
