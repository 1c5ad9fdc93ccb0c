"""Rows of tokens as windows on a stream that is mapped, not read: a row costs its own bytes, a rank none of its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maas_ray.data.loading.rows import Batch
from maas_ray.data.loading.token_masks import mask_tokens
from maas_ray.data.stored.token_layout import TokenLayout
from maas_ray.errors import ObjectCorrupt


class Windows:
    """Row i is the tokens from place i * stride on: `length` of them, and the same shifted by one as the target.

    Args:
        parts: the stream, each part but the last of `layout.part_tokens` tokens; memory that is mapped stays so.
        layout: how the stream is cut.
        split: decides the stride.
        vocab_size: token ids are below it.
        seed: of the masks.

    Raises:
        ObjectCorrupt: the parts do not have the tokens of the layout.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], layout: TokenLayout, split: str, vocab_size: int, seed: int
    ) -> None:
        self._parts = [np.asarray(part) for part in parts]  # a plain array's slices cost a third of a memmap's
        if (found := sum(map(len, self._parts))) != layout.num_tokens[split]:
            raise ObjectCorrupt(
                f"the parts of {split} hold {found} tokens; their manifest says {layout.num_tokens[split]}"
            )
        self._layout = layout
        self._stride = layout.strides[split]
        self._num_rows = layout.num_rows(split)
        self._vocab_size = vocab_size
        self._seed = seed

    def __len__(self) -> int:
        return self._num_rows

    def take(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        tokens = np.empty((len(ids), self._layout.width), dtype=np.int64)
        for row, first in zip(tokens, (ids * self._stride).tolist(), strict=True):
            self._copy(first, row)
        mask = self._layout.mask
        if mask is None:
            seen, target = tokens[:, :-1], tokens[:, 1:]
        else:
            seen, target = mask_tokens(mask, self._vocab_size, self._seed, positions, tokens)
        return Batch(
            [torch.from_numpy(np.ascontiguousarray(seen))],
            torch.from_numpy(np.ascontiguousarray(target)),
            torch.from_numpy(positions),
        )

    def _copy(self, first: int, row: NDArray[np.int64]) -> None:
        """Fills `row` with the tokens from place `first` on, which may lie in several parts."""
        done = 0
        while done < len(row):
            part, place = divmod(first + done, self._layout.part_tokens)
            piece = self._parts[part][place : place + len(row) - done]
            row[done : done + len(piece)] = piece
            done += len(piece)
