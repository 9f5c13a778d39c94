"""Ridge regression on standardised features with missing indicators and screened products.

With a few hundred rows a regularised linear model often beats boosting (Demystifying Mergeability,
https://arxiv.org/abs/2601.22285). Plain numpy; saved as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge.errors import SurrogateError
from simmerge.surrogate.folds import usable_folds
from simmerge.surrogate.rows import Bools, Floats, Ints, TrainingRows, codes
from simmerge.threads import one_blas_thread

STRENGTHS = tuple(10.0 ** (half / 2.0) for half in range(-10, 5))
"""Candidate ridge strengths per unit of total weight, from 1e-5 to 1e2."""
FALLBACK_STRENGTH = 0.1
"""Strength where too few checkpoints leave no inner fold to choose it on."""
CLIP = 5.0
"""Standardised values are cut here: a linear model must not follow one wild feature out of range."""
MAX_PRODUCTS = 40
ROWS_PER_PRODUCT = 25
SCREEN_Z = 3.0
"""A product enters only if its correlation with the residual is above this many standard errors."""
_INNER_FOLDS = 4
_SCREEN_STRENGTH = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ridge:
    """A fitted ridge regression: prediction = intercept + sum over columns of coefficient x deviation.

    Columns are the `d` features (missing values at the median), one indicator per feature that was missing
    in training, and products of two standardised features; `p` counts the first two kinds, `q` products.

    Attributes:
        median: `(d,)` value that stands for a missing one; 0 for a feature that was always missing.
        missing: `(m,)` features with a missing indicator.
        center: `(p,)` means in training.
        unit: `(p,)` one over the standard deviation; 0 for a column that was constant in training.
        products: `(q, 2)` features whose standardised values are multiplied.
        product_unit: `(q,)` one over the product's standard deviation.
        offset: `(p + q,)` weighted mean of each column after cutting at `CLIP`.
        coefficients: `(p + q,)` change of the prediction per standard deviation.
        intercept: weighted mean of the training targets, which is also the expectation of the prediction.
        strength: chosen ridge strength per unit of weight.
    """

    median: Floats
    missing: Ints
    center: Floats
    unit: Floats
    products: Ints
    product_unit: Floats
    offset: Floats
    coefficients: Floats
    intercept: float
    strength: float

    def predict(self, features: Floats) -> Floats:
        """Predictions `(rows,)` for features `(rows, d)`."""
        # einsum keeps each row's sum apart from the rest of the batch and from BLAS threads.
        terms: Floats = np.einsum("ij,j->i", self.deviations(features), self.coefficients)
        return self.intercept + terms

    def contributions(self, features: Floats) -> Floats:
        """Share of each feature in each prediction, `(rows, d + 1)`; the last column is the expectation.

        A missing indicator counts for its feature, a product half for each of its two.
        """
        width = len(self.median)
        terms = self.deviations(features) * self.coefficients
        result = np.zeros((len(features), width + 1))
        result[:, :width] = terms[:, :width]
        main = len(self.center)
        for column, feature in enumerate(self.missing):
            result[:, feature] += terms[:, width + column]
        for column, (first, second) in enumerate(self.products):
            result[:, first] += 0.5 * terms[:, main + column]
            result[:, second] += 0.5 * terms[:, main + column]
        result[:, width] = self.intercept
        return result

    def deviations(self, features: Floats) -> Floats:
        """Columns of the model minus their training means, `(rows, p + q)`, in standard deviations."""
        main = _main(features, self)
        left, right = self.products[:, 0], self.products[:, 1]
        return np.hstack((main, main[:, left] * main[:, right] * self.product_unit)) - self.offset

    def to_dict(self) -> dict[str, Any]:
        """Plain data of the model; `ridge_from_dict` reads it back bit for bit."""
        return {
            name: value.tolist() if isinstance(value := getattr(self, name), np.ndarray) else value for name in _FIELDS
        }


_FIELDS = (
    "median", "missing", "center", "unit", "products", "product_unit",
    "offset", "coefficients", "intercept", "strength",
)  # fmt: skip


def ridge_from_dict(data: Mapping[str, Any]) -> Ridge:
    """The model that `Ridge.to_dict` wrote.

    Raises:
        SurrogateError: a field is missing or the shapes disagree.
    """
    absent = [name for name in _FIELDS if name not in data]
    if absent:
        raise SurrogateError(f"the saved ridge lacks '{absent[0]}'; the file is damaged. Fit the surrogate again.")
    floats = {
        name: np.asarray(data[name], dtype=np.float64)
        for name in ("median", "center", "unit", "product_unit", "offset", "coefficients")
    }
    missing = np.asarray(data["missing"], dtype=np.int64).reshape(-1)
    products = np.asarray(data["products"], dtype=np.int64).reshape(-1, 2)
    main, columns = len(floats["median"]) + len(missing), len(floats["coefficients"])
    lengths = (len(floats["center"]), len(floats["unit"]), len(floats["offset"]), len(floats["product_unit"]))
    if lengths != (main, main, columns, len(products)) or columns != main + len(products):
        raise SurrogateError("the saved ridge's arrays disagree in length; the file is damaged. Fit it again.")
    return Ridge(
        **floats,
        missing=missing,
        products=products,
        intercept=float(data["intercept"]),
        strength=float(data["strength"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Main:
    """Imputation and standardisation, without products; the fields are those of `Ridge`."""

    median: Floats
    missing: Ints
    center: Floats
    unit: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Design:
    """Columns of a fit and its normal equations in the basis of their eigenvectors."""

    main: _Main
    products: Ints
    product_unit: Floats
    offset: Floats
    intercept: float
    values: Floats
    vectors: Floats
    moment: Floats
    total: float

    def solve(self, strength: float) -> Floats:
        """Coefficients (A'WA + strength·total·I)^-1 A'Wy."""
        return self.vectors @ (self.moment / (self.values + strength * self.total))

    def ridge(self, strength: float) -> Ridge:
        return Ridge(
            median=self.main.median,
            missing=self.main.missing,
            center=self.main.center,
            unit=self.main.unit,
            products=self.products,
            product_unit=self.product_unit,
            offset=self.offset,
            coefficients=self.solve(strength),
            intercept=self.intercept,
            strength=strength,
        )


def fit_ridge(rows: TrainingRows, seed: int, *, products: bool = True) -> Ridge:
    """Ridge regression with a strength chosen by cross-validation over checkpoints.

    Minimises sum w (y - a - Z b)^2 + strength · sum(w) · |b|^2 through the eigenvectors of Z'WZ, so that all
    strengths of the grid cost one decomposition.

    Products are those of an operator descriptor (a feature that is the same for all rows of a form, see
    `descriptors`) with any other feature. They are screened on the residual of the fit without products:
    the `MAX_PRODUCTS` (and at most one per `ROWS_PER_PRODUCT` rows) of largest correlation that are beyond
    `SCREEN_Z` standard errors enter. The screening is repeated in every inner fold.

    Args:
        rows: measured rows.
        seed: seed of the inner folds.
        products: False leaves the products out.
    """
    with one_blas_thread():
        strength = _choose_strength(rows, seed, products=products)
        return _design(rows, products=products).ridge(strength)


def descriptors(rows: TrainingRows) -> Bools:
    """Which features describe the operator alone: the same for all rows of a form, not for all rows.

    Where forms hardly repeat (fewer than 4 rows each on average: continuous coefficients), the rule is
    applied to operators in place of forms.

    Returns:
        `(d,)` booleans.
    """
    code, kinds = codes(rows.form)
    if len(rows) < 4 * len(kinds):
        code, kinds = codes(rows.operator)
    filled = np.nan_to_num(rows.features, nan=np.inf)
    first = np.unique(code, return_index=True)[1]
    return np.all(filled == filled[first][code], axis=0) & np.any(filled != filled[0], axis=0)


def _choose_strength(rows: TrainingRows, seed: int, *, products: bool) -> float:
    inner = usable_folds(rows.sources, _INNER_FOLDS, seed)
    error = np.zeros(len(STRENGTHS))
    used = False
    for fold in inner:
        if rows.weight[fold.train].sum() <= 0 or len(fold.train) < 4:
            continue
        used = True
        design = _design(rows, fold.train, products=products)
        columns = design.ridge(1.0).deviations(rows.features[fold.test])
        for i, strength in enumerate(STRENGTHS):
            predicted = design.intercept + np.einsum("ij,j->i", columns, design.solve(strength))
            error[i] += np.sum(rows.weight[fold.test] * (rows.target[fold.test] - predicted) ** 2)
    return STRENGTHS[int(np.argmin(error))] if used else FALLBACK_STRENGTH


def _fit_main(features: Floats) -> _Main:
    absent = np.isnan(features)
    counted = ~absent.all(axis=0)
    median = np.zeros(features.shape[1])
    median[counted] = np.nanmedian(features[:, counted], axis=0)
    missing = np.flatnonzero(absent.any(axis=0) & counted)
    columns = np.hstack((np.where(absent, median, features), absent[:, missing].astype(np.float64)))
    center, spread = columns.mean(axis=0), columns.std(axis=0)
    # A column that is constant up to rounding carries nothing; dividing by its spread would amplify noise.
    varies = spread > 1e-12 * np.maximum(1.0, np.abs(center))
    unit = np.divide(1.0, spread, out=np.zeros_like(spread), where=varies)
    return _Main(median=median, missing=missing, center=center, unit=unit)


def _main(features: Floats, fitted: _Main | Ridge) -> Floats:
    absent = np.isnan(features)
    columns = np.hstack((np.where(absent, fitted.median, features), absent[:, fitted.missing].astype(np.float64)))
    return np.clip((columns - fitted.center) * fitted.unit, -CLIP, CLIP)


def _design(rows: TrainingRows, index: Ints | None = None, *, products: bool) -> _Design:
    where = np.arange(len(rows)) if index is None else index
    weight, target = rows.weight[where], rows.target[where]
    total = float(weight.sum())
    fitted = _fit_main(rows.features[where])
    main = _main(rows.features[where], fitted)
    intercept = float(np.sum(weight * target) / total)
    pairs, pair_unit = np.zeros((0, 2), dtype=np.int64), np.zeros(0)
    if products:
        pairs, pair_unit = _screen(main, target - intercept, weight, descriptors(rows))
    columns = np.hstack((main, main[:, pairs[:, 0]] * main[:, pairs[:, 1]] * pair_unit))
    offset = (weight[:, None] * columns).sum(axis=0) / total
    values, vectors, moment = _normal(columns - offset, target - intercept, weight)
    return _Design(
        main=fitted,
        products=pairs,
        product_unit=pair_unit,
        offset=offset,
        intercept=intercept,
        values=values,
        vectors=vectors,
        moment=moment,
        total=total,
    )


def _normal(columns: Floats, target: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
    """Eigenvalues and vectors of A'WA, and A'Wy in that basis."""
    weighted = columns * np.sqrt(weight)[:, None]
    values, vectors = np.linalg.eigh(weighted.T @ weighted)
    # Rounding makes the smallest eigenvalues slightly negative; with weak ridge that would flip signs.
    return np.maximum(values, 0.0), vectors, vectors.T @ (columns.T @ (weight * target))


def _screen(main: Floats, target: Floats, weight: Floats, described: Bools) -> tuple[Ints, Floats]:
    """Products `(q, 2)` that explain the residual of the main effects, and one over their spread `(q,)`."""
    nothing = np.zeros((0, 2), dtype=np.int64), np.zeros(0)
    total, width = float(weight.sum()), len(described)
    lively = main.std(axis=0) > 0
    left, right = np.flatnonzero(described & lively[:width]), np.flatnonzero(~described & lively[:width])
    limit = min(MAX_PRODUCTS, len(main) // ROWS_PER_PRODUCT)
    if limit == 0 or len(left) == 0 or len(right) == 0:
        return nothing
    offset = (weight[:, None] * main).sum(axis=0) / total
    values, vectors, moment = _normal(main - offset, target, weight)
    residual = target - (main - offset) @ (vectors @ (moment / (values + _SCREEN_STRENGTH * total)))
    share = (weight / total)[:, None]
    a, b = main[:, left], main[:, right]
    mean = (a * share).T @ b
    variance = np.maximum((a * a * share).T @ (b * b) - mean * mean, 0.0)
    covariance = (a * share * residual[:, None]).T @ b  # the residual's own mean is 0
    noise = float(np.sum(share[:, 0] * residual**2))
    live = variance > 1e-12
    score = np.zeros_like(mean)
    score[live] = np.abs(covariance[live]) / np.sqrt(variance[live] * max(noise, 1e-300)) * np.sqrt(len(main))
    order = np.argsort(-score, axis=None, kind="stable")[:limit]
    order = order[score.ravel()[order] > SCREEN_Z]
    i, j = np.unravel_index(order, score.shape)
    return np.stack((left[i], right[j]), axis=1).astype(np.int64), 1.0 / np.sqrt(variance[i, j])
