"""Parts: safetensors files of limited size that consist of separately hashed tiles. Independent of other ranks."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from maas_ray.checkpoint.copying import copy_bits
from maas_ray.checkpoint.dtypes import NAMES
from maas_ray.checkpoint.pieces import TensorPiece
from maas_ray.store.manifest import Part, piece_digest

PART_BYTES = 64 << 20
MAX_PART_BYTES = 256 << 20
PARTS_PER_RANK = 128
"""Target number of parts: their size grows with the bytes of a rank, within the two limits above."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class TileSlot:
    """The position of one tile in a part."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int

    def values(self, buffer: Tensor) -> Tensor:
        """The tile's values inside its part's bytes."""
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.sizes)


@dataclass(frozen=True)
class PartLayout:
    """The layout of a part: a safetensors header and the positions of its tiles, without gaps."""

    name: str
    header: bytes
    slots: tuple[TileSlot, ...]
    size: int

    @property
    def pieces(self) -> tuple[int, ...]:
        """Sizes of the separately hashed pieces: the header and every tile."""
        return (len(self.header), *(slot.size for slot in self.slots))


def lay_out(items: Sequence[WriteItem], rank: int, part_bytes: int | None = None) -> list[PartLayout]:
    """Packs the tiles that a rank writes into parts; tiles of one tensor are adjacent, for readers of many tiles.

    Args:
        items: write items that torch's planner assigned to this rank.
        rank: rank, for the names of the parts.
        part_bytes: maximum size of a part; only a larger tile makes a larger part.
    """
    limit = part_bytes or min(max(sum(map(_nbytes, items)) // PARTS_PER_RANK, PART_BYTES), MAX_PART_BYTES)
    groups: list[list[WriteItem]] = []
    room = 0
    for item in items:
        size = _nbytes(item)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return [lay_out_part(f"{rank:05d}-{number:05d}.safetensors", group) for number, group in enumerate(groups)]


def lay_out_part(name: str, items: Sequence[WriteItem]) -> PartLayout:
    """Lays out one part: tiles with large elements first, so that every element is aligned to its size."""
    header: dict[str, object] = {}
    places = []
    end = 0
    for item in sorted(items, key=lambda item: -_data(item).properties.dtype.itemsize):
        data, size = _data(item), _nbytes(item)
        offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        shown = ",".join(f"{offset}:{offset + length}" for offset, length in zip(offsets, sizes, strict=True))
        header[item.index.fqn if sizes == tuple(data.size) else f"{item.index.fqn}[{shown}]"] = {
            "dtype": NAMES[data.properties.dtype],
            "shape": sizes,
            "data_offsets": [end, end + size],
        }
        places.append((item.index.fqn, offsets, sizes, data.properties.dtype, end, size))
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # the format allows spaces here; they align the values
    head = len(text).to_bytes(8, "little") + text
    slots = tuple(
        TileSlot(tensor, offsets, sizes, dtype, len(head) + start, size)
        for tensor, offsets, sizes, dtype, start, size in places
    )
    return PartLayout(name, head, slots, len(head) + end)


def fill_header(layout: PartLayout, buffer: Tensor) -> None:
    """Copies the header into a part's buffer (uint8)."""
    copy_bits(buffer[: len(layout.header)], torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))


def fill_tiles(
    layout: PartLayout,
    buffer: Tensor,
    pieces: Mapping[str, TensorPiece],
    copy: Callable[[Tensor, Tensor], None],
    without: Collection[str] = (),
) -> None:
    """Copies tiles into a part's buffer, except those of some tensors; asynchronously from a GPU."""
    for slot in layout.slots:
        if slot.size and slot.tensor not in without:
            copy(slot.values(buffer), pieces[slot.tensor].tile(slot.offsets, slot.sizes))


def seal_part(layout: PartLayout, key: str, data: memoryview) -> tuple[Part, list[str]]:
    """The part's manifest entry, and the `piece_digest` of each of its tiles in hex; hashes every byte once."""
    digests = [piece_digest(data[slot.start : slot.start + slot.size]) for slot in layout.slots]
    joined = b"".join([piece_digest(layout.header), *digests])
    return Part(key, layout.size, sha256(joined).hexdigest(), layout.pieces), [each.hex() for each in digests]


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data


def _nbytes(item: WriteItem) -> int:
    return int(_data(item).chunk.sizes.numel() * _data(item).properties.dtype.itemsize)
