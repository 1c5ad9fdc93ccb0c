"""How a stream of tokens lies in a data set, and how it is cut into rows. Reads nothing."""

from typing import Literal

from maas_ray.spec import Spec

Datatype = Literal["uint16", "uint32"]
DATATYPES: dict[Datatype, str] = {"uint16": "<u2", "uint32": "<u4"}
"""How token ids are written."""


class MaskLayout(Spec):
    """What masked language modeling hides."""

    fraction: float
    """Share of tokens to predict."""
    code: int
    """The mask token's id."""
    never: tuple[int, ...] = ()
    """Token ids that are never hidden: special tokens."""


class TokenLayout(Spec):
    """One stream of tokens per split, in parts of raw little-endian integers."""

    datatype: Datatype
    num_tokens: dict[str, int]
    """By split."""
    part_tokens: int
    """Tokens in each part of a stream; the last one may have fewer."""
    length: int
    """Tokens per row."""
    strides: dict[str, int]
    """By split: tokens from the start of one row to the next."""
    mask: MaskLayout | None
    """None: the target of each token is the one that follows."""

    @property
    def width(self) -> int:
        """Tokens that a row reads: the next token is a target too, unless masked tokens are."""
        return self.length + (self.mask is None)

    def num_rows(self, split: str) -> int:
        """Rows of a split; tokens behind the last whole row are in none."""
        return max(0, (self.num_tokens[split] - self.width) // self.strides[split] + 1)
