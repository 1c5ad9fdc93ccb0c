"""The layout of a token stream in a data set: its parts, rows and masks."""

from typing import Literal

from maas_ray.spec import Spec

Datatype = Literal["uint16", "uint32"]
DATATYPES: dict[Datatype, str] = {"uint16": "<u2", "uint32": "<u4"}
"""NumPy datatypes of stored token ids."""


class MaskLayout(Spec):
    """The parameters of masking for masked language modeling."""

    fraction: float
    """Fraction of tokens to predict."""
    code: int
    """The mask token's id."""
    never: tuple[int, ...] = ()
    """Token ids that are never masked: special tokens."""


class TokenLayout(Spec):
    """One token stream per split, in parts of raw little-endian integers."""

    datatype: Datatype
    num_tokens: dict[str, int]
    """Tokens, by split."""
    part_tokens: int
    """Tokens in each part of a stream; the last one may have fewer."""
    length: int
    """Tokens per row."""
    strides: dict[str, int]
    """By split: tokens from the start of one row to the next."""
    mask: MaskLayout | None
    """None: the target of each token is the next token."""

    @property
    def width(self) -> int:
        """Tokens that a row reads: one more than its length, unless the targets are masked tokens."""
        return self.length + (self.mask is None)

    def num_rows(self, split: str) -> int:
        """Rows of a split; tokens after the last whole row are not used."""
        return max(0, (self.num_tokens[split] - self.width) // self.strides[split] + 1)
