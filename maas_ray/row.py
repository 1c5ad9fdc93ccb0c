"""The shape and type of one preprocessed row, the input of models. Independent of data sources and torch."""

from dataclasses import dataclass


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

    @property
    def is_tokens(self) -> bool:
        """Whether the row is a sequence of token ids."""
        return self.vocab_size is not None
