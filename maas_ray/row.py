"""The shape and type of one preprocessed row, the input of models. Independent of data sources and torch."""

from dataclasses import dataclass
from typing import Literal

ColumnKind = Literal["numeric", "one_hot", "ordinal", "tensor"]


@dataclass(frozen=True)
class InputColumn:
    """The place of one column of the data in a flat row."""

    name: str
    kind: ColumnKind
    start: int
    """Index of its first value in the row."""
    width: int
    """Number of its values in the row."""
    shape: tuple[int, ...] = (1,)
    """Shape of the column before it was flattened."""
    cardinality: int | None = None
    """Number of codes of a categorical column, which are in [0, cardinality). None: not a category."""
    has_unknown: bool = False
    """Whether the last code is that of unknown categories (`cleaning.categorical.unknown: code`); without it an unknown
    category is -1 in an ordinal column."""


@dataclass(frozen=True)
class Row:
    """float32 values of a shape, or a sequence of token ids.

    Without `vocab_size` a row is float32 values of `shape`. With it a row is int64 token ids in [0, vocab_size), and
    `shape` is (T,).
    """

    shape: tuple[int, ...]
    """Sizes without the batch dimension."""
    vocab_size: int | None = None
    """Number of token ids; None: the row consists of values."""
    pad: int | None = None
    """Id of padding tokens, which models must ignore. None: rows have no padding."""
    columns: tuple[InputColumn, ...] = ()
    """The columns of a flat row, in order; empty for a single tensor and for tokens."""

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of codes of each ordinal column, in the order of the columns."""
        return tuple(one.cardinality or 0 for one in self.columns if one.kind == "ordinal")

    @property
    def is_tokens(self) -> bool:
        """Whether the row is a sequence of token ids."""
        return self.vocab_size is not None
