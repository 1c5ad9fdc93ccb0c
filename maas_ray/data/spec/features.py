"""The fitted description of the feature columns and the target, as plain JSON. Independent of sources and torch.

The same description drives the torch preprocessing module, the encoder of the training loader and the exported
graph, so an endpoint that takes raw values cannot disagree with training.
"""

from collections.abc import Iterator
from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.decoding.spec import ImageEncoding
from maas_ray.row import InputColumn, Row
from maas_ray.spec import Spec

Task = Literal["classification", "binary", "regression", "language_modeling", "masked_language_modeling"]
TOKEN_TASKS: tuple[Task, ...] = ("language_modeling", "masked_language_modeling")
"""The tasks with a target per token instead of one per row."""

Unknown = Literal["zeros", "code"]
UNKNOWN = -1
"""Code of a category that the training split does not contain, unless it has a code of its own; its one-hot encoding is
all zeros."""


DateEncoding = Literal["parts", "epoch", "cyclic"]
DATE_PARTS: dict[DateEncoding, tuple[str, ...]] = {
    "parts": ("year", "month", "day", "weekday", "hour"),
    "epoch": ("days",),
    "cyclic": ("year sine", "year cosine", "week sine", "week cosine", "day sine", "day cosine"),
}
"""The numbers that each encoding computes from a date; see `sources/dates.py`."""


class NumericColumn(Spec):
    """A number per row: missing (NaN) becomes `fill`, then `(x - shift) / scale`."""

    kind: Literal["numeric"] = "numeric"
    name: str
    fill: float | None = None
    """Replaces a missing value; None: the column has no missing values and a null is rejected."""
    shift: float = 0.0
    scale: float = 1.0
    boolean: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether all values are booleans (1 is true), which the endpoint takes as such."""
    offset: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Subtracted in float64 before everything else, for numbers whose differences float32 would round away, such as
    identifiers of 12 digits; the raw value is then FP64. None: the raw value is FP32."""


class DateColumn(Spec):
    """A time per row as FP64 seconds since 1970 (UTC), encoded as several numbers; missing (NaN) becomes `fill`, then
    `(x - shift) / scale`.
    """

    kind: Literal["date"] = "date"
    name: str
    encoding: DateEncoding
    origin: float
    """Seconds from which `epoch` counts days."""
    fill: tuple[float, ...] | None = None
    """Replaces the numbers of a missing date; None: the column has no missing values and a null is rejected."""
    shift: tuple[float, ...]
    """One per number of `DATE_PARTS[encoding]`."""
    scale: tuple[float, ...]
    """As `shift`."""


class CategoricalColumn(Spec):
    """A category per row, coded by its index in `categories`; on the wire it is a string or an integer."""

    kind: Literal["categorical"] = "categorical"
    name: str
    datatype: Literal["BYTES", "INT64"] = "BYTES"
    categories: tuple[str, ...] | tuple[int, ...]
    """Distinct values of the training split, sorted."""
    fill: int | None = None
    """Code of a missing value (an empty string); None: the column has no missing values and a null is rejected."""
    encoding: Literal["one_hot", "ordinal"] = "one_hot"
    """`one_hot`: one feature per category; `ordinal`: the code itself as one feature."""
    unknown: Unknown = Field(default="zeros", exclude_if=lambda value: value == "zeros")
    """`code`: an unknown category has a code of its own, the number of categories."""

    @property
    def unknown_code(self) -> int:
        """The code of a category that the training split does not contain."""
        return len(self.categories) if self.unknown == "code" else UNKNOWN

    @property
    def cardinality(self) -> int:
        """Number of codes that are at least 0."""
        return len(self.categories) + (self.unknown == "code")


class TensorColumn(Spec):
    """A tensor per row, such as an image: missing (NaN) becomes `fill`, then `(x - shift) / scale`."""

    kind: Literal["tensor"] = "tensor"
    name: str
    datatype: Literal["FP32", "UINT8"] = "FP32"
    shape: tuple[int, ...]
    """Sizes without the batch dimension."""
    fill: float | None = None
    shift: tuple[float, ...] = (0.0,)
    """One value for the whole tensor, or one per element in row-major order."""
    scale: tuple[float, ...] = (1.0,)
    """As `shift`."""
    image: ImageEncoding | None = Field(default=None, exclude_if=lambda value: value is None)
    """How image files become this tensor; None: the data contained plain numbers."""


