"""Declarations of the built-in operators, by family; `simmerge.operators.table` is the registry."""
