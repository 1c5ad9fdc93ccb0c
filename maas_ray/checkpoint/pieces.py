"""One rank's piece of a tensor, described to torch's save planner as tiles. Independent of stores."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from maas_ray.checkpoint.dtypes import name_of
from maas_ray.checkpoint.tiles import Box, cut, grid


@dataclass(frozen=True)
class TensorPiece:
    """This rank's piece of a tensor.

    Implements the protocol by which torch's planners (`torch.distributed.checkpoint`) request the chunks of a
    tensor-like object, so that they select the writer of each tile and deduplicate tiles that several ranks have.

    Attributes:
        shape: shape of the whole tensor.
        box: position of this rank's part in it.
        local: values with the box's size, on any device.
        is_tiled: False: one chunk of any size.
        total_bytes: bytes of the whole checkpoint.
    """

    shape: tuple[int, ...]
    box: Box
    local: Tensor
    is_tiled: bool = True
    total_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return self.local.numel() * self.local.element_size()

    def tile(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The view of one tile; `offsets` are relative to the whole tensor."""
        found = self.local
        for dim, (offset, size, origin) in enumerate(zip(offsets, sizes, self.box[0], strict=True)):
            found = found.narrow(dim, offset - origin, size)
        return found

    def __create_write_items__(self, fqn: str, piece: Any) -> list[WriteItem]:
        return [self._item(fqn, *box) for box in self._boxes()]

    def _boxes(self) -> list[Box]:
        if math.prod(self.shape) == 0:
            return [((0,) * len(self.shape), self.shape)]  # no values to store, only a name
        if math.prod(self.box[1]) == 0:
            return []  # a rank without a part of an unevenly sharded tensor
        if not self.is_tiled:
            return [self.box]
        return list(cut(self.box, grid(self.shape, self.local.element_size(), self.total_bytes)))

    def _item(self, fqn: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> WriteItem:
        data = TensorWriteData(
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            TensorProperties(self.local.dtype),
            torch.Size(self.shape),
        )
        return WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data)


def piece_of(name: str, tensor: Tensor) -> TensorPiece | None:
    """This rank's piece of a tensor; None if a DTensor's mesh does not include this rank.

    Raises:
        ModelError: its type cannot be stored.
    """
    name_of(name, tensor.dtype)
    if not isinstance(tensor, DTensor):
        local = _plain(tensor)
        return TensorPiece(tuple(local.shape), ((0,) * local.dim(), tuple(local.shape)), local)
    if tensor.device_mesh.get_coordinate() is None:
        return None
    with torch.no_grad():
        local = _plain(tensor.to_local())
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return TensorPiece(tuple(tensor.shape), (tuple(chunk.offsets), tuple(chunk.sizes)), local)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without lazy conjugation or negation, whose bits are not the values."""
    return tensor.detach().resolve_conj().resolve_neg()
