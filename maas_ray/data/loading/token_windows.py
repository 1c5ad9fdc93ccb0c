"""Rows of token ids as windows on a memory-mapped token stream, so that ranks need no copy of it."""

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
    """Row i is the `length` tokens from index i * stride on; the target is the same tokens shifted by one.

    Args:
        parts: the stream, each part but the last of `layout.part_tokens` tokens; mapped memory stays mapped.
        layout: layout of the stream.
        split: name of the split, which decides the stride.
        vocab_size: token ids are below it.
        seed: seed of the masks.

    Raises:
        ObjectCorrupt: the parts do not contain the number of tokens in the layout.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], layout: TokenLayout, split: str, vocab_size: int, seed: int
    ) -> None:
        self._parts = [np.asarray(part) for part in parts]  # a plain array's slices cost a third of a memmap's
        if (found := sum(map(len, self._parts))) != layout.num_tokens[split]:
            raise ObjectCorrupt(
                f"the parts of {split} contain {found} tokens; their manifest lists {layout.num_tokens[split]}; "
                "restore the data set from a backup"
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
        """Fills `row` with the tokens from index `first` on, which may be in several parts."""
        done = 0
        while done < len(row):
            part, place = divmod(first + done, self._layout.part_tokens)
            piece = self._parts[part][place : place + len(row) - done]
            row[done : done + len(piece)] = piece
            done += len(piece)
