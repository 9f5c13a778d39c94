"""A search lists candidates and decides which of them deserve to be measured."""

if __name__ != "simmerge.search":
    raise ImportError(f"import simmerge.search, not {__name__}: this folder is a part of the simmerge package")