class TokensColumn(Spec):
    """A row of token ids; always the only column, and passed to the model unchanged."""

    kind: Literal["tokens"] = "tokens"
    name: str
    datatype: Literal["INT64"] = "INT64"
    length: int
    """Tokens per row."""
    vocab_size: int
    """Token ids are in [0, vocab_size)."""
    pad: int | None = None
    """Token id that pads the rows of shorter texts; None: every row is full."""
    tokenizer: str
    """Hex sha256 of the tokenizer's JSON file, which is stored as a part of the data set."""


class TargetScaling(Spec):
    """The scale of numeric targets in training: the network learns `(target - shift) / scale`, one entry per target."""

    shift: tuple[float, ...]
    """Mean of each target over the training split."""
    scale: tuple[float, ...]
    """Standard deviation of each target over the training split; 1 for a constant target."""


Column = Annotated[
    NumericColumn | DateColumn | CategoricalColumn | TensorColumn | TokensColumn, Field(discriminator="kind")
]


class Features(Spec):
    """All raw input columns in the order in which the graph takes them, and the target."""

    columns: tuple[Column, ...]
    task: Task
    target: str
    """Name of the target column."""
    weight: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Name of the column with the weight of each row; None: every row has the weight 1."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of their codes; None for regression and the token tasks."""
    target_scaling: TargetScaling | None = Field(default=None, exclude_if=lambda value: value is None)
    """Regression: the scale in which the network learns; data sets contain the target unscaled. None: not scaled."""
    reader: ReaderOptions = Field(default=ReaderOptions(), exclude_if=lambda value: value == ReaderOptions())
    """How the text of raw rows is read; see `sources/csv_file.py` and `sources/number_text.py`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokens is None and (self.is_per_token or any(column.kind == "tokens" for column in self.columns)):
            raise ValueError(
                f"the columns do not fit the task {self.task}: a token column must be the only column, and the tasks "
                f"{' and '.join(TOKEN_TASKS)} need one"
            )
        return self

    @property
    def tokens(self) -> TokensColumn | None:
        """The token column, if rows are tokens."""
        only = self.columns[0] if len(self.columns) == 1 else None
        return only if only is not None and only.kind == "tokens" else None

    @property
    def is_per_token(self) -> bool:
        """Whether the model returns logits for every token, and the target is int64 [N, T] (-100: ignored)."""
        return self.task in TOKEN_TASKS

    @property
    def row(self) -> Row:
        """One preprocessed row: a single tensor or token column keeps its shape; other columns are flattened and
        concatenated.
        """
        if self.tokens is not None:
            return Row((self.tokens.length,), self.tokens.vocab_size, self.tokens.pad)
        if len(self.columns) == 1 and self.columns[0].kind == "tensor":
            return Row(self.columns[0].shape)
        return Row((sum(column_width(column) for column in self.columns),), columns=tuple(self._places()))

    def _places(self) -> Iterator[InputColumn]:
        start = 0
        for column in self.columns:
            width = column_width(column)
            if column.kind == "categorical":
                has_unknown = column.unknown == "code"
                yield InputColumn(column.name, column.encoding, start, width, (width,), column.cardinality, has_unknown)
            elif column.kind == "tensor":
                yield InputColumn(column.name, "tensor", start, width, column.shape)
            elif column.kind == "numeric":
                yield InputColumn(column.name, "numeric", start, width, (width,))
            start += width

    @property
    def num_outputs(self) -> int:
        """Logits that a model must return per row, or per token for the token tasks.

        One per class or token id; one for binary and regression.
        """
        if self.is_per_token and self.tokens is not None:
            return self.tokens.vocab_size
        return len(self.labels or ()) if self.task == "classification" else 1


def column_width(column: Column) -> int:
    """Elements of the preprocessed row that come from this column."""
    if column.kind == "tensor":
        return prod(column.shape)
    if column.kind == "tokens":
        return column.length
    if column.kind == "date":
        return len(DATE_PARTS[column.encoding])
    if column.kind == "categorical" and column.encoding == "one_hot":
        return column.cardinality
    return 1


def is_wide(column: Column) -> bool:
    """Whether the raw value is FP64, which is encoded as float32 before preprocessing."""
    return column.kind == "date" or (column.kind == "numeric" and column.offset is not None)
