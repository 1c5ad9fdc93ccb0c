"""Builds, fits and evaluates scikit-learn's estimators. Independent of stores, Ray and graphs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from threadpoolctl import threadpool_limits

from maas_ray.arrays import Array
from maas_ray.data.spec.features import TargetScaling
from maas_ray.errors import DataError
from maas_ray.models.classical import (
    ClassicalSpec,
    DecisionTreeSpec,
    GradientBoostingSpec,
    RandomForestSpec,
    SvmSpec,
    parse_classical,
)
from maas_ray.models.spec import ModelSpec

_CALIBRATION_FOLDS = 5
_SVR_EPSILON = 0.1  # scikit-learn's default
_RENAMED = {"size", "class_weight", "max_rows", "epsilon"}
"""Parameters that scikit-learn does not have under these names, or not for every task."""


@dataclass(frozen=True)
class Fitted:
    """A fitted estimator. Its prediction of a number is `shift + scale * estimator.predict(rows)`."""

    estimator: Any
    task: str
    shift: float = 0.0
    scale: float = 1.0

    def answer(self, rows: Array) -> tuple[Array, Array | None]:
        """Predictions of scikit-learn for preprocessed rows.

        Args:
            rows: float32 [N, width].

        Returns:
            float64 scores (classification: probabilities [N, C]; binary: probability of class 1 [N, 1]; regression:
            predictions [N, 1]), and the predicted class codes int64 [N], or None for a regression.
        """
        if self.task == "regression":
            return self.shift + self.scale * self.estimator.predict(rows).astype(np.float64).reshape(-1, 1), None
        probabilities = self.estimator.predict_proba(rows).astype(np.float64)
        classes = self.estimator.predict(rows).astype(np.int64)
        return (probabilities[:, 1:] if self.task == "binary" else probabilities), classes


def fit_estimator(
    model: ModelSpec,
    task: str,
    rows: Array,
    target: Array,
    *,
    seed: int,
    num_threads: int,
    weight: Array | None = None,
    scaling: TargetScaling | None = None,
) -> Fitted:
    """Fits a classical model. The same arguments give the same result with any number of threads.

    Args:
        model: one of `CLASSICAL`.
        task: classification, binary or regression.
        rows: preprocessed, float32 [N, width].
        target: class codes (every class occurs), or numbers, [N].
        seed: seed of all random numbers.
        num_threads: number of compute threads.
        weight: the weights of the rows [N], or None.
        scaling: regression: the scale in which the estimator learns; None: that of the data, except for an SVM.

    Raises:
        SpecError: a parameter is invalid for the task.
        DataError: a class with too few rows.
    """
    spec = parse_classical(model.name, model.params, task)
    shift, scale = 0.0, 1.0
    if task == "regression":
        wanted = target.astype(np.float64)
        if scaling is not None:
            shift, scale = scaling.shift[0], scaling.scale[0]
        elif isinstance(spec, SvmSpec):
            shift, scale = float(wanted.mean()), float(wanted.std()) or 1.0
        wanted = (wanted - shift) / scale
    else:
        wanted = target.astype(np.int64)
    estimator = _build(spec, task, wanted, seed % 2**32, num_threads)  # scikit-learn accepts 32 bits
    with threadpool_limits(limits=num_threads):
        estimator.fit(rows, wanted, sample_weight=weight)
    return Fitted(estimator, task, shift, scale)


def _build(spec: ClassicalSpec, task: str, target: Array, seed: int, num_threads: int) -> Any:
    is_regression = task == "regression"
    params = spec.model_dump(exclude=_RENAMED)
    if not is_regression:
        params["class_weight"] = spec.class_weight
    if isinstance(spec, DecisionTreeSpec):
        kind = DecisionTreeRegressor if is_regression else DecisionTreeClassifier
        return kind(max_depth=spec.size, random_state=seed, **params)
    if isinstance(spec, RandomForestSpec):
        if spec.max_features is None:
            del params["max_features"]
        kind = RandomForestRegressor if is_regression else RandomForestClassifier
        return kind(n_estimators=spec.size, n_jobs=num_threads, random_state=seed, **params)
    if isinstance(spec, GradientBoostingSpec):
        kind = HistGradientBoostingRegressor if is_regression else HistGradientBoostingClassifier
        # scikit-learn's early stopping would withhold rows from training if there are many.
        return kind(max_iter=spec.size, early_stopping=False, random_state=seed, **params)
    if is_regression:
        epsilon = getattr(spec, "epsilon", None)
        return SVR(epsilon=_SVR_EPSILON if epsilon is None else epsilon, **params)
    return _calibrated(SVC(random_state=seed, **params), target)


def _calibrated(machine: SVC, target: Array) -> CalibratedClassifierCV:
    """Calibrates probabilities from the distances to class boundaries, the only output of an SVM."""
    fewest = int(np.bincount(target).min())
    if fewest < 2:
        raise DataError(
            "svm calibrates its probabilities by cross-validation, which needs 2 rows of each class, but a class has 1 "
            "row in the training split; merge or remove rare classes, or choose another model"
        )
    return CalibratedClassifierCV(machine, cv=min(_CALIBRATION_FOLDS, fewest), ensemble=False)
