"""Parameters of the classical models, with scikit-learn's names. Imports neither scikit-learn nor torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from maas_ray.errors import SpecError
from maas_ray.spec import Spec, parse_spec


class ClassicalSpec(Spec):
    """Parameters of a classical model. Parameters with scikit-learn's names have scikit-learn's meaning."""

    class_weight: Literal["balanced"] | None = None
    """`balanced`: weights rows inversely to the number of rows of their class. Not for regression."""


class DecisionTreeSpec(ClassicalSpec):
    """Parameters of `decision_tree`. The main parameter is `size`, the maximum depth."""

    size: int = Field(default=8, ge=1, le=64)
    """Maximum depth of the tree; scikit-learn's `max_depth`."""
    min_samples_split: int = Field(default=2, ge=2)
    """Rows that a node needs to be split."""
    min_samples_leaf: PositiveInt = 1
    """Rows of each leaf."""
    max_leaf_nodes: int | None = Field(default=None, ge=2)
    """Maximum number of leaves; None: as many as the depth allows."""
    ccp_alpha: NonNegativeFloat = 0.0
    """Cost of a leaf in pruning; 0: no pruning."""


class RandomForestSpec(ClassicalSpec):
    """Parameters of `random_forest`. The main parameter is `size`, the number of trees."""

    size: PositiveInt = 100
    """Number of trees; scikit-learn's `n_estimators`."""
    max_depth: PositiveInt | None = 12
    """Maximum depth of each tree. With None, scikit-learn's default, trees and the served graph grow with the number of
    rows."""
    min_samples_split: int = Field(default=2, ge=2)
    """Rows that a node needs to be split."""
    min_samples_leaf: PositiveInt = 1
    """Rows of each leaf."""
    max_leaf_nodes: int | None = Field(default=None, ge=2)
    """Maximum leaves of each tree; None: as many as the depth allows."""
    max_features: Literal["sqrt", "log2"] | Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Features considered for a split: a function of their number, or a fraction in (0, 1] of it. None: scikit-learn's
    default, the square root for classification and all for regression."""
    bootstrap: bool = True
    """Whether each tree is trained on rows drawn with replacement instead of on all rows."""


class GradientBoostingSpec(ClassicalSpec):
    """Parameters of `gradient_boosting`, scikit-learn's histogram-based implementation. The main parameter is `size`,
    the number of boosting rounds.
    """

    size: PositiveInt = 100
    """Boosting rounds, each of one tree (or one per class); scikit-learn's `max_iter`."""
    learning_rate: PositiveFloat = 0.1
    """Factor by which each tree's contribution is multiplied."""
    max_leaf_nodes: int | None = Field(default=31, ge=2)
    """Maximum leaves of each tree."""
    max_depth: PositiveInt | None = None
    """Maximum depth of each tree; None: only the number of leaves is limited."""
    min_samples_leaf: PositiveInt = 20
    """Rows of each leaf."""
    l2_regularization: NonNegativeFloat = 0.0
    """L2 penalty on the values of leaves."""
    max_features: float = Field(default=1.0, gt=0.0, le=1.0)
    """Fraction of the features considered for a split."""
    max_bins: int = Field(default=255, ge=2, le=255)
    """Number of bins for each feature's values."""


class SvmSpec(ClassicalSpec):
    """Parameters of `svm`, a support vector machine. Its probabilities are calibrated by cross-validation; for
    regression the target is standardized, so that `C` and `epsilon` do not depend on its unit.
    """

    C: PositiveFloat = 1.0
    """Cost of a row on the wrong side of the margin; a smaller cost gives a smoother function."""
    kernel: Literal["rbf", "linear", "poly", "sigmoid"] = "rbf"
    """Kernel function: the similarity of two rows."""
    degree: PositiveInt = 3
    """Degree of the kernel `poly`."""
    gamma: Literal["scale", "auto"] | PositiveFloat = "scale"
    """Coefficient of the kernels `rbf`, `poly` and `sigmoid`."""
    coef0: float = 0.0
    """Constant term of the kernels `poly` and `sigmoid`."""
    tol: PositiveFloat = 1e-3
    """Tolerance at which the solver stops."""
    epsilon: NonNegativeFloat | None = None
    """Regression only: largest error without cost, in standard deviations of the target; None: 0.1."""
    max_rows: PositiveInt = 20_000
    """Maximum number of training rows; more are rejected, because training time grows with their square."""


CLASSICAL: dict[str, type[ClassicalSpec]] = {
    "decision_tree": DecisionTreeSpec,
    "random_forest": RandomForestSpec,
    "gradient_boosting": GradientBoostingSpec,
    "svm": SvmSpec,
}
"""The models that scikit-learn trains, by name in a spec."""

_DIALS = {"decision_tree": "max_depth", "random_forest": "n_estimators", "gradient_boosting": "max_iter"}
"""scikit-learn's names of `size`."""

TASKS = ("classification", "binary", "regression")
"""The tasks of classical models."""


def parse_classical(name: str, params: Mapping[str, Any], task: str | None = None) -> ClassicalSpec:
    """The parameters of a classical model, defaults included.

    Args:
        name: one of `CLASSICAL`.
        params: parameters given by the user.
        task: task to check the parameters against; None: not checked.

    Raises:
        SpecError: a parameter is unknown (with the nearest existing name), or a value is wrong or unfit for the task.
    """
    theirs = _DIALS.get(name)
    if theirs in params and theirs is not None:
        raise SpecError(f"model {name}: scikit-learn's {theirs} is called size here; use size: {params[theirs]!r}")
    parsed: ClassicalSpec = parse_spec(CLASSICAL[name], params, source=f"model {name}")
    if task is None:
        return parsed
    if task not in TASKS:
        raise SpecError(f"{name} supports the tasks {', '.join(TASKS)}; the task is {task}; use another model")
    if task == "regression" and parsed.class_weight is not None:
        raise SpecError(
            f"model {name}: class_weight {parsed.class_weight!r} is only for classification, but the task is "
            "regression; remove it"
        )
    if task != "regression" and isinstance(parsed, SvmSpec) and parsed.epsilon is not None:
        raise SpecError(
            f"model {name}: epsilon {parsed.epsilon} is only for regression, but the task is {task}; remove it"
        )
    return parsed
