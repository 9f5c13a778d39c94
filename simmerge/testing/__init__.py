"""Help for the tests of SimMerge and of its plug-ins: small real checkpoints, contract tests."""
