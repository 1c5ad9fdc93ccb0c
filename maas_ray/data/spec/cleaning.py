"""How columns are cleaned, as the user says it: missing values, conversion, scaling, encoding. Computes nothing."""

from typing import Literal, Self

from pydantic import Field, model_validator

from maas_ray.spec import Spec

Missing = Literal["error", "mean", "median", "most_frequent", "constant", "drop_row"]
Scaling = Literal["none", "standard", "min_max"]
Encoding = Literal["one_hot", "ordinal"]


class _MissingPolicy(Spec):
    """What all policies share."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.model_dump(include={"missing", "constant"})
        if (fields["missing"] == "constant") != (fields["constant"] is not None):
            raise ValueError("`missing: constant` and `constant: <value>` belong together")
        return self


class NumericPolicy(_MissingPolicy):
    """Default for columns of numbers."""

    missing: Missing = "error"
    """What a missing value becomes. Fitted on the training split; `drop_row` leaves the whole row out of every split,
    `error` refuses the data. Unless it is `error` or `drop_row`, the endpoint accepts a null as well."""
    constant: float | None = None
    """The value for `missing: constant`."""
    scaling: Scaling = "standard"
    """`standard`: (x - mean) / standard deviation; `min_max`: (x - min) / (max - min), so that training values
    lie in [0, 1]. Fitted after missing values are filled, as in a scikit-learn pipeline."""


class CategoricalPolicy(_MissingPolicy):
    """Default for columns of categories."""

    missing: Literal["error", "most_frequent", "constant", "drop_row"] = "error"
    """As for numbers; a constant that training does not contain becomes a category of its own."""
    constant: str | None = None
    """The value for `missing: constant`."""
    encoding: Encoding = "one_hot"
    """`one_hot`: one feature per category of the training split, all zeros for an unknown one; `ordinal`: the
    category's place in sorted order as one feature, -1 for an unknown one."""


class TensorPolicy(_MissingPolicy):
    """Default for tensor columns, such as images."""

    missing: Literal["error", "mean", "constant", "drop_row"] = "error"
    """What a NaN inside a tensor becomes; `mean` is taken over all elements of all tensors."""
    constant: float | None = None
    """The value for `missing: constant`."""
    scaling: Scaling = "standard"
    """As for numbers. A vector is scaled element by element; from two dimensions on (an image) all elements
    share one shift and one scale."""


class ColumnPolicy(_MissingPolicy):
    """What is different for one column; a field that is not given keeps the default of the column's kind."""

    cast: Literal["number", "category"] | None = None
    """Converts the column; what cannot be converted is counted in the report and then is a missing value."""
    missing: Missing | None = None
    """See the default of the column's kind."""
    constant: float | str | None = None
    """The value for `missing: constant`."""
    scaling: Scaling | None = None
    """For numbers and tensors."""
    encoding: Encoding | None = None
    """For categories."""


class CleaningSpec(Spec):
    """Cleaning of all feature columns. Statistics are fitted on the training split alone."""

    numeric: NumericPolicy = NumericPolicy()
    """Default for numbers."""
    categorical: CategoricalPolicy = CategoricalPolicy()
    """Default for categories."""
    tensor: TensorPolicy = TensorPolicy()
    """Default for tensors."""
    columns: dict[str, ColumnPolicy] = Field(default_factory=dict)
    """Exceptions by column name."""
    drop: tuple[str, ...] = ()
    """Columns that are not used."""
    max_categories: int = Field(default=1000, ge=2, le=1_000_000)
    """A column with more categories is refused: it is an identifier or free text rather than a category."""
