"""The pipeline knows every part and joins them: catalog, features, surrogate, search, evaluation, answer."""
