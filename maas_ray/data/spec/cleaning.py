"""The user's cleaning policies: missing values, conversion, scaling, encoding. Specification only."""

from typing import Literal, Self

from pydantic import Field, model_validator

from maas_ray.data.spec.features import DATE_PARTS, DateEncoding
from maas_ray.spec import Spec

Missing = Literal["error", "mean", "median", "most_frequent", "constant", "drop_row"]
Scaling = Literal["none", "standard", "min_max"]
Encoding = Literal["one_hot", "ordinal"]
Unknown = Literal["zeros", "code"]


class _MissingPolicy(Spec):
    """The fields and checks that all policies share."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.model_dump(include={"missing", "constant"})
        if (fields["missing"] == "constant") != (fields["constant"] is not None):
            raise ValueError("`missing: constant` and `constant: <value>` belong together")
        return self


class NumericPolicy(_MissingPolicy):
    """Default for numeric columns."""

    missing: Missing = "error"
    """The replacement for a missing value, fitted on the training split. `drop_row` drops the whole row from its split,
    `error` rejects the data. With any other policy the endpoint accepts a null as well."""
    constant: float | None = None
    """The value for `missing: constant`."""
    scaling: Scaling = "standard"
    """`standard`: (x - mean) / standard deviation; `min_max`: (x - min) / (max - min), so that training values
    are in [0, 1]. Fitted after missing values are filled, as in a scikit-learn pipeline."""


class CategoricalPolicy(_MissingPolicy):
    """Default for categorical columns."""

    missing: Literal["error", "most_frequent", "constant", "drop_row"] = "error"
    """As for numbers; a constant that the training split does not contain becomes a category of its own."""
    constant: str | None = None
    """The value for `missing: constant`."""
    encoding: Encoding = "one_hot"
    """`one_hot`: one feature per category of the training split; `ordinal`: one feature, the category's index in sorted
    order."""
    unknown: Unknown = Field(default="zeros", exclude_if=lambda value: value == "zeros")
    """A category that the training split does not contain: with `zeros` it is all zeros in `one_hot` and -1 in `ordinal`;
    with `code` it has a code of its own after the last category, which is one more feature in `one_hot`. An embedding
    needs `code`, since it has no row for -1. No training row has this code, so its weights keep their initial values."""


class TensorPolicy(_MissingPolicy):
    """Default for tensor columns, such as images."""

    missing: Literal["error", "mean", "constant", "drop_row"] = "error"
    """The replacement for a NaN inside a tensor; `mean` is taken over all elements of all tensors."""
    constant: float | None = None
    """The value for `missing: constant`."""
    scaling: Scaling = "standard"
    """As for numbers. A vector is scaled element by element; in a tensor of two or more dimensions (an image) all
    elements share one shift and one scale."""


class ColumnPolicy(_MissingPolicy):
    """Exceptions for one column; a field that is not set keeps the default for the column's kind."""

    cast: Literal["number", "category", "date"] | None = None
    """Converts the column; a value that cannot be converted is counted in the report and treated as missing. `date`
    reads dates and times, in text as ISO 8601 (`2026-12-01`, `2026-12-01T09:30`); without a zone they are UTC. A missing
    date is filled with the mean of each of its numbers, unless the policy is `error` or `drop_row`."""
    date_format: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """For `cast: date`: the format of the text, as of Python's strptime: `%d.%m.%Y`."""
    missing: Missing | None = None
    """See the default for the column's kind."""
    constant: float | str | None = None
    """The value for `missing: constant`."""
    scaling: Scaling | None = None
    """For numbers and tensors."""
    encoding: Encoding | DateEncoding | None = None
    """For categories: see the default. For dates: `parts` (the default): year, month, day, weekday and hour as five
    numbers; `epoch`: days as one number; `cyclic`: sine and cosine of the time of the year, the week and the day."""
    unknown: Unknown | None = Field(default=None, exclude_if=lambda value: value is None)
    """For categories."""

    @model_validator(mode="after")
    def _fits_the_cast(self) -> Self:
        if self.date_format is not None and self.cast != "date":
            raise ValueError("date_format needs `cast: date`")
        if self.encoding in DATE_PARTS and self.cast != "date":
            raise ValueError(f"encoding: {self.encoding} needs `cast: date`")
        return self


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
    """Columns to leave out."""
    max_categories: int = Field(default=1000, ge=2, le=1_000_000)
    """A column with more categories is rejected: it is an identifier or free text rather than a category."""
    max_distinct: float = Field(default=0.5, gt=0, le=1, exclude_if=lambda value: value == 0.5)
    """A column of more than 20 categories is rejected as well if it has more categories than this share of the rows of
    the training split: most of its values would be unknown on the endpoint."""
