"""The user's specification of the held-out rows and of rare classes. Specification only."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec

SPLITS = ("train", "validation", "test")


class FoldSpec(Spec):
    """One fold of a k-fold cross-validation."""

    index: int = Field(ge=0)
    """Number of the fold that is the test split, from 0."""
    of: int = Field(ge=2, le=100)
    """Number of folds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index {self.index} is not below the number of folds, {self.of}")
        return self


class SplitSpec(Spec):
    """The rows that are held out. By default a row's split depends on its index, the number of rows and the seed, and on
    nothing else.
    """

    validation: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the rows that is used to validate during training; 0: no validation split."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of the rows that is used for the final evaluation; 0: no test split."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the split; another seed gives another split."""
    column: str | None = None
    """A column that contains `train`, `validation` or `test` for each row; the fractions and the seed are then
    ignored. Together with `group`, a group in several splits is refused."""
    stratify: bool | str = Field(default=False, exclude_if=lambda value: value is False)
    """`true`: every class has the same share of each split; a column: every value of this column has. At least one row
    of each class or value is for training."""
    group: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column, such as a patient or a document: all rows with the same value are in the same split. A group's split
    depends on its value, the seed and the sizes of the groups, not on the order of rows. Not a feature, unless
    `features` names it."""
    order_by: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column of numbers, dates or times: the last rows are the test split, those before them the validation split.
    Rows with equal values are in the same split; the seed has no effect. Not a feature, unless `features` names it."""
    fold: FoldSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    """The test split is one fold of a cross-validation instead of the fraction `test`; the test splits of all folds
    contain every row once. With `order_by`, fold i is tested on block i + 1 of `of` + 1 blocks of rows and trained on
    the blocks before it. `maas-ray cv` sets it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen = [
            name
            for name, value in (("stratify", self.stratify), ("group", self.group), ("order_by", self.order_by))
            if value
        ]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} cannot be combined; keep one of them")
        if self.column is not None and (others := [name for name in chosen if name != "group"]):
            raise ValueError(f"column and {others[0]} cannot be combined: the column already decides every row's split")
        if self.column is not None and self.fold is not None:
            raise ValueError("column and fold cannot be combined: the column already decides every row's split")
        if self.column is not None and self.column in (self.group, self.stratify):
            raise ValueError(f"{self.column!r} cannot be both the split column and the group column")
        if self.stratify == "":
            raise ValueError("stratify is empty; give true or the name of a column")
        test = self.test if self.fold is None else 1 / self.fold.of
        if self.validation + test >= 1:
            named = f"test {self.test}" if self.fold is None else f"a test split of 1/{self.fold.of}"
            raise ValueError(
                f"validation {self.validation} + {named} leave nothing for training; their sum must be below 1"
            )
        return self

    @property
    def other_columns(self) -> tuple[str, ...]:
        """Columns that only the split uses, unless `features` names them."""
        return tuple(name for name in (self.group, self.order_by) if name is not None)

    def key(self, target: str) -> str | None:
        """The column whose values decide the split together with their counts; None: no column, or `column` alone.

        Args:
            target: name of the target column.
        """
        if isinstance(self.stratify, str):
            return self.stratify
        return target if self.stratify else self.group or self.order_by


class RareClassesSpec(Spec):
    """Classes with few rows are merged into one class."""

    min_rows: PositiveInt
    """Classes with fewer rows, over all splits, are merged."""
    merge_into: str = Field(default="other", min_length=1)
    """Name of the class that they become; it may be an existing class."""
