if __name__ != "simmerge.features":
    raise ImportError(
        f"import simmerge.features, not {__name__}: this folder is a part of the simmerge package"
    )
