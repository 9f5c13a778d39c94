"""Features are numbers that describe a candidate, computed from fingerprints, without reading weights.

In the order of use:

* `probes`: `ProbeSet`, `load_probes`, `tokenize`
* `extract`: `make_fingerprint` (needs torch, as `structure` and `behaviour` do, that it is made of)
* `fingerprint`: `Fingerprint`, `save_fingerprint`, `load_fingerprint`, `require_comparable`
* `measures`: CKA, KL, cosine and the rest, as pure functions
* `pairs`: `pair_features`, `pair_matrix`
* `candidates`: `CandidateFeatures`, explained in `docs/features.md`
"""

if __name__ != "simmerge.features":
    raise ImportError(f"import simmerge.features, not {__name__}: this folder is a part of the simmerge package")
