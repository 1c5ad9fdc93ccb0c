"""Classical models by name: their parameters, as scikit-learn calls them. Imports neither scikit-learn nor torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from maas_ray.errors import SpecError
from maas_ray.spec import Spec, parse_spec


class ClassicalSpec(Spec):
    """Parameters of a classical model. Those with scikit-learn's names mean what they mean there."""

    class_weight: Literal["balanced"] | None = None
    """`balanced`: rows count inversely to the number of rows of their class. Not for regression."""


class DecisionTreeSpec(ClassicalSpec):
    """Parameters of `decision_tree`. The one dial is `size`: so many questions from the root to a leaf at most."""

    size: int = Field(default=8, ge=1, le=64)
    """Depth of the tree at most; scikit-learn's `max_depth`."""
    min_samples_split: int = Field(default=2, ge=2)
    """Rows that a node needs to be split."""
    min_samples_leaf: PositiveInt = 1
    """Rows of each leaf."""
    max_leaf_nodes: int | None = Field(default=None, ge=2)
    """Leaves at most; None: as many as the depth allows."""
    ccp_alpha: NonNegativeFloat = 0.0
    """Cost of a leaf in pruning; 0: not pruned."""


class RandomForestSpec(ClassicalSpec):
    """Parameters of `random_forest`. The one dial is `size`: the number of trees."""

    size: PositiveInt = 100
    """Number of trees; scikit-learn's `n_estimators`."""
    max_depth: PositiveInt | None = 12
    """Depth of each tree at most. None, scikit-learn's own default, lets trees and the served graph grow with the
    number of rows."""
    min_samples_split: int = Field(default=2, ge=2)
    """Rows that a node needs to be split."""
    min_samples_leaf: PositiveInt = 1
    """Rows of each leaf."""
    max_leaf_nodes: int | None = Field(default=None, ge=2)
    """Leaves of each tree at most; None: as many as the depth allows."""
    max_features: Literal["sqrt", "log2"] | Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Features looked at for a split: a function or a share (0, 1] of their number. None: scikit-learn's default, the
    square root for classes and all for regression."""
    bootstrap: bool = True
    """Whether each tree sees rows drawn with replacement, instead of all."""


class GradientBoostingSpec(ClassicalSpec):
    """Parameters of `gradient_boosting`, scikit-learn's histogram-based one. The one dial is `size`: its rounds."""

    size: PositiveInt = 100
    """Boosting rounds, each of one tree (or one per class); scikit-learn's `max_iter`."""
    learning_rate: PositiveFloat = 0.1
    """Factor of what each tree adds."""
    max_leaf_nodes: int | None = Field(default=31, ge=2)
    """Leaves of each tree at most."""
    max_depth: PositiveInt | None = None
    """Depth of each tree at most; None: only the leaves are bounded."""
    min_samples_leaf: PositiveInt = 20
    """Rows of each leaf."""
    l2_regularization: NonNegativeFloat = 0.0
    """Penalty on the values of leaves."""
    max_features: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the features looked at for a split."""
    max_bins: int = Field(default=255, ge=2, le=255)
    """Bins into which each feature's values are put."""


class SvmSpec(ClassicalSpec):
    """Parameters of `svm`, a support vector machine: its probabilities are calibrated by cross-validation, and a
    regression's target is standardized, so that `C` and `epsilon` mean the same in any unit.
    """

    C: PositiveFloat = 1.0
    """Cost of a row on the wrong side; the smaller, the smoother."""
    kernel: Literal["rbf", "linear", "poly", "sigmoid"] = "rbf"
    """Similarity of two rows."""
    degree: PositiveInt = 3
    """Degree of the kernel `poly`."""
    gamma: Literal["scale", "auto"] | PositiveFloat = "scale"
    """Reach of the kernels `rbf`, `poly` and `sigmoid`."""
    coef0: float = 0.0
    """Constant term of the kernels `poly` and `sigmoid`."""
    tol: PositiveFloat = 1e-3
    """Precision at which the solver stops."""
    epsilon: NonNegativeFloat | None = None
    """Regression only: error that costs nothing, in standard deviations of the target; None: 0.1."""
    max_rows: PositiveInt = 20_000
    """Training rows above which the run is refused, because time grows with their square."""


CLASSICAL: dict[str, type[ClassicalSpec]] = {
    "decision_tree": DecisionTreeSpec,
    "random_forest": RandomForestSpec,
    "gradient_boosting": GradientBoostingSpec,
    "svm": SvmSpec,
}
"""The models that scikit-learn trains, by their names in a spec."""

_DIALS = {"decision_tree": "max_depth", "random_forest": "n_estimators", "gradient_boosting": "max_iter"}
"""What scikit-learn calls `size`."""

TASKS = ("classification", "binary", "regression")
"""What classical models can learn."""


def parse_classical(name: str, params: Mapping[str, Any], task: str | None = None) -> ClassicalSpec:
    """The parameters of a classical model, defaults included.

    Args:
        name: one of `CLASSICAL`.
        params: as the user gave them.
        task: what is learned; None: not checked.

    Raises:
        SpecError: an unknown parameter (with the nearest right name), a bad value, or one that does not fit the task.
    """
    theirs = _DIALS.get(name)
    if theirs in params and theirs is not None:
        raise SpecError(f"model {name}: scikit-learn's {theirs} is called size here: size: {params[theirs]!r}")
    parsed: ClassicalSpec = parse_spec(CLASSICAL[name], params, source=f"model {name}")
    if task is None:
        return parsed
    if task not in TASKS:
        raise SpecError(f"{name} learns {', '.join(TASKS)}; the task is {task}: choose another model")
    if task == "regression" and parsed.class_weight is not None:
        raise SpecError(
            f"model {name}: class_weight {parsed.class_weight!r} weighs classes, and the task is regression"
        )
    if task != "regression" and isinstance(parsed, SvmSpec) and parsed.epsilon is not None:
        raise SpecError(f"model {name}: epsilon {parsed.epsilon} is the width of a regression, and the task is {task}")
    return parsed
